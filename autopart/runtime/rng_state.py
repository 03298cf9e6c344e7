"""What random numbers depend on, besides the place of their element."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RngState:
    """The seed, the step and the micro-batch. The executor sets step and micro-batch."""

    seed: int = 0
    step: int = 0
    micro_batch: int = 0
