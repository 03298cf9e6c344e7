"""The straight line from a model to a program: trace, simplify, fuse, annotate, fold, plan, localise, emit, load."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from autopart.advice import advice
from autopart.collector import paused
from autopart.cost import peak
from autopart.errors import PartitionError, not_known
from autopart.estimates import Estimate
from autopart.folded import Folded
from autopart.graph import Traced, info, show, verify
from autopart.inputs import check_inputs, main_dtype
from autopart.mesh import Mesh
from autopart.passes.annotate import annotate_costs
from autopart.passes.draw import draw
from autopart.passes.emit import emit
from autopart.passes.fold import fold
from autopart.passes.fuse import fuse
from autopart.passes.localise import localise
from autopart.passes.repeat import repeat
from autopart.passes.simplify import simplify
from autopart.passes.trace import trace
from autopart.plan import Plan
from autopart.planner import Found, Say, Search, silent
from autopart.report import bounded, write_out
from autopart.request import Request, read_constraints, read_settings
from autopart.runtime.compiled import Compiled, Program
from autopart.runtime.executor import Message
from autopart.runtime.groups import Groups, make_groups, start_processes
from autopart.runtime.simulated import run_simulated
from autopart.runtime.watchdog import start_watchdog
from autopart.schedules import instructions
from autopart.schedules import verify as verify_schedule
from autopart.shortened import Shortened, Unlike, longer, shortenable
from autopart.space import Space
from autopart.stages import StageGraph
from autopart.validate import choices_of, validate

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Batch = Mapping[str, Any]
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def plan(
    model: nn.Module,
    mesh: str | Mesh | DeviceMesh,
    batch: Batch,
    *,
    global_batch: int | None = None,
    micro_batch: int | None = None,
    pp: int | None = None,
    tp: int | None = None,
    dp: int | None = None,
    zero: int | None = None,
    recompute: str | None = None,
    schedule: str | None = None,
    precision: str | torch.dtype | None = None,
    master: str | None = None,
    optimizer: str = "adamw",
    time_limit: float | None = None,
    nodes: int | None = None,
    exact: bool = False,
    constraints: Sequence[str] = (),
    say: Say = silent,
) -> Plan:
    """Find the fastest way to train `model` on `mesh` that fits its memory. Needs no devices and no memory: the model
    may be on meta.

    model         any nn.Module whose forward takes `batch` and returns a loss (alone, as `.loss`, or first)
    mesh          "hosts x devices:device", as "4x8:h100-80gb"; a Mesh; or a DeviceMesh, whose axes pp, dp, tp are kept
    batch         the model's keyword arguments, samples in dim 0 of every tensor
    global_batch  samples of a step (default: those of `batch`);  micro_batch: of a micro-batch, over all ranks
    pp, tp, dp    degrees, where you want to decide them; so for zero (0 to 3), recompute ("none", "selective", "full":
                  in all blocks), schedule ("gpipe", "1f1b") and precision (of the parameters: "float32", "bfloat16",
                  "float64", "float16")
    master        dtype ("float32" with a precision of 16 bits) in which gradients add up and the optimizer keeps its
                  states and a copy of the parameters, from which they are written back; None: all in `precision`
    optimizer     for its memory: "sgd", "momentum", "adam", "adamw", ...
    time_limit    seconds after which the best plan so far is taken;  nodes: points of the search likewise
    exact         whether a small model's splits are refined to the optimum: every range of its blocks is solved by
                  itself under real bytes, which takes minutes; otherwise only where memory binds and the gap is worth
                  it, within a limit
    constraints   what to fix or forbid by hand: "tp=8", "stage 2 starts at layers.10", "no cut before layers.3",
                  "split layers.*.up_proj.weight dim 0 over tp", ... (see autopart/constraints.py); the plan is proven
                  against all that do as they say
    say           is told how far the search is: the best plan's time, the bound, the gap

    Raises PartitionError for a model that cannot be traced, a batch that does not divide, a mesh that is too small.
    """
    request = request_of(
        model,
        batch,
        global_batch=global_batch,
        micro_batch=micro_batch,
        pp=pp,
        tp=tp,
        dp=dp,
        zero=zero,
        recompute=recompute,
        schedule=schedule,
        precision=precision,
        master=master,
        optimizer=optimizer,
        time_limit=time_limit,
        nodes=nodes,
        exact=exact,
        constraints=constraints,
    )
    return make_plan(Source(model, batch, DTYPES[request.precision]), Mesh.of(mesh), request, say)


def estimate(model: nn.Module, mesh: str | Mesh | DeviceMesh, batch: Batch, **settings: Any) -> Estimate:
    """What the configuration in `settings` (see `plan`) would cost, whether it fits or not."""
    request = request_of(model, batch, **settings)
    source = Source(model, batch, DTYPES[request.precision])
    return Estimate.of(make_plan(source, Mesh.of(mesh), replace(request, must_fit=False)))


def compile(
    model: nn.Module,
    mesh: str | Mesh | DeviceMesh,
    batch: Batch,
    *,
    plan: Plan | None = None,
    seed: int | None = None,
    **settings: Any,
) -> Compiled:
    """Plan (unless a `plan` is given), emit this rank's module, load the model's weights into it.

    Dropout and other random numbers depend on `seed` (default: torch's, of rank 0), the step and the place in the whole
    batch, not on the plan.

    To be called by every process; `settings` are those of `autopart.plan`. Rank 0 plans for all. Raises PartitionError
    as `plan` does, and where the processes are not as many as the mesh, the plan is for another model, or the model
    does what training cannot yet reproduce on several ranks.
    """
    mesh = Mesh.of(mesh)
    check_plan(plan, mesh)
    start_processes(mesh.size)
    say = settings.pop("say", silent)
    request = request_of(model, batch, **settings)
    source = Source(model, batch, DTYPES[plan.precision if plan else request.precision])
    if plan is None and request.micro_batch and dist.is_initialized() and dist.get_rank():
        with suppress(PartitionError):  # which rank 0 raises for all
            source.at(request.micro_batch, mesh)
    plan, seed = _agreed(plan, seed, lambda: make_plan(source, mesh, request, say, to_run=True))
    folded = source.at(plan.micro_batch, plan.mesh)
    validate(plan, folded)
    _check_trainable(model)
    groups = make_groups(plan.pp, plan.dp, plan.tp)
    groups.draws.seed = seed
    (program,) = programs(folded, plan, [groups.pp.rank])
    compiled = Compiled(model, plan, groups, program, folded.traced.aliases, folded.traced.buffers)
    if "MASTER_ADDR" in os.environ:
        start_watchdog(lambda: compiled.executor.doing)
    return compiled


def check_plan(plan: Any, mesh: Mesh) -> None:
    """Raise PartitionError for a plan that is none, or is for other ranks."""
    if plan is not None and not isinstance(plan, Plan):
        raise PartitionError(f"plan={plan!r} is no Plan", try_='autopart.Plan.load("plan.json")')
    if plan is not None and plan.mesh.size != mesh.size:
        raise PartitionError(f"the plan is for {plan.mesh.size} ranks, the mesh has {mesh.size}")


@dataclass(frozen=True)
class Simulated:
    """One step of a plan on simulated ranks: the loss of the whole batch, every parameter's gradient, whole, and the
    state dict after it (weights unchanged, buffers as the forward pass left them)."""

    plan: Plan
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]


def simulate(
    model: nn.Module,
    mesh: str | Mesh | DeviceMesh,
    batch: Batch,
    *,
    plan: Plan | None = None,
    seed: int | None = None,
    **settings: Any,
) -> Simulated:
    """One step with all ranks as threads of this process, on the CPU: what `compile` would run there, to check a plan
    without its devices. Raises PartitionError as `compile` does."""
    mesh = Mesh.of(mesh)
    check_plan(plan, mesh)
    request = request_of(model, batch, **settings)
    source = Source(model, batch, DTYPES[plan.precision if plan else request.precision])
    return simulate_plan(source, plan or make_plan(source, mesh, request, to_run=True), seed)


def simulate_plan(source: Source, plan: Plan, seed: int | None = None) -> Simulated:
    """`simulate` of a plan for a model that is traced already."""
    folded = source.at(plan.micro_batch, plan.mesh)
    validate(plan, folded)
    _check_trainable(source.model)
    stages = programs(folded, plan)

    def one(groups: Groups) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        groups.draws.seed = torch.initial_seed() if seed is None else seed
        stage = stages[groups.pp.rank]
        compiled = Compiled(source.model, plan, groups, stage, folded.traced.aliases, folded.traced.buffers)
        loss = compiled.step(source.batch)
        return loss, compiled.full_gradients(), compiled.full_state_dict()

    results = run_simulated(plan.pp, plan.dp, plan.tp, one)
    return Simulated(plan, *results[0])


def programs(folded: Folded, plan: Plan, indices: Iterable[int] | None = None) -> list[Program]:
    """What the stages (those of `indices`, else all) run."""
    stages = stage_graphs(folded, plan)
    messages = [Message(c.name, c.producer, c.consumers, c.shape, c.dtype, c.grad) for s in stages for c in s.sent]
    edges = sorted({(m.producer, to) for m in messages for to in m.consumers})
    lists = instructions(plan.schedule, plan.pp, plan.micro_batches, edges)
    verify_schedule(lists)
    tied, axes = _tied(stages), _sample_axes(folded, plan)
    wanted = range(plan.pp) if indices is None else indices
    return [
        Program(emit_stage(stages[i], plan, folded.traced.classes), i, lists[i], messages, tied, axes) for i in wanted
    ]


def emit_stage(stage: StageGraph, plan: Plan, classes: Mapping[str, str]) -> str:
    """The source text of one stage of a plan; `classes` as in `Traced`."""
    modes = plan.stages[stage.index].recompute
    return emit(stage, plan.pp, plan.model, plan.degrees, modes, plan.zero >= 3, plan.master, classes)


def sources(model: nn.Module, batch: Batch, plan: Plan) -> list[str]:
    """The source text of every stage."""
    folded = Source(model, batch, DTYPES[plan.precision]).at(plan.micro_batch, plan.mesh)
    validate(plan, folded)
    return [emit_stage(stage, plan, folded.traced.classes) for stage in stage_graphs(folded, plan)]


def stage_graphs(folded: Folded, plan: Plan) -> list[StageGraph]:
    """Every stage's graph under a plan."""
    return localise(folded, choices_of(plan))


def request_of(
    model: nn.Module,
    batch: Batch,
    *,
    global_batch: int | None = None,
    precision: str | torch.dtype | None = None,
    constraints: Sequence[str] = (),
    **settings: Any,
) -> Request:
    """The settings of `plan` as data. Raises PartitionError for a model, a batch or a setting that no plan can be made
    for."""
    check_inputs(model, batch)
    name = str(precision or main_dtype(model)).removeprefix("torch.")
    if name not in DTYPES:
        raise not_known("precision", name, DTYPES)
    trained = [n for n, p in model.named_parameters() if p.requires_grad and p.is_complex()]
    if settings.get("master") and trained:
        raise PartitionError(f"{trained[0]} is complex", "a master copy of it would be of real numbers", "master=None")
    samples = samples_of(batch) if global_batch is None else global_batch
    return read_settings({**settings, "global_batch": samples, "precision": name, "constraints": constraints})


def samples_of(batch: Batch) -> int:
    """The size of dim 0, which every tensor of a batch shares. Raises PartitionError."""
    tensors = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}
    if flat := [k for k, v in tensors.items() if not v.dim()]:
        raise PartitionError(
            f"batch[{flat[0]!r}] has no dims", "samples are in dim 0 of every tensor", "a Python number"
        )
    sizes = {k: v.shape[0] for k, v in tensors.items()}
    if len(set(sizes.values())) != 1:
        raise PartitionError("the batch has no common size", f"samples in dim 0: {sizes}", "equal sizes in dim 0")
    (samples,) = set(sizes.values())
    if samples == 0:
        raise PartitionError("the batch has no samples", f"samples in dim 0: {sizes}", "at least one sample")
    return samples


