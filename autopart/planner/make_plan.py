"""A request -> a plan: trace, search, write out.

The search runs on one graph, of two samples or of the whole batch, for micro-batches of any size. If the graph of the
chosen micro-batch differs, the plan is made again from the graph of the chosen micro-batch."""

import time
from contextlib import suppress
from dataclasses import replace
from typing import Unpack

from torch import nn

from autopart.cost.compute import peak
from autopart.errors import PartitionError, not_known
from autopart.frontend.batch import DTYPES, Batch, samples_of
from autopart.frontend.batch_norms import batch_norms
from autopart.frontend.inputs import check_inputs, main_dtype
from autopart.hardware.mesh import Mesh
from autopart.ir.gc_pause import paused
from autopart.ir.layered_graph import LayeredGraph
from autopart.passes.source import Source
from autopart.plan.data import Plan
from autopart.planner.advice import advice
from autopart.planner.branch_and_bound import Search
from autopart.planner.candidate import SearchResult
from autopart.planner.progress import OnProgress, silent
from autopart.planner.request import Request, Settings, read_constraints, read_settings
from autopart.planner.search_space import SearchSpace
from autopart.planner.summarize import summarize
from autopart.planner.validate import strategy_findings
from autopart.planner.write_plan import bounded, write_out


def request_of(model: nn.Module, batch: Batch, **settings: Unpack[Settings]) -> Request:
    """The settings as a request; global_batch defaults to the batch's samples, precision to the model's dtype. Raises
    PartitionError for a model, a batch or a setting for which there can be no plan."""
    check_inputs(model, batch)
    precision = str(settings.get("precision") or main_dtype(model)).removeprefix("torch.")
    if precision not in DTYPES:
        raise not_known("precision", precision, DTYPES)
    trained = [n for n, p in model.named_parameters() if p.requires_grad and p.is_complex()]
    if settings.get("master") and trained:
        raise PartitionError(f"{trained[0]} is complex", "a master copy of it would be of real numbers", "master=None")
    given = settings.get("global_batch")
    samples = samples_of(batch) if given is None else given
    return read_settings({**settings, "global_batch": samples, "precision": precision})


def make_plan(
    source: Source,
    mesh: Mesh,
    request: Request,
    on_progress: OnProgress = silent,
    to_run: bool = False,
    advise: bool = True,
    space: SearchSpace | None = None,
) -> Plan:
    """`autopart.plan` for a source, which may be traced already. Raises PartitionError where nothing fits.

    to_run  make the plan for a graph in which every block was traced, not samples of equal blocks
    advise  where nothing fits, search for the smallest changes that do, and name them in the error
    space   the space of the request, where it was searched before

    If the chosen micro-batch does not fit in its own graph, others are tried.
    """
    started = time.monotonic()
    made, search, _ = explored(source, mesh, request, on_progress, advise, space)
    planned = search.space.layered
    layered = (source.full if to_run else source.sampled)(made.micro_batch, mesh)
    if layered.hash == planned.hash and not any(strategy_findings(made, layered)):
        return made
    try:
        return _plan_again(layered, made, search, on_progress, started)
    except PartitionError:
        if request.micro_batch:
            raise
        others = read_constraints(f"micro_batch!={made.micro_batch}")
        with suppress(PartitionError):
            other = replace(request, constraints=(*request.constraints, *others))
            plan = make_plan(source, mesh, other, on_progress, to_run, advise=False)
            bound = min(plan.bound_seconds, made.bound_seconds)
            return bounded(replace(plan, request=made.request), bound)
        raise


def _plan_again(layered: LayeredGraph, made: Plan, search: Search, on_progress: OnProgress, started: float) -> Plan:
    """The plan of a micro-batch from its own graph, where that differs from the graph of two samples, or lacks its
    strategies. With one sample `expand` is no operator and the batch dim has other strategies; a model's code may
    depend on the number of samples; a dim of size 2 may seem to count samples."""
    space = SearchSpace(layered, made.mesh, replace(search.space.request, micro_batch=made.micro_batch))
    found = Search(space, on_progress).run()
    found = replace(found, bound=min(found.bound, made.bound_seconds))
    return replace(write_out(space, found, started, made.model), request=made.request, search=made.search)


@paused()
def explored(
    source: Source,
    mesh: Mesh,
    request: Request,
    on_progress: OnProgress = silent,
    advise: bool = True,
    space: SearchSpace | None = None,
) -> tuple[Plan, Search, SearchResult]:
    """A plan from the graph of two samples, with the search that found it and its result. A loss that is no mean over
    samples is traced with the whole micro-batch: its graph may depend on the number of samples. What most likely takes
    the whole batch in one micro-batch is traced so at first, and once."""
    started = time.monotonic()
    request = request.check(mesh)
    peak(mesh.device, source.dtype)
    few, whole = min(2, request.global_batch), request.micro_batch or request.global_batch
    layered = source.sampled(whole if whole > few and _takes_all(source, mesh, request) else few, mesh)
    if not layered.traced.mean_of_samples:
        layered = source.sampled(whole, mesh)
    if layered.traced.updated and request.recompute not in (None, "none"):
        raise PartitionError(
            f"the forward pass changes {layered.traced.updated[0]}",
            "recompute would change it twice a step",
            'recompute="none"',
        )
    if space is None or space.layered is not layered or space.request != request:
        space = SearchSpace(layered, mesh, request)
    return _searched(space, on_progress, started, source, advise)


def _takes_all(source: Source, mesh: Mesh, request: Request) -> bool:
    """Whether a plan most likely takes the whole batch in one micro-batch: for a batch norm mixes its samples, or there
    is a device for every sample."""
    return any(batch_norms(source.model)) or (request.micro_batch is None and request.global_batch <= mesh.size)


def _searched(
    space: SearchSpace, on_progress: OnProgress, started: float, source: Source, advise: bool
) -> tuple[Plan, Search, SearchResult]:
    search = Search(space, on_progress)
    try:
        found = search.run()
    except PartitionError as error:
        if search.shortfall is None or not advise:
            raise

        def of(dtype: str) -> Source:
            wanted = DTYPES[dtype]
            return source if wanted == source.dtype else Source(source.model, source.batch, wanted, source.no_fuse)

        suggestion = advice(
            space,
            lambda mesh, dtype: of(dtype).sampled(2, mesh),
            lambda changed: make_plan(
                of(changed.request.precision), changed.mesh, changed.request, advise=False, space=changed
            ),
        )
        raise PartitionError(error.what, error.why, suggestion or error.try_) from None
    found = replace(found, summary=summarize(search, found))
    return write_out(space, found, started, type(source.model).__name__), search, found
