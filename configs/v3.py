"""DeepSeek-V3 and R1: 671B parameters, 37B active, one MTP layer (arXiv 2412.19437).

    python3 -m uv run run.py info configs/v3.py

Sizes only are measured here; training it takes a cluster and the expert parallelism to come.
"""

from dsjax.config import Data, Model, Optimizer, Run, Train


def recipe() -> Run:
    return Run(
        name="v3",
        model=Model(),
        data=Data(seq_len=4096, fim_rate=0.1),
        train=Train(steps=235_000, batch=15360, micro_batches=15, ramp_from=3072,
                    ramp_fraction=0.03, save_every=1000, remat="layer"),
        optimizer=Optimizer(moment_dtype="bfloat16", warmup_fraction=0.0085),
    )  # fmt: skip
