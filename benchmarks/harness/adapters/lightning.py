"""Lightning Fabric: its DDP strategy."""

from __future__ import annotations

from torch import Tensor

from autopart.compile.bench.setting import Setting, Step, loss_from, mean_over_ranks


def build(setting: Setting) -> tuple[Step, str]:
    """`Fabric(strategy="ddp")` on the ranks that run."""
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.fabric.strategies import DDPStrategy

    strategy = DDPStrategy(cluster_environment=TorchElasticEnvironment())
    fabric = Fabric(accelerator=setting.device.type, devices=setting.size, strategy=strategy)
    fabric.launch()
    model = setting.copy_of_model()
    model, optimizer = fabric.setup(model, setting.optimizer_of(model.parameters()))
    batch = setting.share_of_batch()

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_from(model(**batch))
        fabric.backward(loss)
        optimizer.step()
        return mean_over_ranks(loss)

    return step, f"dp={setting.size}, DDPStrategy"
