"""Operators that read or write by indices, and operators that make indices."""

from collections.abc import Sequence

from autopart.sharding.notation import Shape
from autopart.sharding.rules.base import (
    Args,
    Linear,
    Local,
    Rule,
    argument,
    dims_of,
    is_tensor,
    letters,
    opaque,
    row,
    spelled,
    whole_at,
    whole_dims,
)


def _embedding(args: Args, outputs: Sequence[Shape]) -> str:
    """(weight, ids, padding, scale_grad_by_freq, ...). Frequencies are of all ids, so that with them nothing splits."""
    return opaque(args, outputs) if argument(args, 3) else "v d, ... -> ... d"


def _gather(args: Args, outputs: Sequence[Shape]) -> str:
    """(x, dim, index)"""
    rank = len(args[0])
    if rank != len(args[2]):
        return opaque(args, outputs)
    fixed = {i for i in range(rank) if i in dims_of(args[1], rank) or args[0][i] != args[2][i]}
    index = spelled(args[2], fixed - set(dims_of(args[1], rank)), "z")
    return row([spelled(args[0], fixed, "a"), None, index], [index])


def _scatter(args: Args, outputs: Sequence[Shape]) -> str:
    """(x, dim, index, source or number). A dim is split only where x, the index and the source have the same size in
    it: the index begins at the first element of x in every dim."""
    rank, tensors = len(args[0]), [a for a in args[2:4] if is_tensor(a)]
    if any(len(t) != rank for t in tensors):
        return opaque(args, outputs)
    fixed = {i for i in range(rank) if i in dims_of(args[1], rank) or any(t[i] != args[0][i] for t in tensors)}
    rest = [spelled(t, fixed, "is"[k]) for k, t in enumerate(tensors)]
    return row([spelled(args[0], fixed, "a"), None, *rest], [spelled(outputs[0], fixed, "a")])


def _take_along(args: Args, outputs: Sequence[Shape]) -> str:
    """(x, index, dim), which broadcast."""
    if argument(args, 2) is None or len(args[0]) != len(args[1]):
        return opaque(args, outputs)
    return row(
        [spelled(args[0], dims_of(args[2], len(args[0])), "a"), letters(len(args[1]))], [letters(len(outputs[0]))]
    )


def _index_select(args: Args, outputs: Sequence[Shape]) -> str:
    """(x, dim, index)"""
    if not args[0] or not args[2]:
        return opaque(args, outputs)
    names, dims = letters(len(args[0])), dims_of(args[1], len(args[0]))
    out = ["i" if k in dims else n for k, n in enumerate(names)]
    return row([spelled(args[0], dims), None, ["i"]], [out])


def _index_write(args: Args, outputs: Sequence[Shape]) -> str:
    """(x, dim, index, source or number): writes x[:, index]."""
    dims = dims_of(args[1], len(args[0]))
    whole = spelled(args[0], dims, "a")
    source = argument(args, 3)
    inputs: list[list[str] | None] = [whole, None, ["i!"] * len(args[2])]
    if is_tensor(source):
        inputs.append(spelled(source, dims, "s") if len(source) == len(whole) else [])
        if len(source) not in (0, len(whole)):
            return opaque(args, outputs)
    return row(inputs, [whole])


def _take(args: Args, outputs: Sequence[Shape]) -> str:
    return row([spelled(args[0], range(len(args[0])), "a"), letters(len(args[1]))], [letters(len(args[1]))])


def _indexed(args: Args) -> tuple[list[str], list[int], list[str]]:
    """The letters of x, the dims that are indexed, and the letters of x[indices].

    The dims of the indices replace the indexed dims where these are neighbours; else they come first.
    """
    names = letters(len(args[0]))
    at = [i for i, index in enumerate(args[1]) if index is not None]
    places = letters(max(len(args[1][i]) for i in at), "i")
    first = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    rest = [n for i, n in enumerate(names) if i not in at]
    return names, at, [*rest[:first], *places, *rest[first:]]


def _result(args: Args, names: Sequence[str], at: Sequence[int]) -> tuple[int, ...]:
    """The shape that x[indices] has if no index is a mask."""
    sizes = dict(zip(letters(len(args[0])), args[0], strict=True))
    ranks = max(len(args[1][i]) for i in at)
    for k in range(ranks):
        sizes[f"i{k}"] = max((s[k - ranks] for i in at if len(s := args[1][i]) >= ranks - k), key=lambda n: (n != 1, n))
    return tuple(sizes[n] for n in names)


