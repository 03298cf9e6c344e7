"""The table of op rules: one row an operator, in the notation of `autopart.notation`.

A new operator takes one row in `RULES`; a function where the row depends on shapes. Every row is proven by
`tests/test_rules.py`, which splits the inputs, runs the operator on the shards and puts the result together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from autopart.notation import (
    Bound,
    C,
    P,
    Placement,
    R,
    RowError,
    S,
    Shape,
    Strategy,
    bind,
    letter_groups,
    parse,
    split_letter,
    splits,
)

Args = tuple[Any, ...]
"""An operator's positional arguments, each tensor replaced by its `torch.Size`."""


@dataclass(frozen=True)
class Local:
    """What runs on a shard in place of the operator when a letter is split: a name that `localise` and the
    emitter know, and the placement of the output where it is not the one the row says."""

    name: str
    output: Placement | None = None


@dataclass(frozen=True)
class Rule:
    """How an operator may be split, and what it costs.

    row     the notation, or a function (args, output shapes) -> notation
    linear  how many tensor arguments it must have for partial sums to pass through it (0: never, -1: any)
    local   letter -> what runs instead on a shard (`*`: every letter that only the inputs have), or a
            function args -> such a dict
    flops   (args, output shapes) -> FLOPs of the forward pass; default: see `flops`
    """

    row: str | Callable[[Args, Sequence[Shape]], str]
    linear: int = 0
    local: dict[str, Local] | Callable[[Args], dict[str, Local]] = field(default_factory=dict)
    flops: Callable[[Args, Sequence[Shape]], float] | None = None


def _names(count: int, prefix: str = "d") -> list[str]:
    return [f"{prefix}{i}" for i in range(count)]


def _view(args: Args, outputs: Sequence[Shape]) -> str:
    """The common refinement of the two shapes, letter by letter; what has none is never split."""
    sides: tuple[list[str], list[str]] = ([], [])
    source, target = [s for s in args[0] if s != 1], [s for s in outputs[0] if s != 1]
    if 0 in source:
        return _opaque(args, outputs)
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
            return _opaque(args, outputs)
        for group in groups:
            group[-1].append(f"d{letter}")
        letter += 1
        left, right = left // atom, right // atom
    for side, group, shape in zip(sides, groups, (args[0], outputs[0]), strict=True):
        packed = iter(group)
        for size in shape:
            names = ["1"] if size == 1 else next(packed)
            side.append(names[0] if len(names) == 1 else f"({' '.join(names)})")
    return f"{' '.join(sides[0])} -> {' '.join(sides[1])}"


def _expand(args: Args, outputs: Sequence[Shape]) -> str:
    names = _names(len(outputs[0]))
    lead = len(names) - len(args[0])
    source = ["1" if s == 1 else n for s, n in zip(args[0], names[lead:], strict=True)]
    return f"{' '.join(source)} -> {' '.join(names)}"


def _permuted(order: Sequence[int]) -> str:
    names = _names(len(order))
    return f"{' '.join(names)} -> {' '.join(names[i] for i in order)}"


def _transpose(args: Args, outputs: Sequence[Shape]) -> str:
    order = list(range(len(args[0])))
    if not order:
        return " -> "
    a, b = args[1] % len(order), args[2] % len(order)
    order[a], order[b] = order[b], order[a]
    return _permuted(order)


def _permute(args: Args, outputs: Sequence[Shape]) -> str:
    return _permuted([i % len(args[0]) for i in args[1]])


def _t(args: Args, outputs: Sequence[Shape]) -> str:
    return _permuted(list(range(len(args[0])))[::-1])


def _fixed_at(dim: int) -> Callable[[Args, Sequence[Shape]], str]:
    """Elementwise but along the dim in argument `dim`, which stays whole."""

    def row(args: Args, outputs: Sequence[Shape]) -> str:
        names = _names(len(args[0]))
        fixed = (args[dim] if len(args) > dim and args[dim] is not None else 0) % max(len(names), 1)
        text = " ".join(n + ("!" if i == fixed else "") for i, n in enumerate(names))
        return f"{text} -> {text}"

    return row


