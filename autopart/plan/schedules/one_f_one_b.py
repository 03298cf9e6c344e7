"""1F1B: one forward and one backward in turn (PipeDream-Flush; Narayanan et al., arXiv 2006.09503)."""

from autopart.plan.schedules.ops import Op, Order


def order(stage: int, stages: int, micro_batches: int) -> Order:
    """The computations of one stage: min(micro_batches, stages - 1 - stage) warm-up forwards, then one forward and one
    backward in turn, then the backwards left over."""
    warm_up = min(micro_batches, stages - 1 - stage)
    ops = [(Op.FORWARD, batch) for batch in range(warm_up)]
    for batch in range(micro_batches):
        if warm_up + batch < micro_batches:
            ops.append((Op.FORWARD, warm_up + batch))
        ops.append((Op.BACKWARD, batch))
    return ops


def in_flight(stage: int, stages: int, micro_batches: int) -> int:
    """The warm-up and one more, but no more than there are micro-batches."""
    return min(micro_batches, stages - stage)
