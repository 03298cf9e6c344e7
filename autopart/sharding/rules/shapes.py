"""Operators that only move elements."""

from collections.abc import Sequence

from autopart.sharding.notation import Shape
from autopart.sharding.rules.base import (
    Args,
    Rule,
    argument,
    dims_of,
    letters,
    opaque,
    replaced,
    row,
    spelled,
    whole_at,
    whole_dims,
    whole_last,
)


def _view(args: Args, outputs: Sequence[Shape]) -> str:
    """The row of a reshape: a letter for every factor of the common refinement of the two shapes.

    Shapes without a common refinement, as (4, 6) and (3, 8), are never split.
    """
    sides: tuple[list[str], list[str]] = ([], [])
    source, target = [s for s in args[0] if s != 1], [s for s in outputs[0] if s != 1]
    if 0 in source:
        return opaque(args, outputs)
    groups: tuple[list[list[str]], list[list[str]]] = ([], [])
    i = j = letter = 0
    left = right = 1
    while i < len(source) or j < len(target) or left > 1 or right > 1:
        if left == 1:
            left, i = source[i], i + 1
            groups[0].append([])
        if right == 1:
            right, j = target[j], j + 1
            groups[1].append([])
        atom = min(left, right)
        if max(left, right) % atom:
            return opaque(args, outputs)
        for group in groups:
            group[-1].append(f"d{letter}")
        letter += 1
        left, right = left // atom, right // atom
    for side, group, shape in zip(sides, groups, (args[0], outputs[0]), strict=True):
        packed = iter(group)
        for size in shape:
            names = ["1"] if size == 1 else next(packed)
            side.append(names[0] if len(names) == 1 else f"({' '.join(names)})")
    return row([sides[0]], [sides[1]])


def _unflattened(args: Args, outputs: Sequence[Shape]) -> Args:
    dim = args[1] % (len(outputs[0]) - len(args[2]) + 1)
    return replaced(args, 2, list(outputs[0][dim : dim + len(args[2])]))


def _spread(source: Shape, out: Shape) -> list[str]:
    """The dims of the input of `expand` and `repeat`: a dim of size 1 gives all elements of the output's dim."""
    lead = len(out) - len(source)
    return ["1" if s == 1 else n for s, n in zip(source, letters(len(out))[lead:], strict=True)]


def _expand(args: Args, outputs: Sequence[Shape]) -> str:
    return row([_spread(args[0], outputs[0])], [letters(len(outputs[0]))])


def _broadcast(args: Args, outputs: Sequence[Shape]) -> str:
    return row([_spread(s, o) for s, o in zip(args[0], outputs, strict=True)], [letters(len(o)) for o in outputs])


