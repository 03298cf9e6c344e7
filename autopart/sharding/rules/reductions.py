"""Sums and other reductions, and operators along dims such as softmax, cumulative sums and Fourier transforms."""

import math
from collections.abc import Sequence
from typing import Any

from autopart.sharding.notation import Shape
from autopart.sharding.rules.base import (
    Args,
    Local,
    Rule,
    Text,
    argument,
    dims_of,
    letters,
    opaque,
    row,
    spelled,
    whole_at,
    whole_dims,
    whole_last,
)

MEAN = {"*": Local("mean")}


def reduction(at: int | None = 1, default: int | list[int] | None = None, whole: bool = True) -> Text:
    """Rows of a reduction of the dims that argument `at` names; of all dims where `at` or the argument is None.

    `whole` says that reduced dims are never split, since reductions of parts do not add up to that of all.
    """

    def text(args: Args, outputs: Sequence[Shape]) -> str:
        rank = len(args[0])
        dims = None if at is None else argument(args, at, default)
        reduced = set(dims_of(dims if isinstance(dims, int) else dims or None, rank))
        names = letters(rank)
        keep = len(outputs[0]) == rank
        out = ["1" if i in reduced else n for i, n in enumerate(names) if keep or i not in reduced]
        if len(out) != len(outputs[0]) or any(n == "1" != str(s) for n, s in zip(out, outputs[0], strict=True)):
            return opaque(args, outputs)
        return row([[f"{n}!" if whole and i in reduced else n for i, n in enumerate(names)]], [out] * len(outputs))

    return text


def _norm(at_order: int, at_dims: int) -> Text:
    """Rows of a norm. Only norms of order 1, sums of absolute values, add up over the parts of a dim."""

    def text(args: Args, outputs: Sequence[Shape]) -> str:
        return reduction(at_dims, whole=argument(args, at_order, 2) != 1)(args, outputs)

    return text


def _histc(args: Args, outputs: Sequence[Shape]) -> str:
    """(x, bins, low, high). Without bounds the data decides them, and nothing splits."""
    low, high = argument(args, 2, 0), argument(args, 3, 0)
    return row([letters(len(args[0]))], [["z!"]]) if low < high else opaque(args, outputs)


def _transform(at: int, default: Any = None, real: bool = False) -> Rule:
    """The rule of a Fourier transform, whose dims are never split.

    The dims are those that argument `at` names, else `default`, else the last ones that sizes are given for, else all.
    A transform of n elements takes 5 n log2 n FLOPs, half of that where one side is real: the count of Cooley and
    Tukey's algorithm of radix 2, which FFTW's benchmarks use.
    """

    def dims(args: Args) -> list[int]:
        rank, sizes = len(args[0]), argument(args, 1)
        last = list(range(rank - len(sizes), rank)) if default is None and isinstance(sizes, (list, tuple)) else default
        return dims_of(argument(args, at, last), rank)

    def flops(args: Args, outputs: Sequence[Shape]) -> float:
        sizes = [max(pair) for pair in zip(args[0], outputs[0], strict=True)]
        places = math.prod(sizes[d] for d in dims(args))
        return (2.5 if real else 5.0) * math.prod(sizes) * math.log2(max(places, 1))

    return Rule(lambda args, outputs: whole_dims(args[:1], outputs, dims(args)), linear=-1, flops=flops)


def _shift(args: Args, outputs: Sequence[Shape]) -> str:
    return whole_dims(args[:1], outputs, dims_of(argument(args, 1), len(args[0])))


def _similarity(args: Args, outputs: Sequence[Shape]) -> str:
    """(x, y, dim)."""
    dims = dims_of(argument(args, 2, 1), max(len(args[0]), len(args[1])))
    if len(args[0]) != len(args[1]):
        return opaque(args, outputs)
    sides = [spelled(args[k], dims, "ab"[k]) for k in (0, 1)]
    return row(sides, [[n for n in sides[0] if not n.endswith("!")]])