def _slice(args: Args, outputs: Sequence[Shape]) -> str:
    dim = (args[1] if len(args) > 1 else 0) % len(args[0])
    names = _names(len(args[0]))
    if args[0] == outputs[0]:
        return f"{' '.join(names)} -> {' '.join(names)}"
    left = [n + ("a!" if i == dim else "") for i, n in enumerate(names)]
    right = [n + ("z!" if i == dim else "") for i, n in enumerate(names)]
    return f"{' '.join(left)} -> {' '.join(right)}"


def _select(args: Args, outputs: Sequence[Shape]) -> str:
    names = _names(len(args[0]))
    dim = args[1] % len(names)
    left = " ".join(n + ("!" if i == dim else "") for i, n in enumerate(names))
    return f"{left} -> {' '.join(n for i, n in enumerate(names) if i != dim)}"


def _scatter(args: Args, outputs: Sequence[Shape]) -> str:
    """slice_scatter and select_scatter: (whole, piece, dim, ...) -> whole."""
    names = _names(len(args[0]))
    dim = (args[2] if len(args) > 2 else 0) % len(names)
    whole = " ".join(n + ("!" if i == dim else "") for i, n in enumerate(names))
    piece = [n for n in names]
    if len(args[1]) == len(names):
        piece[dim] = "piece!"
    else:
        del piece[dim]
    return f"{whole}, {' '.join(piece)} -> {whole}"


def _split(args: Args, outputs: Sequence[Shape]) -> str:
    names = _names(len(args[0]))
    dim = (args[2] if len(args) > 2 else 0) % len(names)
    parts = _names(len(outputs), "p")
    whole = [f"({'+'.join(parts)})" if i == dim and len(parts) > 1 else n for i, n in enumerate(names)]
    pieces = [" ".join(p if i == dim and len(parts) > 1 else n for i, n in enumerate(names)) for p in parts]
    return f"{' '.join(whole)} -> {', '.join(pieces)}"


def _squeeze(args: Args, outputs: Sequence[Shape]) -> str:
    """The dims asked for that are longer than 1 stay, and stay whole: a shard of length 1 would go."""
    dims = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
    asked = {d % max(len(args[0]), 1) for d in dims}
    names = [n + ("!" if i in asked else "") for i, n in enumerate(_names(len(args[0])))]
    gone = {i for i in asked if len(args[0]) and args[0][i] == 1}
    left = ["1" if i in gone else n for i, n in enumerate(names)]
    return f"{' '.join(left)} -> {' '.join(n for i, n in enumerate(names) if i not in gone)}"


def _cat(args: Args, outputs: Sequence[Shape]) -> str:
    """Pieces of shape (0,) are left out, whatever the rank of the others."""
    names = _names(len(outputs[0]))
    dim = (args[1] if len(args) > 1 else 0) % len(names)
    empty = [tuple(s) == (0,) for s in args[0]]
    parts = [p for p, e in zip(_names(len(args[0]), "p"), empty, strict=True) if not e]
    if len(parts) == 1:
        parts = [names[dim]]
    rest = iter(parts)
    pieces = ["e!" if e else " ".join([*names[:dim], next(rest), *names[dim + 1 :]]) for e in empty]
    whole = [f"({'+'.join(parts)})" if i == dim and len(parts) > 1 else n for i, n in enumerate(names)]
    return f"{', '.join(pieces)} -> {' '.join(whole)}"


def _unsqueeze(args: Args, outputs: Sequence[Shape]) -> str:
    names = _names(len(args[0]))
    dim = args[1] % len(outputs[0])
    return f"{' '.join(names)} -> {' '.join([*names[:dim], '1', *names[dim:]])}"


def _reduce(args: Args, outputs: Sequence[Shape]) -> str:
    """sum, mean and the like: (x, dims, ...); no dims means all of them."""
    names = _names(len(args[0]))
    dims = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple, int)) else None
    dims = [dims] if isinstance(dims, int) else dims
    reduced = {d % max(len(names), 1) for d in dims} if dims else set(range(len(names)))
    keep = len(outputs[0]) == len(names)
    out = [("1" if i in reduced else n) for i, n in enumerate(names) if keep or i not in reduced]
    return f"{' '.join(names)} -> {' '.join(out)}"


