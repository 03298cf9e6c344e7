"""torch.nn.parallel.DistributedDataParallel, with a plain optimizer and with ZeroRedundancyOptimizer (ZeRO 1)."""

from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from autopart.compile.bench.setting import OPTIMIZERS, Setting, Step, mean_over_ranks, plain_step


def build(setting: Setting) -> tuple[Step, str]:
    """DistributedDataParallel."""
    model = _parallel(setting)
    step = plain_step(model, setting.share_of_batch(), setting.optimizer_of(model.parameters()))
    return lambda: mean_over_ranks(step()), f"dp={setting.size}"


def build_zero_optimizer(setting: Setting) -> tuple[Step, str]:
    """DistributedDataParallel whose ranks update a share of the parameters each and broadcast it."""
    model = _parallel(setting)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), OPTIMIZERS[setting.optimizer], lr=setting.lr)
    step = plain_step(model, setting.share_of_batch(), optimizer)
    return lambda: mean_over_ranks(step()), f"dp={setting.size}, DDP with states of the optimizer split"


def _parallel(setting: Setting) -> nn.Module:
    ids = [setting.device.index] if setting.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(setting.copy_of_model(), device_ids=ids)
