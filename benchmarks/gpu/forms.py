"""Arguments of kernels: those of `autopart.kernels.forms`, and forms of the kernels that it lacks.

Tensors are on meta, at small sizes. Their dims are places that `benchmarks.gpu.sizes` fills with the sizes of models.
"""

from __future__ import annotations

import torch

from autopart.kernels.forms import EPS, FLOAT, FORMS, HALF, Chosen, Form, meta

_X, _VECTOR = meta(2, 3, 8), meta(8)
_LOGITS, _TARGETS = meta(6, 5), meta(6, dtype=torch.int64)
_QUERY, _KEY = meta(2, 4, 6, 8), meta(2, 1, 6, 8)
_WORDS, _COLUMNS = meta(2, 3, dtype=torch.int32), meta(8, dtype=torch.int32)
_PAIRS = meta(12, dtype=torch.int64)
_KEEP_NINE_TENTHS = (-(2**31) + 2**32 // 10, 1 / 0.9)
"""Threshold and scale of a dropout that drops a tenth."""

MORE: dict[str, tuple[tuple[object, ...], ...]] = {
    "layer_norm": ((_X, _VECTOR, _VECTOR, EPS),),
    "group_norm": ((meta(2, 10, 3, 3), meta(10), meta(10), Chosen(5), EPS),),
    "embedding": ((meta(2, 3, dtype=torch.int64), meta(5, 8)),),
    "cross_entropy": ((_LOGITS, _TARGETS, 7.0),),
    "vocab_cross_entropy": ((_LOGITS, _TARGETS, 7.0),),
    "linear_cross_entropy": ((meta(6, 8), meta(5, 8), _TARGETS, None, 7.0),),
    "attention": (
        (_QUERY, _KEY, _KEY, *[None] * 5, 0.125, True),
        (_QUERY, _KEY, _KEY, *[None] * 5, 0.125, True, 0, 0.0, False, meta(2, 4, 6, dtype=torch.int32),
         meta(6, dtype=torch.int32), *_KEEP_NINE_TENTHS),
        (_QUERY, _KEY, _KEY, *[None] * 4, meta(4), 0.125, True, Chosen(5)),
        (_QUERY, _KEY, _KEY, None, meta(2, 6, dtype=torch.bool), None, meta(4, 11), None, 1.0, False),
    ),
    "topk_softmax": ((meta(2, 4, 6, 6), Chosen(3)),),
    "residual_dropout": ((_X, None, _X, _WORDS, _COLUMNS, *_KEEP_NINE_TENTHS),),
    "stochastic_depth": ((_X, _X, meta(2, dtype=torch.int32), meta(1, dtype=torch.int32), *_KEEP_NINE_TENTHS),),
    "adamw": (
        (_X, _X, _X, _X, None, None, 3, 1e-3, 0.9, 0.999, 1e-8, 0.1),
        (meta(2, 3, 8, dtype=HALF), _X, _X, _X, meta(2, 3, 8, dtype=HALF), None, 3, 1e-3, 0.9, 0.999, 1e-8, 0.1),
    ),
    "lion": (
        (_X, _X, _X, None, None, 1e-4, 0.9, 0.99, 0.1),
        (meta(2, 3, 8, dtype=HALF), _X, _X, meta(2, 3, 8, dtype=HALF), None, 1e-4, 0.9, 0.99, 0.1),
    ),
    "route": ((meta(6, 4), Chosen(2), True),),
    "route_topk": ((meta(6, 4, dtype=HALF), Chosen(2), None, None), (meta(6, 4), Chosen(2), None, None)),
    "route_scores": tuple(
        (meta(6, 12, dtype=dtype), meta(12), Chosen(2), Chosen(4), Chosen(3), True, 1e-20, 2.5)
        for dtype in (FLOAT, HALF)
    ),
    "expert_load": ((meta(6, 4), None, Chosen(2)),),
    "sort_by_expert": ((_PAIRS, Chosen(4)),),
    "permute": ((meta(6, 8), _PAIRS, _PAIRS),),
    "unpermute": ((meta(12, 8), meta(6, 2), _PAIRS, _PAIRS),),
    "grouped_matmul": ((meta(12, 8), meta(4, 16, 8), meta(5, dtype=torch.int64)),),
    "scan": (
        (meta(1, 6, 4, 8), meta(1, 6, 4), meta(1, 6, 4), meta(1, 6, 2, 7), meta(1, 6, 2, 7), meta(4), Chosen(3)),
        (meta(1, 6, 4, 8, dtype=HALF), meta(1, 6, 4), meta(1, 6, 4), meta(1, 6, 2, 7, dtype=HALF),
         meta(1, 6, 2, 7, dtype=HALF), meta(4), Chosen(3)),
    ),
}  # fmt: skip
"""Kernel -> its arguments, in several forms."""


def forms(kernel: str) -> tuple[tuple[object, ...], ...]:
    """The forms of a kernel; none for one that is not known here."""
    known: tuple[Form, ...] = FORMS.get(kernel, ())
    return MORE.get(kernel) or tuple(form.arguments for form in known)


def form_of(kernel: str, dtype: torch.dtype, wanted: tuple[object, ...] = ()) -> tuple[object, ...]:
    """The first form of a kernel that has the constants wanted, in half precision where `dtype` is and there is one."""
    with_constants = [form for form in forms(kernel) if all(_has(form, constant) for constant in wanted)]
    if dtype != FLOAT:
        halves = [form for form in with_constants if any(_is(part, HALF) for part in form)]
        with_constants = halves or with_constants
    if not with_constants:
        raise LookupError(f"no form of {kernel} has {wanted}")
    return with_constants[0]


def _is(part: object, dtype: torch.dtype) -> bool:
    return isinstance(part, torch.Tensor) and part.dtype == dtype


def _has(form: tuple[object, ...], constant: object) -> bool:
    return any(type(part) is type(constant) and part == constant for part in form)
