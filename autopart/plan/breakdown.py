"""Where the seconds of a step go."""

from autopart.cost.training_state import amortization
from autopart.hardware.mixed import peak_flops
from autopart.plan.fields import PlanFields


def model_flops_utilisation(plan: PlanFields) -> float:
    """3 forward_flops / (step_seconds x peak FLOP/s of all devices in the plan's precision), as Chowdhery et al., PaLM,
    arXiv 2204.02311, appendix B have it."""
    return 3 * plan.forward_flops / (plan.step_seconds * peak_flops(plan.mesh, plan.precision))


def slowest_stage(plan: PlanFields) -> int:
    """The index of the stage that takes the most seconds for a micro-batch (`PlanStage.turn_seconds`)."""
    shared = amortization(plan.zero, plan.micro_batches, plan.pp)
    return max(range(plan.pp), key=lambda index: plan.stages[index].turn_seconds(shared))


def fullest_stage(plan: PlanFields) -> int:
    """The index of the stage whose memory peak has the most bytes of those that its device can give."""
    shares = [nbytes / usable for nbytes, usable in zip(plan.memory_bytes, plan.usable_bytes, strict=True)]
    return max(range(plan.pp), key=shares.__getitem__)


def step_breakdown(plan: PlanFields) -> dict[str, float]:
    """Cause -> seconds of a step of the slowest stage; they add up to `plan.step_seconds`.

    compute, recompute (its collectives included), communication (collectives of the micro-batches), p2p (messages
    between stages), gradient sync (what no backward hides, and the optimizer) and bubble: the rest.
    """
    m, slowest = plan.micro_batches, plan.stages[slowest_stage(plan)]
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
