"""What a user asks of the planner, and the points of its outer search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from autopart.constraints import Constraint, parse
from autopart.cost import MASTERS, OPTIMIZER_STATES, widening
from autopart.errors import PartitionError
from autopart.mesh import Mesh
from autopart.schedules import SCHEDULES


@dataclass(frozen=True)
class Request:
    """What the user asked for; None leaves the choice to the planner."""

    global_batch: int
    micro_batch: int | None = None
    pp: int | None = None
    tp: int | None = None
    dp: int | None = None
    zero: int | None = None
    recompute: str | None = None
    schedule: str | None = None
    precision: str = "float32"
    master: str | None = None
    """Dtype of gradients, optimizer states and the optimizer's copy of the parameters; None: all in `precision`."""
    optimizer: str = "adamw"
    time_limit: float | None = None
    nodes: int | None = None
    """Points of the search that are looked at; unlike a time limit it gives the same plan every time."""
    must_fit: bool = True
    constraints: tuple[Constraint, ...] = ()
    """What was fixed or forbidden by hand."""

    def allows(self, name: str, value: int | str) -> bool:
        """Whether constraints leave a setting this value."""
        return all(c.allows_setting(name, value) for c in self.constraints)

    def to_json(self) -> dict[str, Any]:
        """The settings that are not the default, as plain data; constraints are their texts."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return given | ({"constraints": [c.text for c in self.constraints]} if self.constraints else {})

    def check(self, mesh: Mesh) -> Request:
        """Raise PartitionError for what no planner could do; degrees that `mesh` fixes are taken over."""
        for name, value, known in (
            ("schedule", self.schedule, SCHEDULES),
            ("optimizer", self.optimizer, OPTIMIZER_STATES),
            ("recompute", self.recompute, ("none", "selective", "full")),
            ("zero", self.zero, (0, 1, 2, 3)),
            ("master", self.master, MASTERS),
        ):
            if value is not None and value not in known:
                raise PartitionError(f"{name}={value!r} is not known", try_=f"one of {', '.join(map(str, known))}")
        if self.master is not None and widening(self.precision, self.master) <= 1:
            raise PartitionError(
                f"master={self.master!r} is no wider than precision={self.precision!r}",
                "a master copy is for what 16 bits would lose",
                'precision="bfloat16", or no master',
            )
        for name in ("pp", "dp", "tp", "micro_batch", "global_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PartitionError(f"{name}={value} is not positive")
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
                "degrees whose product is the mesh",
            )
        if request.micro_batch and request.global_batch % request.micro_batch:
            raise PartitionError(
                "the batch does not divide",
                f"{request.global_batch} samples are no multiple of micro_batch={request.micro_batch}",
                f"micro_batch={divisor_near(request.global_batch, request.micro_batch)}",
            )
        return request


@dataclass(frozen=True, order=True)
class Point:
    """One point of the outer search: degrees, samples of a micro-batch over all ranks, ZeRO level."""

    pp: int
    dp: int
    tp: int
    micro_batch: int
    zero: int = 0

    def passes(self, global_batch: int) -> float:
        """How often the time of all stages together counts: sum(f) + (m - 1) max(f) >= sum(f) (1 + (m - 1) / pp)."""
        return 1 + (global_batch // self.micro_batch - 1) / self.pp

    def __str__(self) -> str:
        return f"pp={self.pp} dp={self.dp} tp={self.tp} micro-batch {self.micro_batch} zero {self.zero}"


def read_constraints(texts: Sequence[str]) -> tuple[Constraint, ...]:
    """Constraints from their texts. Raises PartitionError for one that cannot be read."""
    return tuple(parse(text) for text in texts)


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def divisor_near(number: int, wanted: int) -> int:
    return min(divisors(number), key=lambda d: abs(d - wanted))


def is_block(label: str) -> bool:
    """Whether a run is a numbered block, the kind that is recomputed."""
    return label.rpartition(".")[2].isdigit()
