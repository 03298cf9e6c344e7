"""FSDP2 (torch.distributed.fsdp.fully_shard): every block on its own, then what is left."""

from collections.abc import Iterator

from torch import nn
from torch.distributed.fsdp import fully_shard

from autopart.compile.bench.setting import Setting, Step, mean_over_ranks, plain_step


def build(setting: Setting) -> tuple[Step, str]:
    """fully_shard over all ranks."""
    model, mesh = setting.copy_of_model(), setting.device_mesh(("dp", setting.size))
    blocks = list(blocks_of(model))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    step = plain_step(model, setting.share_of_batch(), setting.optimizer_of(model.parameters()))
    return lambda: mean_over_ranks(step()), f"dp={setting.size}, fully_shard of {len(blocks)} blocks"


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """The entries of the outermost lists of more than one module."""
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) > 1:
            yield from child
        else:
            yield from blocks_of(child)