def take(batch: Batch, samples: int) -> dict[str, Any]:
    """The batch with `samples` samples: its first, again from the start where it has too few."""
    index = torch.arange(samples, device="cpu") % samples_of(batch)
    return {
        k: v[index.to(v.device)] if isinstance(v, torch.Tensor) and v.device.type != "meta"
        else v[:1].expand(samples, *v.shape[1:]) if isinstance(v, torch.Tensor)
        else v
        for k, v in batch.items()
    }  # fmt: skip


def outline(batch: Batch, samples: int) -> dict[str, Any]:
    """A batch of `samples` samples on meta: what a trace looks at."""
    samples_of(batch)
    return {
        k: torch.empty((samples, *v.shape[1:]), dtype=v.dtype, device="meta") if isinstance(v, torch.Tensor) else v
        for k, v in batch.items()
    }


@dataclass
class Source:
    """A model with its batch, traced once for every micro-batch size and kind of device that is asked for."""

    model: nn.Module
    batch: Batch
    dtype: torch.dtype
    prepared: dict[tuple[int, str], Folded] = field(default_factory=dict)
    planned: dict[tuple[int, str], Folded] = field(default_factory=dict)
    """Those of which only the first of equal blocks were traced."""

    def at(self, samples: int, mesh: Mesh) -> Folded:
        """The folded graph of a micro-batch of `samples`."""
        key = samples, mesh.device.type
        if key not in self.prepared:
            with paused():
                self.prepared[key] = self._traced(samples, mesh)
        return self.prepared[key]

    def short(self, samples: int, mesh: Mesh) -> Folded:
        """The same to plan with, whose graph has only the first of equal blocks where they stand for all."""
        key = samples, mesh.device.type
        if key not in self.planned:
            with paused():
                self.planned[key] = self._shortest(samples, mesh)
        return self.planned[key]

    def like(self, plan: Plan) -> Folded:
        """The smallest graph that a plan is for. Raises PartitionError where it is for none of this model's."""
        sizes = sorted({min(2, plan.micro_batch), plan.micro_batch})
        for folded in (self.short(samples, plan.mesh) for samples in sizes):
            if plan.signature.hash == folded.hash:
                return folded
        folded = self.at(plan.micro_batch, plan.mesh)
        plan.check(folded)
        return folded

    def _traced(self, samples: int, mesh: Mesh, shortened: Sequence[Shortened] = ()) -> Folded:
        """What samples do with each other is told by two of them: one has nobody to do it with."""
        folded = prepare(self.model, outline(self.batch, samples), mesh, self.dtype, shortened)
        several = self.planned.get((2, mesh.device.type))
        if samples == 1 and several is not None:
            folded.traced.mixed_at = several.traced.mixed_at
        return folded

    def _shortest(self, samples: int, mesh: Mesh) -> Folded:
        """With as many lists shortened as can be; where the model does not run so, the longest alone, then none."""
        shortened = shortenable(self.model)
        walked: dict[str, str] = {}
        while shortened:
            try:
                folded = self._traced(samples, mesh, shortened)
                return replace(folded, walked="; ".join(walked.values()))
            except Unlike as unlike:
                shortened, path = longer(shortened, unlike.short), unlike.short.path
                if all(short.path != path for short in shortened):
                    walked[path] = str(unlike)
            except PartitionError as error:
                most = max(short.blocks for short in shortened)
                rest = tuple(short for short in shortened if short.blocks == most)
                lost = shortened if rest == shortened else [short for short in shortened if short not in rest]
                walked |= {short.path: f"{short.path}: {error.what} ({error.why})" for short in lost}
                shortened = () if rest == shortened else rest
        full = self.at(samples, mesh)
        return replace(full, walked="; ".join(walked.values())) if walked else full