def _repeat(args: Args, outputs: Sequence[Shape]) -> str:
    """A dim of n copies is n parts, each of which is split on its own. Copies of a single element are one part."""
    if 0 in outputs[0]:
        return opaque(args, outputs)
    names = letters(len(outputs[0]))
    source = [1] * (len(names) - len(args[0])) + list(args[0])
    whole = [
        n if 1 in (old, new // old) else f"({new // old} {n})"
        for n, old, new in zip(names, source, outputs[0], strict=True)
    ]
    return row([_spread(args[0], outputs[0])], [whole])


def _copies(args: Args, outputs: Sequence[Shape]) -> Args:
    """On a shard there are no more copies than the output has elements."""
    lengths = outputs[0][len(outputs[0]) - len(args[1]) :]
    return replaced(args, 1, [min(c, n) for c, n in zip(args[1], lengths, strict=True)])


def _interleave(args: Args, outputs: Sequence[Shape]) -> str:
    """(x, count, dim). The dim is never split, since the size of the output may be given by keyword."""
    if argument(args, 2) is None:
        return opaque(args, outputs)
    return whole_at(2)((args[0], None, args[2]), outputs)


def _interleave_each(args: Args, outputs: Sequence[Shape]) -> str:
    """(x, counts, dim)."""
    if argument(args, 2) is None:
        return opaque(args, outputs)
    dim = dims_of(args[2], len(args[0]))
    return row([spelled(args[0], dim, "a"), ["r!"] * len(args[1])], [spelled(outputs[0], dim, "z")])


def _permuted(order: Sequence[int]) -> str:
    names = letters(len(order))
    return row([names], [[names[i] for i in order]])


def _transpose(args: Args, outputs: Sequence[Shape]) -> str:
    order = list(range(len(args[0])))
    a, b = dims_of(args[1:3], len(order))
    if order:
        order[a], order[b] = order[b], order[a]
    return _permuted(order)


def _permute(args: Args, outputs: Sequence[Shape]) -> str:
    return _permuted(dims_of(args[1], len(args[0])))


def _movedim(args: Args, outputs: Sequence[Shape]) -> str:
    rank = len(args[0])
    source, target = dims_of(args[1], rank), dims_of(args[2], rank)
    rest = iter(d for d in range(rank) if d not in source)
    where = dict(zip(target, source, strict=True))
    return _permuted([where[d] if d in where else next(rest) for d in range(rank)])


def _t(args: Args, outputs: Sequence[Shape]) -> str:
    return _permuted(list(range(len(args[0])))[::-1])


def _rot90(args: Args, outputs: Sequence[Shape]) -> str:
    names = letters(len(args[0]))
    dims = dims_of(argument(args, 2, [0, 1]), len(names))
    left = [f"{n}!" if i in dims else n for i, n in enumerate(names)]
    right = list(left)
    if argument(args, 1, 1) % 2:
        right[dims[0]], right[dims[1]] = left[dims[1]], left[dims[0]]
    return row([left], [right])


def _slice(args: Args, outputs: Sequence[Shape]) -> str:
    if tuple(args[0]) == tuple(outputs[0]):
        return _permuted(range(len(args[0])))
    return whole_at(1)(args[:2], outputs)


def _squeeze(args: Args, outputs: Sequence[Shape]) -> str:
    """A dim that is asked for and longer than 1 is never split: `squeeze` would remove it from a shard of length 1."""
    asked = set(dims_of(argument(args, 1), len(args[0])))
    names = spelled(args[0], asked)
    gone = {i for i in asked if len(args[0]) and args[0][i] == 1}
    left = ["1" if i in gone else n for i, n in enumerate(names)]
    return row([left], [[n for i, n in enumerate(names) if i not in gone]])


def _unsqueeze(args: Args, outputs: Sequence[Shape]) -> str:
    names = letters(len(args[0]))
    dim = args[1] % len(outputs[0])
    return row([names], [[*names[:dim], "1", *names[dim:]]])


def _roll(args: Args, outputs: Sequence[Shape]) -> str:
    return whole_dims(args[:1], outputs, dims_of(argument(args, 2) or None, len(args[0])))


def _view_dtype(args: Args, outputs: Sequence[Shape]) -> str:
    if tuple(args[0]) == tuple(outputs[0]):
        return _permuted(range(len(args[0])))
    return whole_last(1)(args[:1], outputs) if len(args[0]) == len(outputs[0]) else opaque(args, outputs)


def _shuffle(args: Args, outputs: Sequence[Shape]) -> str:
    """pixel_shuffle: r x r channels become a block of r x r pixels."""
    lead, r = letters(len(args[0]) - 3), args[1]
    return row([[*lead, f"(c {r} {r})", "h", "w"]], [[*lead, "c", f"(h {r})", f"(w {r})"]])


def _unshuffle(args: Args, outputs: Sequence[Shape]) -> str:
    left, right = _shuffle(args, outputs).split(" -> ")
    return f"{right} -> {left}"


RULES: dict[str, Rule] = {
    "aten.view": Rule(_view, linear=-1, resize=1),
    "aten.reshape": Rule(_view, linear=-1, resize=1),
    "aten._unsafe_view": Rule(_view, linear=-1, resize=1),
    "aten.flatten.using_ints": Rule(_view, linear=-1),
    "aten.ravel": Rule(_view, linear=-1),
    "aten.unflatten.int": Rule(_view, linear=-1, resize=_unflattened),
    "aten.expand": Rule(_expand, linear=-1, resize=1),
    "aten.broadcast_to": Rule(_expand, linear=-1, resize=1),
    "aten.broadcast_tensors": Rule(_broadcast, linear=-1),
    "aten.repeat": Rule(_repeat, linear=-1, resize=_copies),
    "aten.tile": Rule(_repeat, linear=-1, resize=_copies),
    "aten.repeat_interleave.self_int": Rule(_interleave, linear=-1),
    "aten.repeat_interleave.self_Tensor": Rule(_interleave_each, linear=(0,)),
    "aten.transpose.int": Rule(_transpose, linear=-1),
    "aten.swapaxes": Rule(_transpose, linear=-1),
    "aten.swapdims": Rule(_transpose, linear=-1),
    "aten.permute": Rule(_permute, linear=-1),
    "aten.movedim.int": Rule(_movedim, linear=-1),
    "aten.movedim.intlist": Rule(_movedim, linear=-1),
    "aten.t": Rule(_t, linear=-1),
    "aten.numpy_T": Rule(_t, linear=-1),
    "aten.mT": Rule(lambda args, outputs: _transpose((args[0], -1, -2), outputs), linear=-1),
    "aten.rot90": Rule(_rot90, linear=-1),
    "aten.flip": Rule(whole_at(1), linear=-1),
    "aten.fliplr": Rule(lambda args, outputs: whole_dims(args, outputs, [1]), linear=-1),
    "aten.flipud": Rule(lambda args, outputs: whole_dims(args, outputs, [0]), linear=-1),
    "aten.roll": Rule(_roll, linear=-1),
    "aten.tril": Rule(whole_last(2), linear=-1),
    "aten.triu": Rule(whole_last(2), linear=-1),
    "aten.unsqueeze": Rule(_unsqueeze, linear=-1),
    "aten.squeeze": Rule(_squeeze, linear=-1),
    "aten.squeeze.dim": Rule(_squeeze, linear=-1),
    "aten.squeeze.dims": Rule(_squeeze, linear=-1),
    "aten.slice.Tensor": Rule(_slice, linear=-1),
    "aten.narrow": Rule(whole_at(1), linear=-1),
    "aten.view.dtype": Rule(_view_dtype),
    "aten.view_as_real": Rule("... -> ... 2", linear=-1),
    "aten.view_as_complex": Rule("... 2 -> ...", linear=-1),
    "aten.real": Rule("... -> ...", linear=-1),
    "aten.imag": Rule("... -> ...", linear=-1),
    "aten.pixel_shuffle": Rule(_shuffle, linear=-1),
    "aten.pixel_unshuffle": Rule(_unshuffle, linear=-1),
}
