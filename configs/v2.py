"""DeepSeek-V2: 236B parameters, 21B active, softmax gate, 3 of 8 device groups (arXiv 2405.04434).

    python3 -m uv run run.py info configs/v2.py

Sizes only are measured here. V2's own balance losses (expert, device, communication) are replaced
by the classic auxiliary loss over the batch.
"""

from dsjax.config import Balance, Data, Model, Optimizer, Run, Train


def recipe() -> Run:
    return Run(
        name="v2",
        model=Model(
            vocab_size=102400, dim=5120, layers=60, dense_layers=1, heads=128, q_lora_rank=1536,
            dense_hidden=12288, expert_hidden=1536, experts=160, shared_experts=2, top_k=6,
            groups=8, top_groups=3, gate="softmax", selection="group_limited_greedy",
            norm_topk=False, route_scale=16.0, mtp_depth=0,
        ),
        data=Data(seq_len=4096),
        train=Train(steps=215_000, batch=9216, micro_batches=9, ramp_from=2048,
                    ramp_fraction=0.03, save_every=1000, remat="layer"),
        optimizer=Optimizer(peak_lr=2.4e-4, final_lr=2.4e-5, moment_dtype="bfloat16"),
        balance=Balance(bias_speed=0.0, sequence_aux=0.0, batch_aux=0.003),
    )  # fmt: skip
