from dsjax.config import Balance, Data, Model, Optimizer, Run, Train


def recipe() -> Run:
    return Run(
        name="tiny",
        precision="fp32",
        model=Model(
            vocab_size=260,
            dim=128,
            layers=4,
            dense_layers=1,
            heads=4,
            q_lora_rank=None,
            kv_lora_rank=64,
            qk_nope_dim=32,
            qk_rope_dim=16,
            v_dim=32,
            dense_hidden=384,
            expert_hidden=128,
            experts=8,
            shared_experts=1,
            top_k=2,
            groups=1,
            top_groups=1,
            route_scale=1.0,
            context=2048,
            yarn=None,
            mtp_depth=1,
            init_std=0.02,
        ),
        data=Data(seq_len=256, held_out=0.02),
        train=Train(steps=500, batch=16, save_every=250, eval_every=250),
        optimizer=Optimizer(
            peak_lr=4e-3,
            final_lr=2e-4,
            last_lr=2e-4,
            last_fraction=0.0,
            warmup_fraction=0.04,
            constant_fraction=0.4,
            cosine_fraction=0.56,
        ),
        balance=Balance(bias_speed=1e-2),
    )
