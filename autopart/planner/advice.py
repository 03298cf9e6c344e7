"""Where nothing fits: the smallest changes of the request or the mesh with which a plan fits, found by searching."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

from autopart.cost.training_state import OPTIMIZER_STATES
from autopart.errors import PartitionError
from autopart.hardware import DEVICES
from autopart.hardware.mesh import Mesh, divisors
from autopart.hardware.mixed import changed
from autopart.ir.layered_graph import LayeredGraph
from autopart.planner.branch_and_bound import Search
from autopart.planner.progress import silent
from autopart.planner.request import Request
from autopart.planner.search_space import SearchSpace

Layered = Callable[[Mesh, str], LayeredGraph]
"""The layered graph of the model on a mesh, with parameters of a dtype."""

SUGGESTIONS = 2
"""Changes that the error names at most."""

Try = tuple[str, Mesh, Request]


def advice(space: SearchSpace, layered_of: Layered, plans: Callable[[SearchSpace], object]) -> str:
    """The first changes with which a plan fits, as text; "" if there are none. A change has to pass a search, then
    `plans`, which gets the space that was searched and raises PartitionError where the graph that would run does not
    fit."""
    fits = (
        text
        for text, mesh, request in _changes(space)
        if (changed := _fitting(space, mesh, request, layered_of)) and _planned(plans, changed)
    )
    found = list(islice(fits, SUGGESTIONS))
    return f"what fits: {', or '.join(found)}" if found else ""


def _fitting(space: SearchSpace, mesh: Mesh, request: Request, layered_of: Layered) -> SearchSpace | None:
    """The space after a change if it has a plan that fits, else None; graph and tables are reused where the change
    leaves them as they are."""
    try:
        request = request.check(mesh)
        same = mesh.device == space.mesh.device and request.precision == space.request.precision
        layered = space.layered if same else layered_of(mesh, request.precision)
        tables = same and ((request.tp or 1) > 1) == ((space.request.tp or 1) > 1)
        models = space.models if tables else {}
        changed = SearchSpace(layered, mesh, request, models)
        Search(changed, silent).run()
    except PartitionError:
        return None
    return changed


def _planned(plans: Callable[[SearchSpace], object], space: SearchSpace) -> bool:
    try:
        plans(space)
    except PartitionError:
        return False
    return True


def _changes(space: SearchSpace) -> Iterator[Try]:
    """The changes to try, the smallest first. With nodes=0 a search stops at its first plan."""
    mesh, request = space.mesh, replace(space.request, nodes=0)
    if request.recompute not in (None, "full"):
        yield 'recompute="full"', mesh, replace(request, recompute="full")
    if request.zero is not None and request.zero < 3:
        yield "zero=3", mesh, replace(request, zero=3)
    if request.shard_size:
        yield "without shard_size", mesh, replace(request, shard_size=None)
    if request.offload == "none" and mesh.device.host:
        yield 'offload="optimizer"', mesh, replace(request, offload="optimizer")
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


def _larger(name: str, times: int, mesh: Mesh) -> Mesh:
    """A mesh of equal devices with `times` as many hosts, or as many devices on each."""
    number: dict[str, Any] = {name: getattr(mesh, name) * times}
    return replace(mesh, **number)


def _machines(mesh: Mesh, request: Request) -> Iterator[Try]:
    """Meshes of 2, 4 and 8 times as many devices, with dp left open if all degrees are asked for; then devices of more
    memory, of each size the first in the table."""
    open_ = replace(request, dp=None) if request.pp and request.tp and request.dp else request
    for times in (2, 4, 8):
        inside = mesh.hosts == 1 and mesh.devices_per_host * times <= 8
        name = "devices_per_host" if inside else "hosts"
        more = changed(mesh, partial(_larger, name, times))
        yield f"{more.size} devices ({more})", more, open_
    able = [d for d in DEVICES.values() if request.precision in d.flops and d.name != "cpu"]
    sizes = {d.memory_bytes: d for d in reversed(able) if d.memory_bytes > mesh.device.memory_bytes}
    for size in sorted(sizes):
        other = Mesh.usual(mesh.hosts, mesh.devices_per_host, sizes[size])
        yield str(other), other, request
