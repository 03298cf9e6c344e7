"""Where the seconds of a step go."""

from autopart.cost.training_state import amortization
from autopart.plan.fields import PlanFields


def step_breakdown(plan: PlanFields) -> dict[str, float]:
    """Cause -> seconds of a step of the slowest stage; they add up to `plan.step_seconds`.

    compute, recompute (its collectives included), communication (collectives of the micro-batches), p2p (messages
    between stages), gradient sync (what no backward hides, and the optimizer) and bubble: the rest.
    """
    m, shared = plan.micro_batches, amortization(plan.zero, plan.micro_batches, plan.pp)
    slowest = max(plan.stages, key=lambda stage: stage.turn_seconds(shared))
    lines = [(len(segment.labels), line) for segment in slowest.segments for line in segment.lines]
    compute = m * sum(times * line.seconds for times, line in lines)
    comm = m * sum(times * line.comm_seconds for times, line in lines)
    recompute = m * (slowest.forward_seconds + slowest.backward_seconds) - compute - comm
    return {
        "compute": compute,
        "recompute": recompute if set(slowest.recompute) != {"none"} else 0.0,
        "communication": comm,
        "p2p": m * slowest.send_seconds,
        "gradient sync": slowest.sync_seconds,
        "bubble": max(0.0, plan.step_seconds - m * slowest.turn_seconds(m)),
    }