def _pairwise(args: Args, outputs: Sequence[Shape]) -> str:
    """(x, y, p, eps, whether to keep the dim)."""
    return f"... d!, ... d! -> ...{' 1' if argument(args, 4) else ''}"


WHOLE = {  # which argument names the dims; None: all are reduced
    "amax": 1, "amin": 1, "max": None, "min": None, "any": None, "all": None, "prod": None, "median": None,
    "nanmedian": None, "argmax": 1, "argmin": 1, "any.dim": 1, "any.dims": 1, "all.dim": 1, "all.dims": 1,
    "max.dim": 1, "min.dim": 1, "median.dim": 1, "nanmedian.dim": 1, "prod.dim_int": 1, "logsumexp": 1,
    "nanmean": 1, "quantile.scalar": 2, "nanquantile.scalar": 2, "norm.Scalar": None,
    **{f"{n}{o}": at for n in ("var", "std", "var_mean", "std_mean")
       for o, at in (("", None), (".dim", 1), (".correction", 1))},
}  # fmt: skip
ALONG = "cumprod cummax cummin logcumsumexp softmax.int log_softmax.int _safe_softmax _softmax _log_softmax".split()
FFT = "fft ifft rfft irfft hfft ihfft".split()
MATRIX = "inverse linalg_inv cholesky linalg_cholesky matrix_exp linalg_matrix_exp".split()

RULES: dict[str, Rule] = {
    "aten.sum": Rule(reduction(None, whole=False), linear=-1),
    "aten.sum.dim_IntList": Rule(reduction(whole=False), linear=-1),
    "aten.nansum": Rule(reduction(whole=False)),
    "aten.count_nonzero": Rule(reduction(whole=False)),
    "aten.count_nonzero.dim_IntList": Rule(reduction(whole=False)),
    "aten.mean": Rule(reduction(None, whole=False), linear=-1, local=MEAN),
    "aten.mean.dim": Rule(reduction(whole=False), linear=-1, local=MEAN),
    "aten.trace": Rule("a! b! -> ", linear=-1),
    "aten.histc": Rule(_histc),
    "aten.linalg_vector_norm": Rule(_norm(1, 2)),
    "aten.norm.ScalarOpt_dim": Rule(_norm(1, 2)),
    "aten.linalg_norm": Rule(reduction(2)),
    "aten.linalg_norm.ord_str": Rule(reduction(2)),
    "aten.linalg_matrix_norm": Rule(reduction(2, [-2, -1])),
    "aten.linalg_matrix_norm.str_ord": Rule(reduction(2, [-2, -1])),
    "aten.kthvalue": Rule(reduction(2, -1)),
    "aten.mode": Rule(reduction(1, -1)),
    "aten.cumsum": Rule(whole_at(1), linear=-1),
    "aten.cosine_similarity": Rule(_similarity),
    "aten.pairwise_distance": Rule(_pairwise),
    "aten.cdist": Rule("... m d!, ... n d! -> ... m n"),
    "aten.linalg_det": Rule("... a! b! -> ..."),
    "aten.logdet": Rule("... a! b! -> ..."),
    "aten._fft_c2c": _transform(1),
    "aten._fft_r2c": _transform(1, real=True),
    "aten._fft_c2r": _transform(1, real=True),
    "aten.fft_fftshift": Rule(_shift, linear=-1),
    "aten.fft_ifftshift": Rule(_shift, linear=-1),
}
RULES |= {f"aten.{n}": Rule(reduction(at)) for n, at in WHOLE.items()}
RULES |= {f"aten.{n}": Rule(whole_at(1)) for n in ALONG}
for _n in FFT:
    _real = _n not in ("fft", "ifft")
    RULES[f"aten.fft_{_n}"] = _transform(2, -1, _real)
    if not _n.startswith(("h", "ih")):
        RULES |= {f"aten.fft_{_n}2": _transform(2, [-2, -1], _real), f"aten.fft_{_n}n": _transform(2, real=_real)}
RULES |= {f"aten.{n}": Rule(whole_last(2)) for n in MATRIX}
