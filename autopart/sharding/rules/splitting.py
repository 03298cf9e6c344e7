"""Operators that take tensors apart, put them together, or widen them."""

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


def _select(args: Args, outputs: Sequence[Shape]) -> str:
    left = spelled(args[0], dims_of(args[1], len(args[0])))
    return row([left], [[n for n in left if not n.endswith("!")]])


def _unbind(args: Args, outputs: Sequence[Shape]) -> str:
    left = spelled(args[0], dims_of(argument(args, 1, 0), len(args[0])))
    return row([left], [[n for n in left if not n.endswith("!")] for _ in outputs])


def _scatter(args: Args, outputs: Sequence[Shape]) -> str:
    """slice_scatter and select_scatter: (x, piece, dim, ...). The dim is never split."""
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
    """The rule of `split` where all chunks are equal. Of unequal chunks a shard would have others: never split."""
    if len(set(outputs)) == 1 and len(outputs) == args[1]:
        return _split(args, outputs)
    return whole_at(2)((args[0], None, argument(args, 2, 0)), outputs)


def _pieces(args: Args, outputs: Sequence[Shape]) -> Args:
    sizes = [o[argument(args, 2, 0)] for o in outputs]
    return replaced(args, 1, sizes if isinstance(args[1], (list, tuple)) else sizes[0])


def _cat(args: Args, outputs: Sequence[Shape]) -> str:
    """Every piece is a part of the dim. Pieces of shape (0,) give nothing, whatever the rank of the others."""
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
    """Rows of hstack and the like, which concatenate along `dim` where the tensors have it, else along dim 0."""

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


def _unfold(args: Args, outputs: Sequence[Shape]) -> str:
    dims = dims_of(args[1], len(args[0]))
    return row([spelled(args[0], dims, "a")], [[*spelled(args[0], dims, "z"), "w!"]])


def _diff(args: Args, outputs: Sequence[Shape]) -> str:
    """(x, order, dim, before, after)."""
    dims = dims_of(argument(args, 2, -1), len(args[0]))
    ends = [None if argument(args, k) is None else spelled(args[k], dims, "be"[k - 3]) for k in (3, 4)]
    return row([spelled(args[0], dims, "a"), None, None, *ends], [spelled(outputs[0], dims, "z")])


def _glu(args: Args, outputs: Sequence[Shape]) -> str:
    names = letters(len(args[0]))
    dim = argument(args, 1, -1) % len(names)
    return row([_put(names, dim, f"(2 {names[dim]})")], [names])


RULES: dict[str, Rule] = {
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
}
for _mode in ("reflection", "replication"):
    RULES |= {f"aten.{_mode}_pad{n}d": Rule(whole_last(n), linear=-1) for n in (1, 2, 3)}
