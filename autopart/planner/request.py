"""The settings of `autopart.plan`: their types and help texts (`Settings`), read and checked (`Request`)."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, SupportsIndex, TypedDict, get_args, get_type_hints

import torch

from autopart.cost.liveness import MODES
from autopart.cost.offload import OFFLOADS
from autopart.cost.training_state import MASTERS, OPTIMIZER_STATES, widening
from autopart.errors import PartitionError, closest, not_known
from autopart.hardware.mesh import Mesh, divisors
from autopart.hardware.rows import Device
from autopart.passes.solve import HIGHS
from autopart.plan.schedules import SCHEDULES
from autopart.plan.typecheck import mistyped
from autopart.planner.constraint_text import parse
from autopart.planner.constraints import Constraint

MIB = 2**20
PREFETCH_SHARE = 1 / 16
"""Share of a device's memory that weights gathered ahead may take unless told otherwise."""

MAX_INTEGER = 2**31 - 1
"""The largest whole number of a setting: sizes of tensors and messages are products of them."""


class Settings(TypedDict, total=False):
    """What every function that plans takes as keywords, each with the help text of its option in the shell. None leaves
    the choice to the planner. It is the default of all but `optimizer` ("adamw"), `exact` (False), `solver` ("highs"),
    `no_fuse` and `constraints` (none)."""

    global_batch: Annotated[int | None, "samples of a step (default: those of the batch)"]
    micro_batch: Annotated[int | None, "samples of a micro-batch, over all ranks"]
    pp: Annotated[int | None, "pipeline-parallel degree"]
    tp: Annotated[int | None, "tensor-parallel degree"]
    dp: Annotated[int | None, "data-parallel degree"]
    zero: Annotated[int | None, "ZeRO level: 0, 1, 2 or 3"]
    shard_size: Annotated[
        int | None, "data-parallel ranks that ZeRO divides among, as those of a host; others have the same shares"
    ]
    prefetch: Annotated[
        int | None,
        "the most MiB of weights that a rank gathers ahead at ZeRO 3 (default: a 16th of a GPU's memory; on CPUs 0)",
    ]
    recompute: Annotated[str | None, "activation checkpointing of all blocks: none, selective, mincut or full"]
    schedule: Annotated[str | None, "gpipe or 1f1b"]
    precision: Annotated[
        str | torch.dtype | None,
        "dtype of the parameters: float32, bfloat16, float16 or float64 (default: the model's)",
    ]
    master: Annotated[
        str | torch.dtype | None,
        "dtype of gradient sums, optimizer states and the optimizer's copy of the parameters, as float32 "
        "(default: that of the parameters, and no copy)",
    ]
    offload: Annotated[
        str | None, "optimizer: its states and copy of the parameters lie on the host, which updates them; none: not so"
    ]
    optimizer: Annotated[str, "whose states take memory: sgd, momentum, adagrad, rmsprop, adam or adamw"]
    time_limit: Annotated[float | None, "seconds after which the best plan so far is taken"]
    nodes: Annotated[int | None, "points of the search after which the best plan so far is taken"]
    exact: Annotated[bool, "refine the splits of a small model to the optimum under real bytes, which takes minutes"]
    solver: Annotated[str, "of the integer programs: highs, or one of PuLP's: cbc, scip, gurobi, cplex, glpk, ..."]
    no_fuse: Annotated[Sequence[str], "names of fused kernels to leave out, as swiglu"]
    constraints: Annotated[Sequence[str], "texts of what to fix or forbid: see `autopart.planner.constraints`"]


SETTINGS: Mapping[str, tuple[Any, str]] = {
    name: get_args(annotated) for name, annotated in get_type_hints(Settings, include_extras=True).items()
}
"""Setting -> its type and its help text."""

WHOLE = tuple(name for name, (kind, _) in SETTINGS.items() if int in get_args(kind))
"""Settings that are whole numbers."""