def _reduce_whole(args: Args, outputs: Sequence[Shape]) -> str:
    """A reduction that is no sum (amax, var, ...): the reduced dims stay whole."""
    left, right = _reduce(args, outputs).split(" -> ")
    kept = right.split()
    return f"{' '.join(n if n in kept else n + '!' for n in left.split())} -> {right}"


def _gather(args: Args, outputs: Sequence[Shape]) -> str:
    if len(args[0]) != len(args[2]):
        return _opaque(args, outputs)
    dim = args[1] % max(len(args[0]), 1)
    left, index = [], []
    for i, name in enumerate(_names(len(args[0]))):
        same = i != dim and args[0][i] == args[2][i]
        left.append(name if same else f"{name}a!")
        index.append(name if i == dim or same else f"{name}z!")
    return f"{' '.join(left)}, -, {' '.join(index)} -> {' '.join(index)}"


def _index(args: Args, outputs: Sequence[Shape]) -> str:
    """x[..., index, ...] with one tensor among the indices; with more, or a mask, nothing splits."""
    indexed = [i for i, index in enumerate(args[1]) if index is not None]
    at = indexed[0]
    if len(indexed) != 1 or (*args[0][:at], *args[1][at], *args[0][at + 1 :]) != tuple(outputs[0]):
        return _opaque(args, outputs)
    names = _names(len(args[0]))
    places = _names(len(args[1][at]), "i")
    left = " ".join(n + ("!" if i == at else "") for i, n in enumerate(names))
    return f"{left}, {'-, ' * at}{' '.join(places)} -> {' '.join([*names[:at], *places, *names[at + 1 :]])}"


def _opaque(args: Args, outputs: Sequence[Shape]) -> str:
    """Never split: what an operator without a row gets."""
    return " -> " + ", ".join(" ".join(f"o{k}_{i}!" for i in range(len(shape))) for k, shape in enumerate(outputs))


def _new(args: Args, outputs: Sequence[Shape]) -> str:
    """new_zeros and the like: the input gives dtype and device only."""
    left = " ".join(n + "!" for n in _names(len(args[0]), "x"))
    return f"{left} -> {' '.join(_names(len(outputs[0])))}"


def _full(args: Args, outputs: Sequence[Shape]) -> str:
    return f" -> {' '.join(_names(len(outputs[0])))}"


def _pad(args: Args, outputs: Sequence[Shape]) -> str:
    names = _names(len(args[0]))
    pairs = list(zip(args[1][::2], args[1][1::2], strict=True))[::-1]
    same = [True] * (len(names) - len(pairs)) + [pair == (0, 0) for pair in pairs]
    left = " ".join(n if s else n + "a!" for n, s in zip(names, same, strict=True))
    right = " ".join(n if s else n + "z!" for n, s in zip(names, same, strict=True))
    return f"{left} -> {right}"


def _layer_norm(args: Args, outputs: Sequence[Shape]) -> str:
    norm = " ".join(f"n{i}!" for i in range(len(args[1])))
    return f"... {norm}, -, {norm}, {norm} -> ... {norm}"


def _linear(args: Args, outputs: Sequence[Shape]) -> str:
    """(input, weight, bias): a bias would be added once a shard, so with one k stays whole."""
    biased = len(args) > 2 and args[2] is not None
    return "... k!, n k!, n -> ... n" if biased else "... k, n k -> ... n"


def _embedding(args: Args, outputs: Sequence[Shape]) -> str:
    """(weight, ids, padding, scale_grad_by_freq, ...): frequencies are those of all ids."""
    return _opaque(args, outputs) if len(args) > 3 and args[3] else "v d, ... -> ... d"


