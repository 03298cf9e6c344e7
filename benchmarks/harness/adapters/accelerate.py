"""Hugging Face accelerate: `Accelerator.prepare` of model and optimizer."""

from __future__ import annotations

from torch import Tensor

from autopart.compile.bench.setting import Setting, Step, loss_from, mean_over_ranks


def build(setting: Setting) -> tuple[Step, str]:
    """What `Accelerator()` makes of these ranks, which is DistributedDataParallel."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=setting.device.type == "cpu")
    model = setting.copy_of_model()
    model, optimizer = accelerator.prepare(model, setting.optimizer_of(model.parameters()))
    batch = setting.share_of_batch()

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = loss_from(model(**batch))
        accelerator.backward(loss)
        optimizer.step()
        return mean_over_ranks(loss)

    return step, f"dp={setting.size}, {type(model).__name__}"
