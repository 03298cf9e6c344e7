"""What to change where no plan fits: the smallest changes that were tried and give a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

from autopart.cost.training_state import OPTIMIZER_STATES
from autopart.errors import PartitionError
from autopart.hardware import DEVICES
from autopart.hardware.mesh import Mesh, divisors
from autopart.ir.layered_graph import LayeredGraph
from autopart.planner.branch_and_bound import Search, silent
from autopart.planner.request import Request
from autopart.planner.search_space import SearchSpace

Fold = Callable[[Mesh, str], LayeredGraph]
"""The folded graph of the model on a mesh, with parameters of a dtype."""

TOLD = 2
"""So many ways out are told."""

Try = tuple[str, Mesh, Request]


def advice(space: SearchSpace, fold: Fold, plans: Callable[[Mesh, Request], object]) -> str:
    """The first changes after which there is a plan that fits, each found by searching again, then by `plans`, which
    raises PartitionError where the graph that would run does not fit; "" if there are none."""
    fits = (
        text
        for text, mesh, request in _changes(space)
        if _fits(space, mesh, request, fold) and _planned(plans, mesh, request)
    )
    found = list(islice(fits, TOLD))
    return f"what fits: {', or '.join(found)}" if found else ""


def _fits(space: SearchSpace, mesh: Mesh, request: Request, fold: Fold) -> bool:
    """Whether any plan fits after a change; what does not change is taken over."""
    try:
        request = request.check(mesh)
        same = mesh.device == space.mesh.device and request.precision == space.request.precision
        layered = space.layered if same else fold(mesh, request.precision)
        tables = same and ((request.tp or 1) > 1) == ((space.request.tp or 1) > 1)
        models = space.models if tables else {}
        Search(SearchSpace(layered, mesh, request, models), silent).run()
    except PartitionError:
        return False
    return True


def _planned(plans: Callable[[Mesh, Request], object], mesh: Mesh, request: Request) -> bool:
    try:
        plans(mesh, request)
    except PartitionError:
        return False
    return True


def _changes(space: SearchSpace) -> Iterator[Try]:
    """What may be changed, the smallest change first; the first plan that fits is enough."""
    mesh, request = space.mesh, replace(space.request, nodes=0)
    if request.recompute not in (None, "full"):
        yield 'recompute="full"', mesh, replace(request, recompute="full")
    if request.zero is not None and request.zero < 3:
        yield "zero=3", mesh, replace(request, zero=3)
    if request.micro_batch:
        for size in reversed(divisors(request.micro_batch)[:-1]):
            yield f"micro_batch={size}", mesh, replace(request, micro_batch=size)
    fixed = dict(mesh.axes)
    free = replace(request, pp=fixed.get("pp"), dp=fixed.get("dp"), tp=fixed.get("tp"))
    if free != request:
        yield "other degrees", mesh, free
    for constraint in request.constraints:
        left = tuple(c for c in request.constraints if c != constraint)
        yield f"without {constraint.text!r}", mesh, replace(request, constraints=left)
    if request.precision in ("float64", "float32") and "bfloat16" in mesh.device.flops:
        yield 'precision="bfloat16"', mesh, replace(request, precision="bfloat16")
    if OPTIMIZER_STATES[request.optimizer]:
        yield 'optimizer="sgd"', mesh, replace(request, optimizer="sgd")
    if not mesh.axes:
        yield from _machines(mesh, request)


def _machines(mesh: Mesh, request: Request) -> Iterator[Try]:
    """Larger meshes of the same devices, with the degrees left open but for what is asked for, and
    larger devices, the first in the table of each size."""
    open_ = replace(request, dp=None) if request.pp and request.tp and request.dp else request
    for times in (2, 4, 8):
        inside = mesh.hosts == 1 and mesh.devices_per_host * times <= 8
        name = "devices_per_host" if inside else "hosts"
        more = replace(mesh, **{name: getattr(mesh, name) * times})
        yield f"{more.size} devices ({more})", more, open_
    able = [d for d in DEVICES.values() if request.precision in d.flops and d.name != "cpu"]
    sizes = {d.memory_bytes: d for d in reversed(able) if d.memory_bytes > mesh.device.memory_bytes}
    for size in sorted(sizes):
        other = Mesh.usual(mesh.hosts, mesh.devices_per_host, sizes[size])
        yield str(other), other, request