def _attention(args: Args, outputs: Sequence[Shape]) -> str:
    """(query, key, value, mask, dropout, causal): the query dim splits only where no causal mask counts it.
    With fewer key heads than query heads, each serves a group of g (`enable_gqa`)."""
    q = "q!" if len(args) > 5 and args[5] else "q"
    size = args[3] if len(args) > 3 else None
    if len(args[0]) != 4:
        mask = "" if size is None else f", ... {q} k!"
        return f"... {q} d!, ... k! d!, ... k! e!{mask} -> ... {q} e!"
    heads = "(h g)" if args[0][1] > args[1][1] > 1 else "h"
    mask = ""
    if size is not None:
        names = ["b", heads, q, "k!"][-len(size) :]
        mask = ", " + " ".join("1" if s == 1 else n for n, s in zip(names, size, strict=True))
    return f"b {heads} {q} d!, b h k! d!, b h k! e!{mask} -> b {heads} {q} e!"


def _attention_flops(args: Args, outputs: Sequence[Shape]) -> float:
    *batch, q, d = args[0]
    causal = len(args) > 5 and bool(args[5])
    return 2.0 * math.prod(batch) * q * args[1][-2] * (d + args[2][-1]) * (0.5 if causal else 1.0)


def _cross_entropy(args: Args, outputs: Sequence[Shape]) -> str:
    plain = len(args[0]) == 2 and len(args[1]) == 1 and (len(args) < 3 or args[2] is None)
    if not plain:
        return _opaque(args, outputs)
    reduction = args[3] if len(args) > 3 else 1
    smooth = len(args) > 5 and args[5]
    vocabulary = "v" if reduction == 1 and not smooth else "v!"
    return f"b {vocabulary}, b -> {'b' if reduction == 0 else ''}"


def _mean_loss(args: Args, outputs: Sequence[Shape]) -> str:
    """mse_loss and the like: (input, target, reduction)."""
    reduction = args[2] if len(args) > 2 else 1
    return "..., ... -> " + ("..." if reduction == 0 else "")


def _conv(args: Args, outputs: Sequence[Shape]) -> str:
    """conv1d, 2d, 3d, with a batch or without: channels split only without groups, space never."""
    space = len(args[1]) - 2
    groups = args[6] if len(args) > 6 else 1
    biased = len(args) > 2 and args[2] is not None
    o = "o" if groups == 1 else "o!"
    c, i = ("c", "c") if groups == 1 and not biased else ("c!", "i!")
    b = "b " if len(args[0]) == space + 2 else ""
    a, w, z = (" ".join(f"{p}{i}!" for i in range(space)) for p in "awz")
    return f"{b}{c} {a}, {o} {i} {w}{f', {o}' if biased else ''} -> {b}{o} {z}"


def _conv_flops(args: Args, outputs: Sequence[Shape]) -> float:
    return 2.0 * math.prod(outputs[0]) * math.prod(args[1][1:])


def _matmul(args: Args, outputs: Sequence[Shape]) -> str:
    if len(args[0]) > 2 and len(args[1]) == 2:
        return "... k, k n -> ... n"
    if len(args[0]) < 2 or len(args[1]) < 2:
        return _opaque(args, outputs)
    return "... m k, ... k n -> ... m n"


def _if_mean(at: int, local: dict[str, Local]) -> Callable[[Args], dict[str, Local]]:
    """`local` where the reduction, argument `at`, is the mean."""
    return lambda args: local if len(args) <= at or args[at] == 1 else {}


MEAN = {"*": Local("mean")}
MEAN_LOSS = _if_mean(2, MEAN)
LOSS = _if_mean(3, {"b": Local("cross_entropy_sum"), "v": Local("vocab_cross_entropy", R)})

POINTWISE = """abs acos asin atan bitwise_not cos erf exp expm1 floor ceil round gelu hardswish hardtanh
    leaky_relu elu celu selu softplus mish log log1p log2 logical_not reciprocal relu relu6 rsqrt sigmoid
    log_sigmoid silu sin sqrt square tanh sign isnan isinf clamp pow.Tensor_Scalar threshold
    add.Scalar sub.Scalar rsub.Scalar ne.Scalar eq.Scalar gt.Scalar ge.Scalar lt.Scalar le.Scalar
    bitwise_and.Scalar bitwise_or.Scalar remainder.Scalar floor_divide.Scalar
    zeros_like ones_like full_like""".split()