def prepare(
    model: nn.Module, batch: Batch, mesh: Mesh, dtype: torch.dtype, shortened: Sequence[Shortened] = ()
) -> Folded:
    """Trace to fold, each pass verified and, if AUTOPART_DUMP names a folder, written there. Raises Unlike where the
    first blocks of a list in `shortened` do not stand for all."""
    traced = _pass("trace", None, lambda: trace(model, batch, dtype, shortened))
    _pass("simplify", traced, lambda: simplify(traced))
    _pass("draw", traced, lambda: draw(traced))
    _pass("fuse", traced, lambda: fuse(traced))
    _pass("annotate", traced, lambda: annotate_costs(traced, mesh.device.type))
    return repeat(fold(traced), shortened)


def _pass(name: str, before: Traced | None, run: Callable[[], Traced]) -> Traced:
    folder = os.environ.get("AUTOPART_DUMP")
    if not folder:
        return run()
    old = show(before.graph) if before else ""
    started = time.monotonic()
    traced = run()
    taken = time.monotonic() - started
    verify(traced.graph)
    new = show(traced.graph)
    Path(folder).mkdir(parents=True, exist_ok=True)
    number = len(list(Path(folder).glob("*.txt")))
    mark = " (unchanged)" if new == old else ""
    (Path(folder) / f"{number:03d}_{name}.txt").write_text(f"# {name}: {taken:.3f} s{mark}\n{new}\n")
    return traced


