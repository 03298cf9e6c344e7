"""What random numbers depend on, besides their place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RngState:
    """What every stream depends on; the executor keeps the step and the micro-batch."""

    seed: int = 0
    step: int = 0
    micro_batch: int = 0
