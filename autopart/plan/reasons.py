"""Three sentences about a plan: what was chosen and why, the runner-up, and what limits the plan."""

from collections.abc import Iterator

from autopart.plan.breakdown import fullest_stage, step_breakdown
from autopart.plan.fields import PlanFields
from autopart.plan.search_summary import SearchSummary
from autopart.plan.units import bytes_text, counted, seconds_text, zero_text

ASKED = ("pp", "dp", "tp", "micro_batch", "zero", "shard_size", "offload", "recompute", "schedule")
"""Settings of a request that decide what the search otherwise would."""


def reasons(plan: PlanFields) -> Iterator[str]:
    """The sentences; none for a plan without a search behind it."""
    if plan.search is None:
        return
    yield _chosen(plan, plan.search)
    yield _runner_up(plan, plan.search)
    yield {"memory": _memory, "batch": _batch, "devices": _devices}[plan.search.limit](plan)


def _chosen(plan: PlanFields, search: SearchSummary) -> str:
    degrees = [
        text
        for text, degree in (
            (f"{plan.pp} pipeline stages", plan.pp),
            (f"{plan.dp}-way data parallelism", plan.dp),
            (f"{plan.tp}-way tensor parallelism", plan.tp),
        )
        if degree > 1
    ]
    asked = [f"{name}={plan.request[name]}" for name in ASKED if plan.request.get(name) is not None]
    asked += plan.request.get("constraints", ())
    told = f" ({', '.join(asked)} as asked)" if asked else ""
    among = f"the fastest of {search.points} combinations of degrees, micro-batch and ZeRO level"
    if search.points == 1:
        among = "the only combination of degrees, micro-batch and ZeRO level"
    above = plan.step_seconds / plan.bound_seconds - 1 if plan.bound_seconds else 0.0
    proof = f"at most {above:.2%} above the lower bound of {seconds_text(plan.bound_seconds)}"
    if plan.status == "optimal":
        proof = "proven optimal"
    return f"Chosen: {' x '.join(degrees) or 'one device'}{told}, {among}, {proof}."


def _runner_up(plan: PlanFields, search: SearchSummary) -> str:
    other = search.runner_up
    if other is None:
        return "Runner-up: none; the request, the batch and the devices allow no other degrees."
    where = f"mesh(pp={other.pp}, dp={other.dp}, tp={other.tp}), micro-batch {other.micro_batch}, "
    where += zero_text(other.zero, other.offload, other.shard_size)

    def against(seconds: float) -> str:
        return f"{seconds_text(seconds)} ({seconds / plan.step_seconds - 1:+.1%})"

    if other.seconds is None:
        return f"Runner-up: {where}, which takes at least {against(other.bound_seconds)}."
    near = other.bound_seconds >= other.seconds * (1 - 1e-3)
    bound = "" if near else f"; no plan with other degrees takes less than {against(other.bound_seconds)}"
    return f"Runner-up: {where}, in {against(other.seconds)}{bound}."


def _fullest(plan: PlanFields) -> str:
    stage = fullest_stage(plan)
    used, usable = bytes_text(plan.memory_bytes[stage]), bytes_text(plan.usable_bytes[stage])
    return f"stage {stage}, the fullest, takes {used} of {usable}"


def _memory(plan: PlanFields) -> str:
    share = step_breakdown(plan)["recompute"] / plan.step_seconds
    recompute = f", and recompute takes {share:.1%} of the step" if share >= 1e-3 else ""
    return f"Memory limits the plan: {_fullest(plan)}{recompute}."


def _batch(plan: PlanFields) -> str:
    if plan.pp == 1:
        return f"The batch limits the plan: each of {plan.dp} data-parallel ranks has one sample."
    idle = (plan.pp - 1) / (plan.micro_batches + plan.pp - 1)
    one = f"with one sample a rank there are {counted(plan.micro_batches, 'micro-batch')}"
    return f"The batch limits the plan: {one}, and the bubble of {plan.pp} stages is {idle:.1%} of the step."


def _devices(plan: PlanFields) -> str:
    parts = step_breakdown(plan)
    moved = sum(parts[name] for name in ("communication", "p2p", "gradient sync"))
    compute, comm = parts["compute"] / plan.step_seconds, moved / plan.step_seconds
    shares = f"{compute:.1%} of the step is compute, {comm:.1%} communication and optimizer"
    return f"The number of devices limits the plan: {shares}; {_fullest(plan)}."