def make_plan(
    source: Source, mesh: Mesh, request: Request, say: Say = silent, to_run: bool = False, advise: bool = True
) -> Plan:
    """`plan` for a model that may be traced already. It is for the graph of its own micro-batch; one `to_run` is of the
    graph whose every block was traced. Where a micro-batch that seemed to fit does not in its own graph, others are
    tried. Where nothing fits, what would is looked for if it is to `advise`."""
    started = time.monotonic()
    made, search, _ = explored(source, mesh, request, say, advise)
    planned = search.space.folded
    folded = (source.at if to_run else source.short)(made.micro_batch, mesh)
    if folded.hash == planned.hash:
        return made
    try:
        return _made_for(folded, made, search, say, started)
    except PartitionError:
        if request.micro_batch:
            raise
        others = read_constraints(f"micro_batch!={made.micro_batch}")
        with suppress(PartitionError):
            other = replace(request, constraints=(*request.constraints, *others))
            plan = make_plan(source, mesh, other, say, to_run, advise=False)
            bound = min(plan.bound_seconds, made.bound_seconds)
            return bounded(replace(plan, request=made.request), bound)
        raise


def _made_for(folded: Folded, made: Plan, search: Search, say: Say, started: float) -> Plan:
    """A plan's micro-batch planned anew from the trace that runs, where that is another graph than the one that was
    planned: an `expand` to one sample is nothing, the strategies of a dim of one element have other names, and a model
    may do what it likes with the number of samples."""
    space = Space(folded, made.mesh, replace(search.space.request, micro_batch=made.micro_batch))
    found = Search(space, say).run()
    found = replace(found, bound=min(found.bound, made.bound_seconds))
    return replace(write_out(space, found, started, made.model), request=made.request)


