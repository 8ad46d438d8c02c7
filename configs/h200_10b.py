"""DeepSeek-V2-Lite cut to 18 layers: 10.4B parameters with their optimizer on one H200, FP8.

    python3 -m uv run --extra gpu run.py train configs/h200_10b.py

Masters and gradients take 4 bytes a parameter each, both moments 4, FP8 weights 2; norms,
up-projections and SwiGLU are computed again in the backward pass. One H200:
33,700 tokens/s and 103.6 GiB.
"""

from dsjax.config import Balance, Data, Model, Optimizer, Run, Train, Yarn


def recipe() -> Run:
    return Run(
        name="h200_10b",
        precision="fp8",
        model=Model(
            vocab_size=102400, dim=2048, layers=18, dense_layers=1, heads=16, q_lora_rank=None,
            dense_hidden=10944, expert_hidden=1408, experts=64, shared_experts=2, top_k=6,
            groups=1, top_groups=1, gate="softmax", selection="greedy", norm_topk=False,
            route_scale=1.0, mtp_depth=0, yarn=Yarn(mscale=0.707, mscale_all_dim=0.707),
        ),
        data=Data(seq_len=4096),
        train=Train(steps=1000, batch=2, remat="v3", save_every=1000, eval_every=500,
                    eval_batches=4),
        optimizer=Optimizer(peak_lr=4.2e-4, final_lr=4.2e-5, moment_dtype="bfloat16"),
        balance=Balance(bias_speed=0.0, sequence_aux=0.001),
    )  # fmt: skip