def _index(args: Args, outputs: Sequence[Shape]) -> str:
    """(x, indices). With a mask among the indices nothing splits."""
    names, at, out = _indexed(args)
    if len(at) + len(out) < len(names) or _result(args, out, at) != tuple(outputs[0]):
        return opaque(args, outputs)
    places = [n for n in out if n.startswith("i")]
    left = [f"{n}!" if i in at else n for i, n in enumerate(names)]
    return row([left, *(None if s is None else places[len(places) - len(s) :] for s in args[1])], [out])


def _index_put(args: Args, outputs: Sequence[Shape]) -> str:
    """(x, indices, values, accumulate). An index that has the shape of the dims from its own on may be a mask: then
    these dims, and those before them, are never split."""
    names, at, out = _indexed(args)
    shapes = [tuple(args[1][i]) for i in at]
    masks = [len(s) > 1 and s == tuple(args[0][i : i + len(s)]) for i, s in zip(at, shapes, strict=True)]
    fixed = set(at)
    if any(masks):
        if len(at) > 1:
            return opaque(args, outputs)
        fixed = set(range(at[0] + len(shapes[0])))
        out = [n for i, n in enumerate(names) if i not in fixed]
    if len(args[2]) > len(out) and not any(masks):
        return opaque(args, outputs)
    whole = [f"{n}!" if i in fixed else n for i, n in enumerate(names)]
    values = [f"v{i}!" for i in range(len(args[2]))]
    for k in range(1, min(len(values), len(out)) + 1):
        if not out[-k].startswith("i"):
            values[-k] = out[-k]
    index = [None if s is None else [f"x{i}_{k}!" for k in range(len(s))] for i, s in enumerate(args[1])]
    return row([whole, *index, values], [whole])


def _adds(args: Args) -> Linear:
    """With `accumulate`, index_put is linear in x and the values together."""
    return (0, len(args[1]) + 1) if argument(args, 3) else ()


def _one_hot(args: Args, outputs: Sequence[Shape]) -> str:
    """(x, classes). Without the number of classes the data decides the output's shape, and nothing splits."""
    if argument(args, 1, -1) < 0:
        return opaque(args, outputs)
    names = letters(len(args[0]))
    return row([names], [[*names, "z!"]])


def _searchsorted(args: Args, outputs: Sequence[Shape]) -> str:
    """(sorted sequences, values)."""
    lead = letters(len(args[0]) - 1)
    if not is_tensor(args[1]):
        return opaque(args, outputs)
    return row([["s!"], ["..."]], [["..."]]) if not lead else row([[*lead, "s!"], [*lead, "v"]], [[*lead, "v"]])


def _isin(args: Args, outputs: Sequence[Shape]) -> str:
    names = letters(len(args[0]))
    return row([names, spelled(args[1], range(len(args[1])), "t")], [names])


RULES: dict[str, Rule] = {
    "aten.embedding": Rule(_embedding, linear=(0,), local={"v": Local("vocab_embedding")}),
    "aten.embedding_bag": Rule(opaque),
    "aten.embedding_bag.padding_idx": Rule(opaque),
    "aten.gather": Rule(_gather, linear=(0,)),
    "aten.take_along_dim": Rule(_take_along, linear=(0,)),
    "aten.take": Rule(_take, linear=(0,)),
    "aten.scatter.src": Rule(_scatter),
    "aten.scatter.value": Rule(_scatter),
    "aten.scatter.reduce": Rule(_scatter),
    "aten.scatter.value_reduce": Rule(_scatter),
    "aten.scatter_add": Rule(_scatter, linear=(0, 3)),
    "aten.scatter_reduce.two": Rule(_scatter),
    "aten.index_select": Rule(_index_select, linear=(0,)),
    "aten.index_add": Rule(_index_write, linear=(0, 3)),
    "aten.index_copy": Rule(_index_write),
    "aten.index_fill.int_Scalar": Rule(_index_write),
    "aten.index_fill.int_Tensor": Rule(_index_write),
    "aten.index_reduce": Rule(_index_write),
    "aten.index.Tensor": Rule(_index, linear=(0,)),
    "aten.index_put": Rule(_index_put, linear=_adds),
    "aten.masked_scatter": Rule(opaque),
    "aten.put": Rule(opaque),
    "aten.one_hot": Rule(_one_hot),
    "aten.bucketize.Tensor": Rule("..., b! -> ..."),
    "aten.searchsorted.Tensor": Rule(_searchsorted),
    "aten.isin.Tensor_Tensor": Rule(_isin),
    "aten.sort": Rule(whole_at(1, -1)),
    "aten.argsort": Rule(whole_at(1, -1)),
    "aten.msort": Rule(lambda args, outputs: whole_dims(args, outputs, [0])),
    "aten.topk": Rule(whole_at(2, -1)),
}
