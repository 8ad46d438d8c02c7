"""490M parameters (130M active) in BF16 for a GPU of 16 to 24 GiB without FP8: T4, L4, A10G.

    python3 -m uv run --extra gpu run.py train configs/colab.py

Bytes of Python's standard library by default: give --data.paths your own text. The batch is worked
through in four parts, and a layer's norms, up-projections and SwiGLU are computed again. It has not
run on such a GPU yet.
"""

from dsjax.config import Data, Model, Optimizer, Run, Train


def recipe() -> Run:
    return Run(
        name="colab",
        precision="bf16",
        model=Model(
            vocab_size=512, dim=1024, layers=12, dense_layers=1, heads=8, q_lora_rank=None,
            dense_hidden=2816, expert_hidden=384, experts=32, shared_experts=1, top_k=4, groups=1,
            top_groups=1, route_scale=2.5, context=4096, yarn=None, mtp_depth=0, init_std=0.02,
        ),
        data=Data(seq_len=1024),
        train=Train(steps=2000, batch=16, micro_batches=4, remat="v3", save_every=500,
                    eval_every=500),
        optimizer=Optimizer(peak_lr=6e-4, final_lr=6e-5, last_lr=6e-5, last_fraction=0.0,
                            warmup_fraction=0.05, constant_fraction=0.6, cosine_fraction=0.35,
                            moment_dtype="bfloat16"),
    )  # fmt: skip
