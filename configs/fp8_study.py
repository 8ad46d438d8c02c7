"""490M parameters (130M active) in BF16 and FP8 on the same text: what FP8 costs in quality.

    python3 -m uv run --extra gpu run.py precision configs/fp8_study.py

1,500 steps of 16 x 1024 bytes a variant.
"""

from dsjax.config import Data, Model, Optimizer, Run, Train


def recipe() -> Run:
    return Run(
        name="fp8_study",
        precision="fp8",
        model=Model(
            vocab_size=512, dim=1024, layers=12, dense_layers=1, heads=8, q_lora_rank=None,
            dense_hidden=2816, expert_hidden=384, experts=32, shared_experts=1, top_k=4, groups=1,
            top_groups=1, route_scale=2.5, context=4096, yarn=None, mtp_depth=0, init_std=0.02,
        ),
        data=Data(seq_len=1024),
        train=Train(steps=1500, batch=16, save_every=1500, eval_every=1500),
        optimizer=Optimizer(peak_lr=6e-4, final_lr=6e-5, last_lr=6e-5, last_fraction=0.0,
                            warmup_fraction=0.05, constant_fraction=0.6, cosine_fraction=0.35,
                            moment_dtype="bfloat16"),
    )  # fmt: skip