@dataclass(frozen=True)
class Request:
    """`Settings` as they were read; None leaves the choice to the planner."""

    global_batch: int
    micro_batch: int | None = None
    pp: int | None = None
    tp: int | None = None
    dp: int | None = None
    zero: int | None = None
    prefetch: int | None = None
    recompute: str | None = None
    schedule: str | None = None
    precision: str = "float32"
    master: str | None = None
    optimizer: str = "adamw"
    time_limit: float | None = None
    nodes: int | None = None
    """Unlike a time limit it gives the same plan every time."""
    exact: bool = False
    """Whether to look for the optimum at any cost: see `autopart.planner.exact_refinement`."""
    solver: str = HIGHS
    """Of the integer programs of splits: HiGHS in this process, or one that PuLP knows."""
    must_fit: bool = True
    """Whether a plan must fit the devices' memory; False for `autopart.estimate`."""
    no_fuse: tuple[str, ...] = ()
    """Names of fused kernels that are left out."""
    constraints: tuple[Constraint, ...] = ()
    offload: str | None = None
    shard_size: int | None = None

    def allows(self, name: str, value: int | str) -> bool:
        """Whether constraints allow a setting this value."""
        return all(c.allows_setting(name, value) for c in self.constraints)

    def prefetch_bytes(self, device: Device) -> int:
        """The most bytes of whole weights that a rank gathers ahead at ZeRO 3. Where nothing is asked for: a
        PREFETCH_SHARE of the device's memory, 0 on a device that computes no faster beside messages."""
        if self.prefetch is None:
            return int(device.memory_bytes * PREFETCH_SHARE) // MIB * MIB if device.overlapped_share else 0
        return self.prefetch * MIB

    def to_json(self) -> dict[str, Any]:
        """The settings that differ from their defaults, as plain data; constraints as texts."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return given | ({"constraints": [c.text for c in self.constraints]} if self.constraints else {})

    def check(self, mesh: Mesh) -> Request:
        """The request with the degrees that the mesh fixes. Raises PartitionError for settings that no plan can
        have."""
        for name, value, known in (
            ("schedule", self.schedule, SCHEDULES),
            ("optimizer", self.optimizer, OPTIMIZER_STATES),
            ("recompute", self.recompute, MODES),
            ("zero", self.zero, (0, 1, 2, 3)),
            ("master", self.master, MASTERS),
            ("offload", self.offload, OFFLOADS),
        ):
            if value is not None and value not in known:
                raise not_known(name, value, known)
        if self.master is not None and widening(self.precision, self.master) <= 1:
            raise PartitionError(
                f"master={self.master!r} is no wider than precision={self.precision!r}",
                "a master copy is for what 16 bits would lose",
                'precision="bfloat16", or no master',
            )
        if self.solver != HIGHS:
            from autopart.passes.ilp_solvers import find_solver  # PuLP takes half a second to load

            find_solver(self.solver)
        if self.time_limit is not None and self.time_limit < 0:
            raise PartitionError(f"time_limit={self.time_limit} is not positive", try_="time_limit=10")
        for name in WHOLE:
            value, least = getattr(self, name), 0 if name in ("zero", "nodes", "prefetch") else 1
            if value is not None and value < least:
                raise PartitionError(f"{name}={value} is not positive", try_=f"{name}={least} or more")
        self._check_shared_out()
        fixed = dict(mesh.axes)
        asked = {n: getattr(self, n) for n in ("pp", "dp", "tp") if getattr(self, n)}
        for name, degree in asked.items():
            if fixed.get(name, degree) != degree:
                raise PartitionError(
                    f"{name}={degree} contradicts the mesh", f"its axis {name} has {fixed[name]} ranks"
                )
        request = replace(self, **{**fixed, **asked})
        product = 1
        for name in ("pp", "dp", "tp"):
            product *= getattr(request, name) or 1
        whole = request.pp and request.dp and request.tp
        if mesh.size % product or (whole and product != mesh.size):
            degrees = " x ".join(f"{n}={getattr(request, n)}" for n in ("pp", "dp", "tp") if getattr(request, n))
            raise PartitionError(
                f"{degrees} does not fill the mesh",
                f"{product} ranks of {mesh.size}",
                _filling(request, mesh.size),
            )
        request._check_shards(mesh)
        if request.micro_batch and request.global_batch % request.micro_batch:
            raise PartitionError(
                "the batch does not divide",
                f"{request.global_batch} samples are no multiple of micro_batch={request.micro_batch}",
                f"micro_batch={divisor_near(request.global_batch, request.micro_batch, request.dp or 1)}",
            )
        return request

    def _check_shards(self, mesh: Mesh) -> None:
        """Raise PartitionError where data-parallel ranks are no whole number of groups of `shard_size`."""
        if self.shard_size and (self.dp or mesh.size) % self.shard_size:
            among = f"dp={self.dp} ranks" if self.dp else f"the mesh's {mesh.size} devices"
            sizes = ", ".join(str(size) for size in divisors(self.dp or mesh.size)[1:])
            raise PartitionError(
                f"shard_size={self.shard_size} does not divide {among}",
                "ZeRO divides among groups of so many data-parallel ranks",
                f"shard_size={sizes}" if sizes else "no shard_size",
            )

    def _check_shared_out(self) -> None:
        """Raise PartitionError where what no rank shares out is to be shared out or gathered ahead."""
        if self.prefetch and self.zero is not None and self.zero < 3:
            raise PartitionError(
                f"prefetch={self.prefetch} at ZeRO {self.zero}",
                "weights are gathered, and so gathered ahead, at ZeRO 3 alone",
                "zero=3, or no prefetch",
            )
        if self.shard_size is not None and (self.shard_size == 1 or self.zero == 0):
            raise PartitionError(
                f"nothing is divided at {'zero=0' if self.zero == 0 else 'shard_size=1'}",
                "shard_size is the number of data-parallel ranks that share out states, gradients or parameters",
                "zero=1, 2 or 3 with a shard_size of 2 or more; or zero=0 alone",
            )


def read_constraints(texts: str | Sequence[str]) -> tuple[Constraint, ...]:
    """Constraints from their texts, or from one text. Raises PartitionError for a text that cannot be read."""
    return tuple(parse(text) for text in _listed("constraints", texts, "texts", "tp=2"))


def _listed(name: str, value: str | Sequence[str], what: str, example: str) -> Sequence[str]:
    """The texts of a setting, or its one text, as a list. Raises PartitionError for anything else."""
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, (list, tuple)) or not all(isinstance(text, str) for text in given):
        raise PartitionError(f"{name}={value!r} is no list of {what}", try_=f'{name}=["{example}"]')
    return given


def read_settings(settings: Mapping[str, Any]) -> Request:
    """`Settings` as a request. Raises PartitionError for an unknown name and for a value of another type."""
    for name, value in settings.items():
        if name not in SETTINGS:
            near = " or ".join(closest(name, list(SETTINGS)))
            raise PartitionError(f"there is no setting {name!r}", f"known are {', '.join(SETTINGS)}", near)
        whole = isinstance(value, SupportsIndex) and not isinstance(value, bool)
        if name in WHOLE and value is not None and not (whole and abs(operator.index(value)) <= MAX_INTEGER):
            raise PartitionError(f"{name}={value!r} is no whole number up to {MAX_INTEGER:,}", try_=f"{name}=2")
    master = settings.get("master")
    numbers = {name: operator.index(settings[name]) for name in WHOLE if settings.get(name) is not None}
    solver = settings.get("solver", HIGHS)
    read = {
        "solver": solver.lower() if isinstance(solver, str) else solver,
        "master": None if master is None else str(master).removeprefix("torch."),
        "no_fuse": tuple(sorted(set(_listed("no_fuse", settings.get("no_fuse", ()), "names", "swiglu")))),
        "constraints": read_constraints(settings.get("constraints", ())),
    }
    request = Request(**{**settings, **numbers, **read})
    if wrong := mistyped(request, Request):
        raise PartitionError(f"a setting is of another type: {wrong}")
    return request


def divisor_near(number: int, wanted: int, ranks: int) -> int:
    """The divisor of a number closest to the one wanted; a multiple of `ranks` if there is any."""
    known = divisors(number)
    return min([d for d in known if d % ranks == 0] or known, key=lambda d: abs(d - wanted))


def _filling(request: Request, size: int) -> str:
    """For an error: for each degree that is given, the values with which the others fill a mesh; if there are none, the
    condition on all of them."""
    given = {name: degree for name in ("pp", "dp", "tp") if (degree := getattr(request, name))}
    settings = []
    for name in given:
        others = math.prod(degree for other, degree in given.items() if other != name)
        if size % others == 0:
            fits = [size // others] if len(given) == 3 else divisors(size // others)
            settings.append(f"{name}={' or '.join(map(str, fits))}")
    return "; ".join(settings) or f"degrees whose product {'is' if len(given) == 3 else 'divides'} {size}"
