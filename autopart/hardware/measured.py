"""Tables of seconds that `autopart calibrate` measured of a device and of a link.

A device's seconds come from one of three sources: such tables, the constants of `Silicon`, or a plain roofline. Every
row of a table ends with its spread: the greatest relative distance of a round's seconds from the median of the rounds,
which is the seconds that the row gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

Rows = tuple[tuple[float, ...], ...]
Tables = Mapping[str, Rows]

TYPES = ("cpu", "cuda")
"""What torch calls the devices that can be measured."""


@dataclass(frozen=True)
class Measured:
    """Seconds on a device while all ranks of its host do the same.

    type        of TYPES
    ranks       number of ranks that measured at once
    threads     number of threads of each rank
    alone       factor by which a rank computes faster while so many ranks idle that it shares no core; above 1 where
                the host has fewer cores than its ranks have threads
    overlap     factor by which a product takes longer while an all-reduce runs (see `Device.overlapped_share`)
    products    dtype -> rows (m, n, k, seconds, spread) of products of m x k by k x n, values alone
    attention   dtype -> rows (sequence, elements of a head, causal, seconds of a forward FLOP, of a backward one,
                spread), FLOPs being those of the forward pass
    operators   kind of operator, of `autopart.cost.measured_tables.KINDS` -> rows (bytes, forward, backward,
                spread): seconds of a call under autograd by the bytes that it reads and writes
    updates     optimizer -> rows (bytes, seconds, spread) of its step on one parameter of so many bytes
    accumulate  rows (bytes, seconds, spread) of adding a micro-batch's gradient to that of those before
    pace        factor of all seconds of a micro-batch; not part of a file (see `Mesh.busy_device`)
    """

    type: str
    ranks: int
    threads: int
    alone: float
    overlap: float
    products: Tables = field(hash=False)
    attention: Tables = field(hash=False)
    operators: Tables = field(hash=False)
    updates: Tables = field(hash=False)
    accumulate: Rows = field(hash=False)
    pace: float = 1.0

    def faster_memory(self, times: float) -> Measured:
        """The same tables, with all but products and attention `times` as fast."""
        operators, updates = (_all_faster(tables, times) for tables in (self.operators, self.updates))
        return replace(self, operators=operators, updates=updates, accumulate=_faster(self.accumulate, times))


@dataclass(frozen=True)
class Wire:
    """Seconds on a link.

    collectives  name -> ranks of the group, as text -> rows (bytes, seconds, spread). The names are those of
                 `autopart.cost.collectives.COLLECTIVES` as the runtime runs them, with the bytes that are counted
                 there, and with "merged_" before them for the bytes of many parameters that travel in one message
    p2p          rows (bytes, seconds, spread) of a message between two ranks
    """

    collectives: Mapping[str, Tables] = field(hash=False)
    p2p: Rows = field(hash=False)

    def faster(self, times: float) -> Wire:
        """The same tables, everything `times` as fast."""
        collectives = {name: _all_faster(tables, times) for name, tables in self.collectives.items()}
        return Wire(collectives, _faster(self.p2p, times))


def _all_faster(tables: Tables, times: float) -> Tables:
    return {name: _faster(rows, times) for name, rows in tables.items()}


def _faster(rows: Rows, times: float) -> Rows:
    """Rows of bytes, seconds and spread with shorter seconds."""
    return tuple((row[0], *(seconds / times for seconds in row[1:-1]), row[-1]) for row in rows)


def read_measured(value: Any) -> Measured | None:
    """The `measured` of a device's row in a file, or in JSON; None for anything else."""
    return _read(Measured, value)


def read_wire(value: Any) -> Wire | None:
    """The `measured` of a link's row."""
    return _read(Wire, value)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _rows(value: Any, width: int, times: int) -> Rows | None:
    """At least one row of `width` numbers, none below 0, in rising order; the `times` before the last are above 0."""
    if not isinstance(value, list | tuple) or not value:
        return None
    for row in value:
        if not isinstance(row, list | tuple) or len(row) != width or not all(_number(x) and x >= 0 for x in row):
            return None
        if not all(x > 0 for x in row[-1 - times : -1]):
            return None
    return tuple(sorted(tuple(map(float, row)) for row in value))


def _tables(value: Any, width: int, times: int) -> Tables | None:
    if not isinstance(value, Mapping):
        return None
    read = {str(key): _rows(rows, width, times) for key, rows in value.items()}
    return None if None in read.values() else read  # type: ignore[return-value]


def _collectives(value: Any) -> Mapping[str, Tables] | None:
    if not isinstance(value, Mapping):
        return None
    read = {str(name): _tables(tables, 3, 1) for name, tables in value.items()}
    whole = all(tables and all(ranks.isdecimal() for ranks in tables) for tables in read.values())
    return read if whole else None  # type: ignore[return-value]


def _above_zero(value: Any) -> float | None:
    return float(value) if _number(value) and value > 0 else None


def _count(value: Any) -> int | None:
    return int(value) if _number(value) and value >= 1 and value == int(value) else None


READ: Mapping[str, Callable[[Any], Any]] = {
    "type": lambda value: value if value in TYPES else None,
    "ranks": _count,
    "threads": _count,
    "alone": _above_zero,
    "overlap": _above_zero,
    "products": lambda value: _tables(value, 5, 1),
    "attention": lambda value: _tables(value, 6, 2),
    "operators": lambda value: _tables(value, 4, 1) if value else None,
    "updates": lambda value: _tables(value, 3, 1),
    "accumulate": lambda value: _rows(value, 3, 1),
    "pace": _above_zero,
    "collectives": _collectives,
    "p2p": lambda value: _rows(value, 3, 1),
}
"""Field -> a function that reads its value, or gives None for a value that it may not have."""


def _read(kind: type[Any], value: Any) -> Any:
    names = {f.name for f in fields(kind)}
    if not isinstance(value, Mapping) or not value.keys() <= names:
        return None
    read = {key: READ[key](given) for key, given in value.items()}
    needed = {f.name for f in fields(kind) if f.default is MISSING}
    return None if any(found is None for found in read.values()) or needed - read.keys() else kind(**read)