BINARY = """add.Tensor sub.Tensor mul.Tensor div.Tensor pow.Tensor_Tensor maximum minimum min.other max.other
    eq.Tensor ne.Tensor lt.Tensor le.Tensor gt.Tensor ge.Tensor __and__.Tensor __or__.Tensor __xor__.Tensor
    bitwise_and.Tensor bitwise_or.Tensor logical_and logical_or atan2 remainder.Tensor div.Tensor_mode
    floor_divide""".split()

RULES: dict[str, Rule] = {
    # contractions
    "aten.mm": Rule("m k, k n -> m n"),
    "aten.bmm": Rule("b m k, b k n -> b m n"),
    "aten.matmul": Rule(_matmul),
    "aten.linear": Rule(_linear),
    "aten.conv1d": Rule(_conv, flops=_conv_flops),
    "aten.conv2d": Rule(_conv, flops=_conv_flops),
    "aten.conv3d": Rule(_conv, flops=_conv_flops),
    "aten.scaled_dot_product_attention": Rule(_attention, flops=_attention_flops),
    # lookups and losses
    "aten.embedding": Rule(_embedding, local={"v": Local("vocab_embedding")}),
    "aten.cross_entropy_loss": Rule(_cross_entropy, local=LOSS),
    "aten.mse_loss": Rule(_mean_loss, local=MEAN_LOSS),
    "aten.l1_loss": Rule(_mean_loss, local=MEAN_LOSS),
    "aten.smooth_l1_loss": Rule(_mean_loss, local=MEAN_LOSS),
    "aten.binary_cross_entropy_with_logits": Rule(_opaque),
    # normalisation and reductions
    "aten.layer_norm": Rule(_layer_norm),
    "autopart.rms_norm": Rule("... d!, d! -> ... d!"),
    "aten.softmax.int": Rule(_fixed_at(1)),
    "aten._softmax": Rule(_fixed_at(1)),
    "aten.log_softmax.int": Rule(_fixed_at(1)),
    "aten._log_softmax": Rule(_fixed_at(1)),
    "aten.cumsum": Rule(_fixed_at(1), linear=-1),
    "aten.sum": Rule(_reduce, linear=-1),
    "aten.sum.dim_IntList": Rule(_reduce, linear=-1),
    "aten.mean": Rule(_reduce, linear=-1, local=MEAN),
    "aten.mean.dim": Rule(_reduce, linear=-1, local=MEAN),
    "aten.amax": Rule(_reduce_whole),
    "aten.amin": Rule(_reduce_whole),
    "aten.var.correction": Rule(_reduce_whole),
    # shape
    "aten.view": Rule(_view, linear=-1),
    "aten.reshape": Rule(_view, linear=-1),
    "aten._unsafe_view": Rule(_view, linear=-1),
    "aten.expand": Rule(_expand, linear=-1),
    "aten.transpose.int": Rule(_transpose, linear=-1),
    "aten.permute": Rule(_permute, linear=-1),
    "aten.t": Rule(_t, linear=-1),
    "aten.unsqueeze": Rule(_unsqueeze, linear=-1),
    "aten.squeeze.dim": Rule(_squeeze, linear=-1),
    "aten.squeeze.dims": Rule(_squeeze, linear=-1),
    "aten.slice.Tensor": Rule(_slice, linear=-1),
    "aten.select.int": Rule(_select, linear=-1),
    "aten.slice_scatter": Rule(_scatter, linear=-1),
    "aten.select_scatter": Rule(_scatter, linear=-1),
    "aten.split.Tensor": Rule(_split, linear=-1),
    "aten.split_with_sizes": Rule(_split, linear=-1),
    "aten.cat": Rule(_cat, linear=-1),
    "aten.gather": Rule(_gather),
    "aten.index.Tensor": Rule(_index),
    "aten.pad": Rule(_pad),
    "aten.constant_pad_nd": Rule(_pad),
    "aten.clone": Rule("... -> ...", linear=-1),
    "aten.alias": Rule("... -> ...", linear=-1),
    "aten.detach": Rule("... -> ...", linear=-1),
    "aten.contiguous": Rule("... -> ...", linear=-1),
    "aten._to_copy": Rule("... -> ...", linear=-1),
    # the rest
    "aten.neg": Rule("... -> ...", linear=1),
    "aten.mul.Scalar": Rule("... -> ...", linear=1),
    "aten.div.Scalar": Rule("... -> ...", linear=1),
    "aten.where.self": Rule("..., ..., ... -> ..."),
    "aten.where.ScalarOther": Rule("..., ... -> ..."),
    "aten.where.ScalarSelf": Rule("..., -, ... -> ..."),
    "aten.masked_fill.Scalar": Rule("..., ... -> ..."),
    "aten.masked_fill.Tensor": Rule("..., ...,  -> ..."),
    "aten.fill.Tensor": Rule("..., -> ...", linear=2),
    "aten.fill.Scalar": Rule("... -> ..."),
    "aten.copy": Rule("..., ... -> ...", linear=2),
    "aten.addcmul": Rule("..., ..., ... -> ..."),
    "aten.native_dropout": Rule("... -> ..., ..."),
    "aten.dropout": Rule("... -> ..."),
    "aten.new_zeros": Rule(_new),
    "aten.new_ones": Rule(_new),
    "aten.new_full": Rule(_new),
    "aten.full": Rule(_full),
    "aten.zeros": Rule(_full),
    "aten.ones": Rule(_full),
    "aten.arange": Rule(_opaque),
    "aten.arange.start": Rule(_opaque),
    "aten.arange.start_step": Rule(_opaque),
}
LINEAR_BINARY = {"add.Tensor": 2, "sub.Tensor": 2, "mul.Tensor": 1, "div.Tensor": 1}
RULES |= {f"aten.{n}": Rule("... -> ...") for n in POINTWISE}
RULES |= {f"aten.{n}": Rule("..., ... -> ...", linear=LINEAR_BINARY.get(n, 0)) for n in BINARY}

