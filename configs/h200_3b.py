"""DeepSeek-V2-Lite cut to 6 layers: 3.4B parameters on one H200, batch 8 x 4096, FP8.

    python3 -m uv run --extra gpu run.py train configs/h200_3b.py

Byte-level text by default (ids below 260 of the vocabulary of 102,400): give --data.tokenizer a
tokenizer.json to train a model worth keeping. One H200: 130,000 tokens/s and 48.2 GiB, and with
--precision bf16 110,700 and 61.4; other GPUs have no FP8 kernels here.
"""

from dsjax.config import Balance, Data, Model, Optimizer, Run, Train, Yarn


def recipe() -> Run:
    return Run(
        name="h200_3b",
        precision="fp8",
        model=Model(
            vocab_size=102400, dim=2048, layers=6, dense_layers=1, heads=16, q_lora_rank=None,
            dense_hidden=10944, expert_hidden=1408, experts=64, shared_experts=2, top_k=6,
            groups=1, top_groups=1, gate="softmax", selection="greedy", norm_topk=False,
            route_scale=1.0, mtp_depth=0, yarn=Yarn(mscale=0.707, mscale_all_dim=0.707),
        ),
        data=Data(seq_len=4096),
        train=Train(steps=1000, batch=8, save_every=1000, eval_every=250, eval_batches=4),
        optimizer=Optimizer(peak_lr=4.2e-4, final_lr=4.2e-5, moment_dtype="bfloat16"),
        balance=Balance(bias_speed=0.0, sequence_aux=0.001),
    )  # fmt: skip
