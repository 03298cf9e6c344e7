"""The systems that train any model: autopart's plans, one process, and PyTorch's data parallelism."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from autopart.compile.bench import ddp, fsdp2, one_process, own
from autopart.compile.bench.setting import System


def systems(ranks: int, **settings: Any) -> dict[str, System]:
    """Name -> system, in the order of turns. `settings` of `autopart.compile` are those of the planner's own plan."""
    rivals: Mapping[str, System] = {
        "one process": System(one_process.build),
        "DDP": System(ddp.build, own.name_of(dp=ranks)),
        "ZeroRedundancyOptimizer": System(ddp.build_zero_optimizer, own.name_of(dp=ranks, zero=1)),
        "FSDP2": System(fsdp2.build, own.name_of(dp=ranks, zero=3)),
    }
    return {own.OWN: System(partial(own.build, **settings)), **own.uniform(ranks), **rivals}
