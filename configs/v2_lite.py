"""DeepSeek-V2-Lite: 15.7B parameters, 2.4B active, no q-LoRA (arXiv 2405.04434, appendix B).

    python3 -m uv run run.py info configs/v2_lite.py

Sizes only are measured here; h200_3b is the cut of it that trains on one card.
"""

from dsjax.config import Balance, Data, Model, Optimizer, Run, Train, Yarn


def recipe() -> Run:
    return Run(
        name="v2_lite",
        model=Model(
            vocab_size=102400, dim=2048, layers=27, dense_layers=1, heads=16, q_lora_rank=None,
            dense_hidden=10944, expert_hidden=1408, experts=64, shared_experts=2, top_k=6,
            groups=1, top_groups=1, gate="softmax", selection="greedy", norm_topk=False,
            route_scale=1.0, mtp_depth=0, yarn=Yarn(mscale=0.707, mscale_all_dim=0.707),
        ),
        data=Data(seq_len=4096),
        train=Train(steps=300_000, batch=4608, micro_batches=9, save_every=1000, remat="layer"),
        optimizer=Optimizer(peak_lr=4.2e-4, final_lr=4.2e-5, moment_dtype="bfloat16"),
        balance=Balance(bias_speed=0.0, sequence_aux=0.001),
    )  # fmt: skip
