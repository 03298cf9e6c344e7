"""DeepSpeed: its engine with a stage of ZeRO."""

from __future__ import annotations

from torch import Tensor

from autopart.compile.bench.setting import Setting, Step, loss_from, mean_over_ranks


def build(setting: Setting, level: int) -> tuple[Step, str]:
    """ZeRO 1, 2 or 3 over all ranks, in float32."""
    import deepspeed

    share = setting.share_of_batch()
    samples = len(next(iter(share.values())))
    config = {
        "train_micro_batch_size_per_gpu": samples,
        "zero_optimization": {"stage": level},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # 1.0 where it is not said
        "zero_force_ds_cpu_optimizer": False,
    }
    model = setting.copy_of_model()
    optimizer = setting.optimizer_of(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)

    def step() -> Tensor:
        loss = loss_from(engine(**share))
        engine.backward(loss)
        engine.step()
        return mean_over_ranks(loss)

    return step, f"dp={setting.size}, ZeRO {level}"
