"""Operators that move elements around and change none."""

from __future__ import annotations

from collections.abc import Sequence

from autopart.sharding.notation import Shape
from autopart.sharding.rules.base import (
    Args,
    Linear,
    Rule,
    Text,
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
    """The common refinement of the two shapes, letter by letter; what has none is never split."""
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
    """The dims that `expand` and `repeat` read: those of size 1 are the same for every letter of the output."""
    lead = len(out) - len(source)
    return ["1" if s == 1 else n for s, n in zip(source, letters(len(out))[lead:], strict=True)]


def _expand(args: Args, outputs: Sequence[Shape]) -> str:
    return row([_spread(args[0], outputs[0])], [letters(len(outputs[0]))])


def _broadcast(args: Args, outputs: Sequence[Shape]) -> str:
    return row([_spread(s, o) for s, o in zip(args[0], outputs, strict=True)], [letters(len(o)) for o in outputs])


def _repeat(args: Args, outputs: Sequence[Shape]) -> str:
    """A dim of several copies is so many segments; copies of a single element are as good as others."""
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
    """Counts of copies follow the shard where the dim has no more elements than there are copies."""
    lengths = outputs[0][len(outputs[0]) - len(args[1]) :]
    return replaced(args, 1, [min(c, n) for c, n in zip(args[1], lengths, strict=True)])


def _interleave(args: Args, outputs: Sequence[Shape]) -> str:
    """(x, count, dim); the dim stays whole, since the size of the output may be given by keyword."""
    if argument(args, 2) is None:
        return opaque(args, outputs)
    return whole_at(2)((args[0], None, args[2]), outputs)


def _interleave_each(args: Args, outputs: Sequence[Shape]) -> str:
    """(x, counts, dim)"""
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


def _matrix_transpose(args: Args, outputs: Sequence[Shape]) -> str:
    return _transpose((args[0], -1, -2), outputs)


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


def _select(args: Args, outputs: Sequence[Shape]) -> str:
    left = spelled(args[0], dims_of(args[1], len(args[0])))
    return row([left], [[n for n in left if not n.endswith("!")]])


def _unbind(args: Args, outputs: Sequence[Shape]) -> str:
    left = spelled(args[0], dims_of(argument(args, 1, 0), len(args[0])))
    return row([left], [[n for n in left if not n.endswith("!")] for _ in outputs])


def _scatter(args: Args, outputs: Sequence[Shape]) -> str:
    """slice_scatter and select_scatter: (whole, piece, dim, ...) -> whole."""
    dims = dims_of(argument(args, 2, 0), len(args[0]))
    whole, piece = spelled(args[0], dims), spelled(args[0], dims, "piece")
    return row([whole, piece if len(args[1]) == len(whole) else [n for n in piece if not n.endswith("!")]], [whole])


def _split(args: Args, outputs: Sequence[Shape]) -> str:
    names = letters(len(args[0]))
    dim = argument(args, 2, 0) % len(names)
    parts = letters(len(outputs), "p") if len(outputs) > 1 else [names[dim]]
    whole = f"({'+'.join(parts)})" if len(parts) > 1 else parts[0]
    return row([_put(names, dim, whole)], [_put(names, dim, p) for p in parts])


def _put(names: Sequence[str], dim: int, name: str) -> list[str]:
    return [*names[:dim], name, *names[dim + 1 :]]


def _chunk(args: Args, outputs: Sequence[Shape]) -> str:
    """Equal chunks split into equal chunks; others are cut elsewhere on a shard."""
    if len(set(outputs)) == 1 and len(outputs) == args[1]:
        return _split(args, outputs)
    return whole_at(2)((args[0], None, argument(args, 2, 0)), outputs)


def _pieces(args: Args, outputs: Sequence[Shape]) -> Args:
    sizes = [o[argument(args, 2, 0)] for o in outputs]
    return replaced(args, 1, sizes if isinstance(args[1], (list, tuple)) else sizes[0])


def _squeeze(args: Args, outputs: Sequence[Shape]) -> str:
    """The dims asked for that are longer than 1 stay, and stay whole: a shard of length 1 would go."""
    asked = set(dims_of(argument(args, 1), len(args[0])))
    names = spelled(args[0], asked)
    gone = {i for i in asked if len(args[0]) and args[0][i] == 1}
    left = ["1" if i in gone else n for i, n in enumerate(names)]
    return row([left], [[n for i, n in enumerate(names) if i not in gone]])


def _unsqueeze(args: Args, outputs: Sequence[Shape]) -> str:
    names = letters(len(args[0]))
    dim = args[1] % len(outputs[0])
    return row([names], [[*names[:dim], "1", *names[dim:]]])


def _cat(args: Args, outputs: Sequence[Shape]) -> str:
    """Pieces of shape (0,) are left out, whatever the rank of the others."""
    names = letters(len(outputs[0]))
    dim = argument(args, 1, 0) % len(names)
    empty = [tuple(s) == (0,) for s in args[0]]
    parts = [p for p, e in zip(letters(len(args[0]), "p"), empty, strict=True) if not e]
    if len(parts) == 1:
        parts = [names[dim]]
    rest = iter(parts)
    pieces = [["e!"] if e else _put(names, dim, next(rest)) for e in empty]
    return row(pieces, [_put(names, dim, f"({'+'.join(parts)})" if len(parts) > 1 else parts[0] if parts else "e!")])


def _stack(args: Args, outputs: Sequence[Shape]) -> str:
    names = letters(len(outputs[0]) - 1)
    dim = argument(args, 1, 0) % len(outputs[0])
    return row([names] * len(args[0]), [[*names[:dim], str(len(args[0])), *names[dim:]]])


def _cat_along(dim: int) -> Text:
    """hstack and the like, where the tensors have that dim."""

    def text(args: Args, outputs: Sequence[Shape]) -> str:
        ranks = {len(s) for s in args[0]}
        if ranks == {len(outputs[0])} and len(outputs[0]) > dim:
            return _cat((args[0], dim), outputs)
        return _cat((args[0], 0), outputs) if ranks == {1} == {len(outputs[0])} else opaque(args, outputs)

    return text


def _pad(args: Args, outputs: Sequence[Shape]) -> str:
    return whole_dims(args[:1], outputs, [len(args[0]) - 1 - k // 2 for k, amount in enumerate(args[1]) if amount])


def _pad_linear(args: Args) -> Linear:
    return -1 if (isinstance(argument(args, 2), str) and args[2] != "constant") or not _filler(args) else 0


def _filler(args: Args) -> float:
    return next((a for a in args[2:] if isinstance(a, (int, float))), 0.0)


def _diagonal(args: Args, outputs: Sequence[Shape]) -> str:
    left = spelled(args[0], dims_of([argument(args, 2, 0), argument(args, 3, 1)], len(args[0])))
    return row([left], [[*(n for n in left if not n.endswith("!")), "z!"]])


def _diag_embed(args: Args, outputs: Sequence[Shape]) -> str:
    rank = len(outputs[0])
    new = dims_of([argument(args, 2, -2), argument(args, 3, -1)], rank)
    names = letters(rank - 2)
    rest = iter(names)
    return row([[*names, "a!"]], [[f"z{i}!" if i in new else next(rest) for i in range(rank)]])


def _roll(args: Args, outputs: Sequence[Shape]) -> str:
    return whole_dims(args[:1], outputs, dims_of(argument(args, 2) or None, len(args[0])))


def _unfold(args: Args, outputs: Sequence[Shape]) -> str:
    dims = dims_of(args[1], len(args[0]))
    return row([spelled(args[0], dims, "a")], [[*spelled(args[0], dims, "z"), "w!"]])


def _diff(args: Args, outputs: Sequence[Shape]) -> str:
    """(x, order, dim, before, after)"""
    dims = dims_of(argument(args, 2, -1), len(args[0]))
    ends = [None if argument(args, k) is None else spelled(args[k], dims, "be"[k - 3]) for k in (3, 4)]
    return row([spelled(args[0], dims, "a"), None, None, *ends], [spelled(outputs[0], dims, "z")])


def _glu(args: Args, outputs: Sequence[Shape]) -> str:
    names = letters(len(args[0]))
    dim = argument(args, 1, -1) % len(names)
    return row([_put(names, dim, f"(2 {names[dim]})")], [names])


def _view_dtype(args: Args, outputs: Sequence[Shape]) -> str:
    if tuple(args[0]) == tuple(outputs[0]):
        return _permuted(range(len(args[0])))
    return whole_last(1)(args[:1], outputs) if len(args[0]) == len(outputs[0]) else opaque(args, outputs)


def _shuffle(args: Args, outputs: Sequence[Shape]) -> str:
    """pixel_shuffle: channels become a block of pixels each."""
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
    "aten.mT": Rule(_matrix_transpose, linear=-1),
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
    "aten.select.int": Rule(_select, linear=-1),
    "aten.unbind.int": Rule(_unbind, linear=-1),
    "aten.slice_scatter": Rule(_scatter, linear=2),
    "aten.select_scatter": Rule(_scatter, linear=2),
    "aten.split.Tensor": Rule(_split, linear=-1, resize=_pieces),
    "aten.split_with_sizes": Rule(_split, linear=-1, resize=_pieces),
    "aten.chunk": Rule(_chunk, linear=-1),
    "aten.cat": Rule(_cat, linear=-1),
    "aten.concat": Rule(_cat, linear=-1),
    "aten.concatenate": Rule(_cat, linear=-1),
    "aten.stack": Rule(_stack, linear=-1),
    "aten.hstack": Rule(_cat_along(1), linear=-1),
    "aten.vstack": Rule(_cat_along(0), linear=-1),
    "aten.dstack": Rule(_cat_along(2), linear=-1),
    "aten.column_stack": Rule(_cat_along(1), linear=-1),
    "aten.pad": Rule(_pad, linear=_pad_linear),
    "aten.constant_pad_nd": Rule(_pad, linear=_pad_linear),
    "aten.diagonal": Rule(_diagonal, linear=-1),
    "aten.diag_embed": Rule(_diag_embed, linear=-1),
    "aten.diag": Rule(opaque, linear=-1),
    "aten.block_diag": Rule(opaque, linear=-1),
    "aten.unfold": Rule(_unfold, linear=-1),
    "aten.diff": Rule(_diff, linear=-1),
    "aten.glu": Rule(_glu),
    "aten.view.dtype": Rule(_view_dtype),
    "aten.view_as_real": Rule("... -> ... 2", linear=-1),
    "aten.view_as_complex": Rule("... 2 -> ...", linear=-1),
    "aten.real": Rule("... -> ...", linear=-1),
    "aten.imag": Rule("... -> ...", linear=-1),
    "aten.pixel_shuffle": Rule(_shuffle, linear=-1),
    "aten.pixel_unshuffle": Rule(_unshuffle, linear=-1),
}
for _mode in ("reflection", "replication"):
    RULES |= {f"aten.{_mode}_pad{n}d": Rule(whole_last(n), linear=-1) for n in (1, 2, 3)}
