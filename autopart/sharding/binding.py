"""A rule row bound to the shapes of a call: the sizes of its letters, and the strategies that split them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from autopart.sharding.notation import C, Dim, Factor, Operand, P, Placement, Row, RowError, S, Shape, Strategy


@dataclass
class Bound:
    """A row bound to shapes: the dims of every operand, with `...` spelt out and None for dims that broadcast."""

    row: Row
    inputs: list[list[Dim | None] | None]
    outputs: list[list[Dim | None] | None]
    sizes: dict[str, int] = field(default_factory=dict)


def _expand(operand: Operand, shape: Shape | None, rank: int, text: str) -> list[Dim | None] | None:
    """Spell `...` out as letters named from the right (`.1` is the last of them)."""
    if operand is None or shape is None:
        return None
    dims: list[Dim | None] = []
    for dim in operand:
        if dim.factors[0].name == "...":
            count = len(shape) - len(operand) + 1
            if count < 0 or count > rank:
                raise RowError(f"row {text!r}: shape {shape} has too few dims")
            dims += [Dim((Factor(f".{i}", dim.factors[0].fixed),)) for i in range(count, 0, -1)]
        else:
            dims.append(dim)
    if len(dims) != len(shape):
        raise RowError(f"row {text!r}: {len(dims)} dims do not fit shape {shape}")
    return dims


def bind(row: Row, inputs: Sequence[Shape | None], outputs: Sequence[Shape]) -> Bound:
    """Fit a row to the shapes of a call, and find the size of every letter.

    Dims of size 1 that broadcast become None. Raises RowError where a shape does not fit the row.
    """
    operands = list(row.inputs) + [None] * (len(inputs) - len(row.inputs))
    rank = max((len(s) for s in [*inputs, *outputs] if s is not None), default=0)
    bound = Bound(
        row,
        [_expand(o, s, rank, row.text) for o, s in zip(operands, inputs, strict=True)],
        [_expand(o, s, rank, row.text) for o, s in zip(row.outputs, outputs, strict=True)],
    )
    pairs = [
        (dims, shape)
        for side, shapes in ((bound.inputs, inputs), (bound.outputs, outputs))
        for dims, shape in zip(side, shapes, strict=True)
        if dims is not None and shape is not None
    ]
    bound.sizes = sizes = _sizes(pairs, row.text)
    for dims, shape in pairs:
        for i, (dim, size) in enumerate(zip(dims, shape, strict=True)):
            assert dim is not None
            found = dims_size(dim, sizes)
            if size == 1 != found and len(dim.factors) == 1 and dim.factors[0].size is None:
                dims[i] = None
            elif size != found:
                names = " ".join(f.name for f in dim.factors)
                raise RowError(f"row {row.text!r}: {names} is {found}, and {size} in shape {tuple(shape)}")
    return bound


def _sizes(pairs: Sequence[tuple[list[Dim | None], Shape]], text: str) -> dict[str, int]:
    """The size of every letter.

    A letter that is a dim of its own has the dim's size. A letter of a product or a sum has what the other factors
    leave of the dim.
    """
    sizes: dict[str, int] = {}
    packed: list[tuple[Dim, int]] = []
    for dims, shape in pairs:
        for dim, size in zip(dims, shape, strict=True):
            assert dim is not None
            name = dim.factors[0].name
            if len(dim.factors) > 1:
                packed.append((dim, size))
            elif dim.factors[0].size is None and (size != 1 or name not in sizes):
                sizes[name] = size
    for _ in range(len(packed)):
        for dim, size in packed:
            unknown = {f.name for f in dim.factors if f.size is None and f.name not in sizes}
            known = dims_size(dim, sizes | dict.fromkeys(unknown, dim.joined == "*"))
            if len(unknown) == 1:
                sizes[unknown.pop()] = size // (known or 1) if dim.joined == "*" else max(size - known, 0)
    for dim, _ in packed:
        if missing := [f.name for f in dim.factors if f.size is None and f.name not in sizes]:
            raise RowError(f"row {text!r}: the size of {' and '.join(missing)} is unknown")
    return sizes


def _place(dims: list[Dim | None] | None, letters: frozenset[str], sizes: dict[str, int]) -> Placement | None:
    """The placement of an operand whose `letters` are split; None where it has none of them.

    Raises RowError where the letters cannot be split: they are fixed, not first in their dim, or in two dims.
    """
    found: list[Placement] = []
    for index, dim in enumerate(dims or ()):
        if dim is None or not any(f.name in letters for f in dim.factors):
            continue
        if dim.joined == "+":
            if any(f.fixed for f in dim.factors):
                raise RowError("fixed")
            found.append(S(index, [f.size or sizes[f.name] for f in dim.factors]))
            continue
        segments = 1
        for factor in dim.factors:
            if factor.name in letters:
                break
            if factor.size is None:
                raise RowError("not major")
            segments *= factor.size
        if factor.fixed:
            raise RowError("fixed")
        found.append(S(index, [dims_size(dim, sizes) // segments] * segments))
    if len(found) > 1:
        raise RowError("twice in one operand")
    return found[0] if found else None


def dims_size(dim: Dim, sizes: dict[str, int]) -> int:
    """The size of a dim in elements."""
    values = [sizes[f.name] if f.size is None else f.size for f in dim.factors]
    return math.prod(values) if dim.joined == "*" else sum(values)


def letter_groups(bound: Bound) -> list[frozenset[str]]:
    """The letters of a row in order of appearance, those that are split together in one set."""
    groups: list[set[str]] = []
    for dims in [*bound.inputs, *bound.outputs]:
        for dim in dims or ():
            if dim is None:
                continue
            names = {f.name for f in dim.factors if f.size is None}
            if dim.joined == "+":
                groups.append(names)
            else:
                groups += [{name} for name in names]
    merged: list[set[str]] = []
    for group in groups:
        for other in [m for m in merged if m & group]:
            group = group | other
            merged.remove(other)
        merged.append(set(group))
    order = {name: i for i, name in enumerate(bound.sizes)}
    unique = {frozenset(m) for m in merged}
    return sorted(unique, key=lambda g: min(order.get(n, 99) for n in g))


def split_letter(bound: Bound, letters: frozenset[str], shards: int) -> Strategy | None:
    """The strategy that splits `letters` over `shards` ranks; None where the row or a size does not allow it."""
    if any(bound.sizes[name] % shards for name in letters):
        return None
    try:
        inputs = [_place(dims, letters, bound.sizes) for dims in bound.inputs]
        outputs = [_place(dims, letters, bound.sizes) for dims in bound.outputs]
    except RowError:
        return None
    return Strategy(
        name="+".join(sorted(letters)),
        inputs=tuple(
            None if dims is None else placement or C for dims, placement in zip(bound.inputs, inputs, strict=True)
        ),
        outputs=tuple(p or P for p in outputs),
        shards_work=True,
    )
