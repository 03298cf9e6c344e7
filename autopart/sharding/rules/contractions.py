"""Contractions: products that sum over a letter of two operands. A rule's docstring names the operator's arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from autopart.kernels.scan_kernels import CHUNK as SCAN_CHUNK
from autopart.sharding.notation import Shape
from autopart.sharding.rules.base import Args, Local, Rule, Sizes, argument, letters, opaque, replaced, row


def _linear(args: Args, outputs: Sequence[Shape]) -> str:
    """(input, weight, bias). With a bias k is never split, since every shard would add the bias."""
    biased = len(args) > 2 and args[2] is not None
    if len(args[1]) == 1:
        return "... k!, k!, -> ..." if biased else "... k, k -> ..."
    return "... k!, n k!, n -> ... n" if biased else "... k, n k -> ... n"


def _matmul(args: Args, outputs: Sequence[Shape]) -> str:
    left, right = len(args[0]), len(args[1])
    if left > 2 and right == 2:
        return "... k, k n -> ... n"
    if right == 1:
        return "... k, k -> ..."
    return "k, ... k n -> ... n" if left == 1 else "... m k, ... k n -> ... m n"


def _plus(letters_of_sum: str, product: str) -> Rule:
    """The rule of a product that is added to a tensor which broadcasts. What is summed over is never split, since every
    shard would add the tensor."""
    left, right = product.split(" -> ")

    def text(args: Args, outputs: Sequence[Shape]) -> str:
        names = letters_of_sum.split()
        added = names[len(names) - len(args[0]) :]
        return f"{' '.join(added)}, {left} -> {right}"

    return Rule(text, contraction=True)


def _einsum(args: Args, outputs: Sequence[Shape]) -> str:
    """(equation, operands). The equation is the row."""
    equation = args[0].replace(" ", "")
    left, arrow, right = equation.partition("->")
    if not arrow:
        used = left.replace(",", "").replace(".", "")
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in set(used) if used.count(c) == 1))
    inputs = [_spaced(o) for o in left.split(",")]
    return row([None, *inputs], [_spaced(right)])


def _spaced(operand: str) -> list[str]:
    return ["..." if letter == "." else letter for letter in operand.replace("...", ".")]


def _tensordot(args: Args, outputs: Sequence[Shape]) -> str:
    left, right = letters(len(args[0]), "m"), letters(len(args[1]), "n")
    for k, (i, j) in enumerate(zip(args[2], args[3], strict=True)):
        left[i], right[j] = f"k{k}", f"k{k}"
    return row([left, right], [[n for n in (*left, *right) if not n.startswith("k")]])


def _inner(args: Args, outputs: Sequence[Shape]) -> str:
    if not args[0] or not args[1]:
        return "..., ... -> ..."
    left, right = letters(len(args[0]) - 1, "m"), letters(len(args[1]) - 1, "n")
    return row([[*left, "k"], [*right, "k"]], [[*left, *right]])


def _kron(args: Args, outputs: Sequence[Shape]) -> str:
    if len(args[0]) != len(args[1]):
        return opaque(args, outputs)
    left, right = letters(len(args[0]), "m"), letters(len(args[1]), "n")
    return row([left, [f"{n}!" for n in right]], [[f"({m} {n})" for m, n in zip(left, right, strict=True)]])


def _chain(args: Args, outputs: Sequence[Shape]) -> str:
    """A list of matrices, of which the first and the last may be vectors."""
    names = letters(len(args[0]) + 1)
    pairs = [[names[i], names[i + 1]] for i in range(len(args[0]))]
    pairs = [
        p if len(s) == 2 else [p[1] if i == 0 else p[0]] for i, (p, s) in enumerate(zip(pairs, args[0], strict=True))
    ]
    out = [*([names[0]] if len(args[0][0]) == 2 else []), *([names[-1]] if len(args[0][-1]) == 2 else [])]
    return row(pairs, [out])


def _bilinear(args: Args, outputs: Sequence[Shape]) -> str:
    if len(args) > 3 and args[3] is not None:
        return "... i!, ... j!, o i! j!, o -> ... o"
    return "... i, ... j, o i j -> ... o"


def _grouped(args: Args, outputs: Sequence[Shape]) -> str:
    """(tokens, weights by expert, ends). Which expert a token belongs to depends on all ends, so that neither is
    split."""
    ranks = len(args[0]), len(args[1])
    if ranks != (2, 3) or len(args) < 3 or args[2] is None or argument(args, 3) is not None:
        return opaque(args, outputs)
    return "t! k, e! k n, e! -> t! n"


def _expert_flops(args: Args, outputs: Sequence[Shape]) -> float:
    """2 x rows x n x k: every row is multiplied by the weight of one expert."""
    return 2.0 * math.prod(outputs[0]) * args[0][-1]


def _expert_sizes(args: Args, outputs: Sequence[Shape]) -> Sizes:
    """One product for each expert, of rows / experts rows."""
    n, k, experts = outputs[0][-1], args[0][-1], args[1][0] if len(args[1]) == 3 else 1
    return Sizes(experts, math.prod(outputs[0]) / n / experts, n, k)


def _experts(args: Args, outputs: Sequence[Shape]) -> str:
    """(rows, weights by expert, number of each row's expert, whether the weights are transposed)."""
    return f"s k, e {'k n' if args[3] else 'n k'}, s -> s n"


def _mixture(args: Args, outputs: Sequence[Shape]) -> str:
    """(tokens, weights of experts up and down, weights of a token's experts, their numbers, activation, whether the
    weights are transposed)."""
    weights = "e d! (2 f), e f d!" if args[6] else "e (2 f) d!, e d! f"
    return f"t d!, {weights}, t k!, t k! -> t d!"


def _mixture_sizes(args: Args, outputs: Sequence[Shape]) -> Sizes:
    """The product up has twice the columns of the product down: together the FLOPs of one product of 3 d columns."""
    (tokens, d), down, numbers = args[0], args[2], args[4]
    return Sizes(down[0], tokens * numbers[1] / down[0], 3 * d, down[1 if args[6] else 2])


def _mixture_flops(args: Args, outputs: Sequence[Shape]) -> float:
    """2 x rows x n x k of either product of every pair of a token and one of its experts."""
    return 2.0 * math.prod(_mixture_sizes(args, outputs)[:4])


def _unbiased(args: Args) -> Args:
    """The arguments of a mixture without biases, from those of one with biases and clamped gates."""
    return (*args[:3], *args[5:7], None, True)


def _scan(args: Args, outputs: Sequence[Shape]) -> str:
    """(x, scales, log, keys, queries, skip, chunk). Each of several groups g of keys and queries serves r heads; one
    group serves all heads, whichever rank has them."""
    heads, group = ("(g r)", "g") if args[3][2] > 1 else ("h", "1")
    scales, skip = ("-" if args[1] is None else f"b l! {heads}"), ("-" if args[5] is None else heads)
    return f"b l! {heads} p!, {scales}, b l! {heads}, b l! {group} n!, b l! {group} n!, {skip} -> b l! {heads} p!"


def _scan_flops(args: Args, outputs: Sequence[Shape]) -> float:
    """2 (q n + q p + 2 n p) for each position and head, in chunks of q positions: products of queries by keys, of those
    by x, of the state by queries, and of x by keys."""
    (batch, length, heads, p), n = args[0], args[3][3]
    q = min(length, SCAN_CHUNK)
    return 2.0 * batch * length * heads * (q * n + q * p + 2 * n * p)


def _space(shape: Shape, count: int) -> tuple[str, ...]:
    """The letters of the batch, "" without one, and of the input's, the window's and the output's space."""
    return ("b " if len(shape) == count + 2 else "", *(" ".join(f"{p}{i}!" for i in range(count)) for p in "awz"))


def _conv(args: Args, outputs: Sequence[Shape]) -> str:
    """(input, weight, bias, stride, padding, dilation, groups). Space is never split. Channels in groups are split only
    where each group is one channel."""
    b, a, w, z = _space(args[0], len(args[1]) - 2)
    groups, channels = argument(args, 6, 1), args[0][1 if b else 0]
    biased = len(args) > 2 and args[2] is not None
    o, c, i = "o", "c", "c"
    if groups != 1 and groups == channels == args[1][0]:
        c, i = "o", "1"
    elif groups != 1:
        o, c, i = "o!", "c!", "i!"
    elif biased:
        c = i = "c!"
    return f"{b}{c} {a}, {o} {i} {w}{f', {o}' if biased else ''} -> {b}{o} {z}"


def _conv_groups(space: int) -> Callable[[Args, Sequence[Shape]], Args]:
    """On a shard there are no more groups than channels of the output."""
    return lambda args, outputs: replaced(args, 6, min(args[6], outputs[0][-1 - space])) if len(args) > 6 else args


def _conv_flops(args: Args, outputs: Sequence[Shape]) -> float:
    return 2.0 * math.prod(outputs[0]) * math.prod(args[1][1:])


def _conv_sizes(args: Args, outputs: Sequence[Shape]) -> Sizes:
    """The product of the windows, laid out as rows, by the weight."""
    groups, (channels, *window) = argument(args, 6, 1), args[1]
    return Sizes(groups, math.prod(outputs[0]) / channels, channels / groups, math.prod(window))


def _conv_transpose(args: Args, outputs: Sequence[Shape]) -> str:
    """(input, weight, bias, stride, padding, output padding, groups, dilation)."""
    b, a, w, z = _space(args[0], len(args[1]) - 2)
    biased = len(args) > 2 and args[2] is not None
    c, o, d = ("c", "o", "o") if argument(args, 6, 1) == 1 else ("c!", "o!", "d!")
    c = "c!" if biased else c
    return f"{b}{c} {a}, {c} {d} {w}{f', {o}' if biased else ''} -> {b}{o} {z}"


def _conv_transpose_flops(args: Args, outputs: Sequence[Shape]) -> float:
    return 2.0 * math.prod(args[0]) * math.prod(args[1][1:])


def _conv_transpose_sizes(args: Args, outputs: Sequence[Shape]) -> Sizes:
    """The product of the input by the weight. Its rows are then added up where the windows overlap."""
    groups, (channels, *window) = argument(args, 6, 1), args[1]
    return Sizes(groups, math.prod(args[0]) / channels, math.prod(window), channels / groups)


def _convolution(args: Args, outputs: Sequence[Shape]) -> str:
    """(input, weight, bias, stride, padding, dilation, transposed, output padding, groups)."""
    text = _conv_transpose if args[6] else _conv
    return text((*args[:3], None, None, None, 1 if args[8] == 1 else -1), outputs)


def _convolution_flops(args: Args, outputs: Sequence[Shape]) -> float:
    return (_conv_transpose_flops if args[6] else _conv_flops)(args, outputs)


def _convolution_sizes(args: Args, outputs: Sequence[Shape]) -> Sizes:
    text = _conv_transpose_sizes if args[6] else _conv_sizes
    return text((*args[:3], None, None, None, args[8]), outputs)


def _solve(args: Args, outputs: Sequence[Shape]) -> str:
    """(matrices, right sides, whether these are matrices' left): each column of a right side is a system of its own."""
    left = argument(args, 2, True)
    columns = len(args[0]) == len(args[1]) and tuple(args[1][-2:]) == tuple(outputs[0][-2:]) and len(args[0]) > 1
    if not columns or not left or tuple(args[0][:-2]) != tuple(args[1][:-2]):
        return opaque(args, outputs)
    return "... m! k!, ... k! n -> ... m! n"


def _solve_triangular(args: Args, outputs: Sequence[Shape]) -> str:
    """(triangular matrices, right sides). The matrices are on the left or on the right of the solution, which only the
    sizes tell; where both fit, no system of a matrix is given to another rank than the others."""
    size, (rows, columns) = args[0][-1], args[1][-2:]
    if size == rows == columns:
        return "... m! k!, ... k! n! -> ... m! n!"
    return "... m! k!, ... k! n -> ... m! n" if size == rows else "... k! n!, ... m k! -> ... m n!"


def _triangular_flops(args: Args, outputs: Sequence[Shape]) -> float:
    """A multiplication and an addition for every element of the triangle and every system."""
    return float(args[0][-1] * math.prod(outputs[0]))


RULES: dict[str, Rule] = {
    "aten.mm": Rule("m k, k n -> m n", contraction=True),
    "aten.bmm": Rule("b m k, b k n -> b m n", contraction=True),
    "aten.mv": Rule("m k, k -> m", contraction=True),
    "aten.dot": Rule("k, k -> ", contraction=True),
    "aten.vdot": Rule("k, k -> ", contraction=True),
    "aten.outer": Rule("m, n -> m n"),
    "aten.ger": Rule("m, n -> m n"),
    "aten.matmul": Rule(_matmul, contraction=True),
    "aten.linear": Rule(_linear, contraction=True),
    "aten.addmm": _plus("m n", "m k!, k! n -> m n"),
    "aten.addmv": _plus("m", "m k!, k! -> m"),
    "aten.addr": _plus("m n", "m, n -> m n"),
    "aten.baddbmm": _plus("b m n", "b m k!, b k! n -> b m n"),
    "aten.addbmm": _plus("m n", "b! m k!, b! k! n -> m n"),
    "aten.einsum": Rule(_einsum, contraction=True),
    "aten.tensordot": Rule(_tensordot, contraction=True),
    "aten.inner": Rule(_inner, contraction=True),
    "aten.kron": Rule(_kron),
    "aten.linalg_solve": Rule(_solve, linear=(1,)),
    "aten.linalg_solve_triangular": Rule(_solve_triangular, flops=_triangular_flops),
    "aten.chain_matmul": Rule(_chain, contraction=True),
    "aten.linalg_multi_dot": Rule(_chain, contraction=True),
    "aten.bilinear": Rule(_bilinear, contraction=True),
    "autopart.grouped_linear": Rule(
        _experts,
        local={"e": Local("grouped_linear", chained=True)},
        flops=_expert_flops,
        contraction=True,
        sizes=_expert_sizes,
        groups=("e",),
    ),
    "autopart.experts": Rule(
        _mixture,
        local={"e": Local("own_experts")},
        flops=_mixture_flops,
        contraction=True,
        sizes=_mixture_sizes,
        groups=("e",),
    ),
    "autopart.clamped_experts": Rule(
        "t d!, e d! (f 2), e f d!, e (f 2), e d!, t k!, t k! -> t d!",
        local={"e": Local("own_experts"), "f": Local("narrow_experts")},
        flops=lambda args, outputs: _mixture_flops(_unbiased(args), outputs),
        contraction=True,
        sizes=lambda args, outputs: _mixture_sizes(_unbiased(args), outputs),
        groups=("e",),
    ),
    "autopart.scan": Rule(_scan, flops=_scan_flops, contraction=True),
    "aten.convolution": Rule(_convolution, flops=_convolution_flops, contraction=True, sizes=_convolution_sizes),
}
for _name in ("aten._grouped_mm", "transformers.grouped_mm_fallback"):
    RULES[_name] = Rule(_grouped, flops=_expert_flops, contraction=True, sizes=_expert_sizes, groups=("e",))
for _n in (1, 2, 3):
    RULES |= {
        f"aten.conv{_n}d{_padding}": Rule(
            _conv, resize=_conv_groups(_n), flops=_conv_flops, contraction=True, sizes=_conv_sizes
        )
        for _padding in ("", ".padding")
    }
    RULES[f"aten.conv_transpose{_n}d{'' if _n == 1 else '.input'}"] = Rule(
        _conv_transpose, flops=_conv_transpose_flops, contraction=True, sizes=_conv_transpose_sizes
    )