@paused()
def explored(
    source: Source, mesh: Mesh, request: Request, say: Say = silent, advise: bool = True
) -> tuple[Plan, Search, Found]:
    """The plan from a trace of two samples, where samples do nothing with each other, and the search that found it."""
    started = time.monotonic()
    request = request.check(mesh)
    peak(mesh.device, source.dtype)
    folded = source.short(min(2, request.global_batch), mesh)
    if not folded.traced.mean_of_samples:  # what samples do with each other may depend on how many there are
        folded = source.short(request.micro_batch or request.global_batch, mesh)
    if folded.traced.updated and request.recompute not in (None, "none"):
        raise PartitionError(
            f"the forward pass changes {folded.traced.updated[0]}",
            "recompute would change it twice a step",
            'recompute="none"',
        )
    return _searched(Space(folded, mesh, request), say, started, source, advise)


def _searched(space: Space, say: Say, started: float, source: Source, advise: bool) -> tuple[Plan, Search, Found]:
    search = Search(space, say)
    try:
        found = search.run()
    except PartitionError as error:
        if search.short is None or not advise:
            raise

        def of(dtype: str) -> Source:
            wanted = DTYPES[dtype]
            return source if wanted == source.dtype else Source(source.model, source.batch, wanted)

        way_out = advice(
            space,
            lambda mesh, dtype: of(dtype).short(2, mesh),
            lambda mesh, request: make_plan(of(request.precision), mesh, request, advise=False),
        )
        raise PartitionError(error.what, error.why, way_out or error.try_) from None
    return write_out(space, found, started, type(source.model).__name__), search, found


def _agreed(given: Plan | None, seed: int | None, make: Callable[[], Plan]) -> tuple[Plan, int]:
    """Rank 0's plan and seed, on every rank; its error too."""
    seed = torch.initial_seed() if seed is None else seed
    if not dist.is_initialized():
        return given or make(), seed
    box: list[Any] = [None, seed]
    if dist.get_rank() == 0:
        try:
            box[0] = (given or make()).to_json()
        except PartitionError as error:
            box[0] = (error.what, error.why, error.try_)
    dist.broadcast_object_list(box, 0)
    if isinstance(box[0], tuple):
        raise PartitionError(*box[0])
    return Plan.from_json(box[0]), box[1]


def _check_trainable(model: nn.Module) -> None:
    if any(p.is_meta for p in model.parameters()):
        raise PartitionError(
            "the model is on the meta device", "it has shapes but no weights to train", "build it on the CPU"
        )


def _tied(stages: list[StageGraph]) -> dict[str, tuple[int, ...]]:
    """Parameters that live on several stages -> those stages."""
    where: dict[str, list[int]] = {}
    for stage in stages:
        for node in stage.graph.nodes:
            if node.op == "placeholder" and info(node).kind == "parameter":
                where.setdefault(info(node).name, []).append(stage.index)
    return {name: tuple(at) for name, at in where.items() if len(at) > 1}


def _sample_axes(folded: Folded, plan: Plan) -> tuple[str, ...]:
    """The axes over which a batch's samples are split."""
    inputs = [n for n in folded.representatives() if info(n).kind == "input"]
    return tuple(
        axis
        for axis, size in (("dp", plan.dp), ("tp", plan.tp))
        if size > 1 and inputs and plan.splits[0][axis][folded.keys[inputs[0]]].outputs[0].kind == "S"
    )
