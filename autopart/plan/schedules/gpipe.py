"""GPipe: all forwards, then all backwards (Huang et al., arXiv 1811.06965)."""

from autopart.plan.schedules.ops import Op, Order


def order(stage: int, stages: int, micro_batches: int) -> Order:
    """The computations of one stage.

    The backwards run in ascending order, so that gradients add up in the order of a plain loop over micro-batches. The
    paper's descending order takes the same time and memory.
    """
    return [(op, batch) for op in (Op.FORWARD, Op.BACKWARD) for batch in range(micro_batches)]


def in_flight(stage: int, stages: int, micro_batches: int) -> int:
    """All micro-batches."""
    return micro_batches