for _name, _rule in RULES.items():
    if isinstance(_rule.row, str):
        try:
            parse(_rule.row)
        except RowError as error:
            raise RowError(f"rule {_name}: {error}") from error

RESIZED = {"aten.view": 1, "aten.reshape": 1, "aten._unsafe_view": 1, "aten.expand": 1,
           "aten.new_zeros": 1, "aten.new_ones": 1, "aten.new_full": 1,
           "aten.full": 0, "aten.zeros": 0, "aten.ones": 0}  # fmt: skip
"""Operators whose output size is a literal argument: which one."""


def op_name(target: Any) -> str:
    """The table's name of a call target: ``aten.linear`` for the default overload."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return f"autopart.{getattr(target, '__name__', target)}"


def has_rule(name: str) -> bool:
    """Whether the operator has a row of its own; without one it is replicated."""
    return name in RULES


def flatten(args: Args) -> list[Any]:
    """An operator's arguments as operands of its row: lists of tensors are spelt out."""
    flat: list[Any] = []
    for arg in args:
        tensors = isinstance(arg, (list, tuple)) and not isinstance(arg, torch.Size)
        if tensors and any(not isinstance(a, (int, float, bool, type(None))) for a in arg):
            flat += arg
        else:
            flat.append(arg)
    return flat


def _bound(name: str, args: Args, outputs: Sequence[Shape]) -> tuple[Rule, Bound]:
    rule = RULES.get(name, Rule(_opaque))
    operands = [tuple(a) if isinstance(a, torch.Size) else None for a in flatten(args)]
    text = rule.row if isinstance(rule.row, str) else rule.row(args, outputs)
    row = parse(text)
    if len(row.inputs) > len(operands):
        row = type(row)(row.text, row.inputs[: len(operands)], row.outputs)
    return rule, bind(row, operands, outputs)


