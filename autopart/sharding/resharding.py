"""The table of reshards: which collective changes one placement into another, forward and backward.

Backward runs the conjugate collective on the gradient (Shoeybi et al., Megatron-LM, arXiv 1909.08053, section 3;
Korthikanti et al., arXiv 2205.05198, section 4.2.2).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from autopart.sharding.notation import Placement


@dataclass(frozen=True)
class Reshard:
    """One row of the table.

    function  the function of `autopart.runtime.collectives` that emitted code calls
    forward   the collective that it runs forward, "" for none;  backward: likewise on the gradient
    regathers  whether the forward collective runs again in backward, since its result is not saved
    """

    function: str
    forward: str
    backward: str
    regathers: bool = False


def runtime_function(name: str) -> Callable[..., Any]:
    """A call target that stands for a function of `autopart.runtime` in a stage's graph."""

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"{name} runs in emitted code only")

    stand_in.__name__ = name
    return stand_in


RESHARDS: dict[tuple[str, str], Reshard] = {
    ("R", "C"): Reshard("copy_to", "", "all_reduce"),
    ("R", "S"): Reshard("scatter_to", "", "all_gather"),
    ("C", "R"): Reshard("share_gradient", "", ""),
    ("C", "S"): Reshard("slice_of", "", ""),
    ("S", "R"): Reshard("gather_from", "all_gather", ""),
    ("S", "C"): Reshard("all_gather", "all_gather", "reduce_scatter"),
    ("S", "G"): Reshard("all_gather_again", "all_gather", "reduce_scatter", regathers=True),
    ("S", "S"): Reshard("all_to_all", "all_to_all", "all_to_all"),
    ("P", "R"): Reshard("reduce_from", "all_reduce", ""),
    ("P", "C"): Reshard("all_reduce", "all_reduce", "all_reduce"),
    ("P", "S"): Reshard("reduce_scatter_to", "reduce_scatter", "all_gather"),
}


GATHERED_AGAIN = {f"runtime.{row.function}" for row in RESHARDS.values() if row.regathers}
"""Operators whose forward collective backward runs again, whether or not their segment is recomputed."""


def reshard(have: Placement, want: Placement, grad: bool) -> Reshard | None:
    """The row of the table for a change of placement; None where nothing has to run.

    A value without gradient is the same in R and C. Raises KeyError where the table has no such change: no whole value
    is made a partial sum.
    """
    if have == want or (not grad and have.kind in "RC" and want.kind in "RC"):
        return None
    return RESHARDS[have.kind, want.kind]


def possible(have: Placement, want: Placement) -> bool:
    """Whether the table has a row for the change, or nothing changes."""
    return have == want or (have.kind, want.kind) in RESHARDS


def reshard_arguments(function: str, have: Placement, want: Placement) -> tuple[Any, ...]:
    """The arguments of a function of the table behind the tensor and the axis: the dims, and the sizes of their
    parts."""
    if function == "all_to_all":
        return (have.dim, want.dim)
    split = want if want.kind == "S" else have
    if split.kind != "S":
        return ()
    return (split.dim, list(split.parts)) if split.parts else (split.dim,)


@dataclass(frozen=True)
class Step:
    """One change of a value's placement along one axis, given by its index: the placements `before` and `after`."""

    axis: int
    row: Reshard
    before: tuple[Placement, ...]
    after: tuple[Placement, ...]


@lru_cache(maxsize=2**16)
def steps(have: tuple[Placement, ...], want: tuple[Placement, ...], grad: bool) -> tuple[Step, ...]:
    """The changes from one placement along all axes to another, one axis after the other.

    Axes along which the value is summed or gathered come before axes along which it is split. A dim that another axis
    splits, or whose parts differ, is gathered before it is split anew.
    """
    return tuple(_steps(have, want, grad))


def _steps(have: tuple[Placement, ...], want: tuple[Placement, ...], grad: bool) -> Iterator[Step]:
    now = list(have)
    for axis in sorted(range(len(want)), key=lambda a: (want[a].kind == "S", a)):
        target = want[axis]
        stops = [target]
        if now[axis].kind == target.kind == "S" and now[axis] != target:
            clash = any(now[b].kind == "S" and now[b].dim == target.dim for b in range(len(want)) if b != axis)
            if now[axis].parts or target.parts or clash:
                stops = [Placement("R"), target]
        for stop in stops:
            row = reshard(now[axis], stop, grad)
            if row is not None:
                before, now[axis] = tuple(now), stop
                yield Step(axis, row, before, tuple(now))
