"""Losses: computed by element, then reduced by nothing, a mean or a sum (reduction 0, 1, 2)."""

import math
from collections.abc import Callable, Sequence

from autopart.sharding.notation import R, Shape
from autopart.sharding.rules.base import Args, Local, Rule, Sizes, Text, argument, opaque
from autopart.sharding.rules.reductions import MEAN


def _cross_entropy(args: Args, outputs: Sequence[Shape]) -> str:
    plain = len(args[0]) == 2 and len(args[1]) == 1 and argument(args, 2) is None
    if not plain:
        return opaque(args, outputs)
    reduction = argument(args, 3, 1)
    vocabulary = "v" if reduction == 1 and not argument(args, 5) else "v!"
    return f"b {vocabulary}, b -> {'b' if reduction == 0 else ''}"


def _negative_log(args: Args, outputs: Sequence[Shape]) -> str:
    """(input, target, weight, reduction, ignored). A mean is never split: no rank alone knows how many targets
    count."""
    reduction = argument(args, 3, 1)
    if reduction == 1:
        return opaque(args, outputs)
    b = "" if len(args[0]) == 1 else "b"
    return f"{b} v! ..., {b} ..., v! -> {f'{b} ...' if reduction == 0 else ''}"


def _by_element(at: int, operands: int) -> Text:
    """Rows of losses of `operands` operands that broadcast, with the reduction in argument `at`."""
    left = ", ".join(["..."] * operands)
    return lambda args, outputs: f"{left} -> {'...' if argument(args, at, 1) == 0 else ''}"


def _if_mean(at: int, local: dict[str, Local]) -> Callable[[Args], dict[str, Local]]:
    """`local` for calls whose reduction, argument `at`, is the mean; else nothing."""
    return lambda args: local if argument(args, at, 1) == 1 else {}


ELEMENTWISE = {  # operands, and which argument is the reduction
    "mse_loss": (2, 2), "l1_loss": (2, 2), "smooth_l1_loss": (2, 2), "huber_loss": (2, 2), "kl_div": (2, 2),
    "soft_margin_loss": (2, 2), "binary_cross_entropy": (3, 3), "binary_cross_entropy_with_logits": (4, 4),
    "poisson_nll_loss": (2, 5), "hinge_embedding_loss": (2, 3), "margin_ranking_loss": (3, 4),
}  # fmt: skip


def _triplet(args: Args, outputs: Sequence[Shape]) -> str:
    """(anchor, positive, negative, margin, p, eps, swap, reduction). Distances are along the last dim."""
    return f"... d!, ... d!, ... d! -> {'...' if argument(args, 7, 1) == 0 else ''}"


def _cosine(args: Args, outputs: Sequence[Shape]) -> str:
    """(x, y, sign, margin, reduction)."""
    return f"... d!, ... d!, ... -> {'...' if argument(args, 4, 1) == 0 else ''}"


def _head(args: Args, outputs: Sequence[Shape]) -> str:
    """(hidden, weight, targets, bias, ignored, smoothing, ...) of `autopart.kernels.linear_loss`."""
    rows = "b s" if len(args[0]) == 3 else "b"
    vocabulary = "v!" if argument(args, 5) else "v"
    targets = f"({rows})" if len(args[0]) == 3 else "b"
    return f"{rows} d!, {vocabulary} d!, {targets}, {vocabulary if argument(args, 3) else '-'} -> "


def _head_sizes(args: Args, outputs: Sequence[Shape]) -> Sizes:
    (*rows, k), (n, _) = args[:2]
    return Sizes(1, math.prod(rows), n, k)


RULES: dict[str, Rule] = {
    "autopart.linear_loss": Rule(
        _head,
        local={"b": Local("cross_entropy_sum"), "v": Local("vocab_linear_loss", R)},
        contraction=True,
        sizes=_head_sizes,
        flops=lambda args, outputs: 2.0 * math.prod(args[0]) * args[1][0],
    ),
    "aten.cross_entropy_loss": Rule(
        _cross_entropy,
        local=_if_mean(3, {"b": Local("cross_entropy_sum"), "v": Local("vocab_cross_entropy", R)}),
    ),
    "aten.nll_loss_nd": Rule(_negative_log),
    "aten.triplet_margin_loss": Rule(_triplet, local=_if_mean(7, MEAN)),
    "aten.cosine_embedding_loss": Rule(_cosine, local=_if_mean(4, MEAN)),
    "aten.ctc_loss.IntList": Rule(opaque),
    "autopart.ctc_losses": Rule("t! b c!, b s!, b, b -> b, t! b c!"),
}
RULES |= {
    f"aten.{name}": Rule(_by_element(at, operands), local=_if_mean(at, MEAN))
    for name, (operands, at) in ELEMENTWISE.items()
}