def strategies(
    name: str,
    args: Args,
    outputs: Sequence[Shape],
    shards: int,
    hints: Sequence[Placement] = (),
) -> list[Strategy]:
    """Every way to run an operator along one axis of `shards` ranks.

    `hints` are placements with parts that a consumer would like the first output to have: a letter that owns
    the dim alone may be split part by part as well.
    """
    rule, bound = _bound(name, args, outputs)
    tensors = [isinstance(a, torch.Size) for a in flatten(args)]
    count = sum(tensors)
    instead = rule.local(args) if callable(rule.local) else rule.local

    def all_inputs(placement: Placement) -> tuple[Placement | None, ...]:
        return tuple(placement if t else None for t in tensors)

    result = [Strategy(p.kind, all_inputs(p), (p,) * len(outputs)) for p in (R, C)]
    if count and rule.linear in (-1, count):
        result.append(Strategy("P", all_inputs(P), (P,) * len(outputs)))
    for letters in letter_groups(bound):
        strategy = split_letter(bound, letters, shards)
        if strategy is None:
            continue
        inputs = tuple(p or (C if t else None) for p, t in zip(strategy.inputs, tensors, strict=True))
        local = instead.get(strategy.name)
        if local is None and all(o == P for o in strategy.outputs):
            local = instead.get("*")
        given = local.output if local and local.output else None
        strategy = Strategy(
            strategy.name,
            inputs,
            tuple(given or o for o in strategy.outputs),
            local.name if local else "",
            True,
        )
        result.append(strategy)
        result += [
            again
            for hint in hints
            if len(letters) == 1
            and (again := _with_parts(strategy, hint, bound, next(iter(letters)))) is not None
            and splits(hint, tuple(outputs[0]), shards)
        ]
    return result


def _with_parts(strategy: Strategy, hint: Placement, bound: Bound, letter: str) -> Strategy | None:
    """The same split, taken part by part, where every operand's dim is this letter and nothing else."""
    if strategy.outputs[0] != S(hint.dim) or strategy.local or sum(hint.parts) != bound.sizes[letter]:
        return None
    for dims in [*bound.inputs, *bound.outputs]:
        for dim in dims or ():
            if dim and len(dim.factors) > 1 and letter in {f.name for f in dim.factors}:
                return None

    def parted(placement: Placement | None) -> Placement | None:
        return S(placement.dim, hint.parts) if placement and placement.kind == "S" else placement

    return Strategy(
        strategy.name,
        tuple(map(parted, strategy.inputs)),
        tuple(S(o.dim, hint.parts) for o in strategy.outputs),
        shards_work=True,
    )


def flops(name: str, args: Args, outputs: Sequence[Shape]) -> float:
    """FLOPs of the forward pass: 2 x the product of the letters for contractions (one multiply, one add),
    one per output element otherwise."""
    rule = RULES.get(name)
    if rule is not None and rule.flops is not None:
        return rule.flops(args, outputs)
    if is_contraction(name):
        _, bound = _bound(name, args, outputs)
        return 2.0 * math.prod(bound.sizes.values())
    return float(sum(math.prod(o) for o in outputs))


CONTRACTIONS = {"aten.mm", "aten.bmm", "aten.matmul", "aten.linear", "aten.conv1d", "aten.conv2d",
                "aten.conv3d", "aten.scaled_dot_product_attention"}  # fmt: skip


def is_contraction(name: str) -> bool:
    """Whether matrix units do the work."""
    return name in CONTRACTIONS


def local_shape(shape: Sequence[int], placement: Placement, shards: int) -> Shape:
    """The shape of one rank's shard."""
    sizes = list(shape)
    if placement.kind == "S":
        sizes[placement.dim] //= shards
    return tuple(sizes)


def local_args(name: str, args: Args, local_outputs: Sequence[Shape]) -> Args:
    """The operator's arguments on a shard: literal sizes follow the shard's output."""
    changed = list(args)
    if name in RESIZED:
        changed[RESIZED[name]] = list(local_outputs[0])
    elif name in ("aten.split.Tensor", "aten.split_with_sizes"):
        dim = args[2] if len(args) > 2 else 0
        sizes = [o[dim] for o in local_outputs]
        changed[1] = sizes[0] if name == "aten.split.Tensor" else sizes
    return tuple(changed)
