"""The forms in which models write what fused kernels compute: arguments of references, whose patterns `fuse` finds."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

HALF, FLOAT = torch.bfloat16, torch.float32


class Chosen(int):
    """A whole number that a model chooses, such as a number of groups."""

    __slots__ = ()


class Form(NamedTuple):
    """A form in which models write a kernel's reference.

    needs      an operator that is in this form, by which graphs without the form are known: ``"aten.rsqrt"``
    arguments  of the reference, tensors on meta. Floats other than 0 and 1 are constants that a model chooses, as those
               that are `Chosen`; each differs from all other numbers
    """

    needs: str
    arguments: tuple[Any, ...]


EPS = 0.0123
CONSTANT = 0.0321


def meta(*shape: int, dtype: torch.dtype = FLOAT) -> torch.Tensor:
    """A tensor of a form."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _rms_norms(tensors: int) -> Iterator[Form]:
    """In one dtype, and in float32 of a half-precision x, as Llama or as T5 writes it; of as many tensors x."""
    for dtype, inner, square_only in ((FLOAT, None, False), (HALF, FLOAT, False), (HALF, FLOAT, True)):
        x, weight = meta(2, 3, 8, dtype=dtype), meta(8, dtype=dtype)
        yield Form("aten.rsqrt", (*[x] * tensors, weight, EPS, inner, square_only))


def _rms_norms_in_float32(tensors: int) -> Iterator[Form]:
    """With weight, with 1 + weight, without weight; with a root, or a power (Gemma 3n)."""
    for dtype in (FLOAT, HALF):
        x, weight = [meta(2, 3, 8, dtype=dtype)] * tensors, meta(8, dtype=dtype)
        yield Form("aten.rsqrt", (*x, weight, EPS, False, False))
        yield Form("aten.rsqrt", (*x, weight, EPS, True, False))
        yield Form("aten.rsqrt", (*x, None, EPS, False, False))
        yield Form("aten.pow.Tensor_Scalar", (*x, weight, EPS, False, True))
        yield Form("aten.pow.Tensor_Scalar", (*x, None, EPS, False, True))


def _rotary(needs: str) -> Iterator[Form]:
    """Of whole heads or of a part; in one dtype, in float32, and cast back; tables of whole or half width."""
    for r in (8, 4):
        for dtype, before, behind in ((FLOAT, None, None), (HALF, FLOAT, None), (HALF, FLOAT, HALF)):
            for half_width in (False, True):
                table = meta(1, 1, 6, r // 2 if half_width else r, dtype=before or dtype)
                yield Form(needs, (meta(2, 4, 6, 8, dtype=dtype), table, table, half_width, before, behind))


ACTIVATIONS = {
    "silu": "silu", "relu": "relu", "relu2": "square", "gelu": "gelu", "gelu_python": "erf",
    "gelu_pytorch_tanh": "gelu", "gelu_new": "tanh", "gelu_fast": "tanh", "quick_gelu": "sigmoid", "bloom_gelu": "tanh",
}  # fmt: skip
"""Activation of `autopart.kernels.activation` -> an operator that it has."""
GELUS = ("gelu", "gelu_pytorch_tanh", "gelu_new", "quick_gelu")


def _activation(name: str, *tensors: torch.Tensor) -> Form:
    return Form(f"aten.{ACTIVATIONS[name]}", (*tensors, name))


def _gate(name: str, *constants: Any) -> Form:
    return Form(f"aten.{ACTIVATIONS[name]}", (meta(2, 3, 8), meta(2, 3, 8), *constants))


def _heads() -> Iterator[Form]:
    """Hidden states (b, s, d) or (n, d), with or without a bias; float32 of half precision; a soft-cap (Gemma), a scale
    (Cohere), a divisor (Granite)."""
    plain = (0.0, 1.0, 1.0)
    constants = (plain, (EPS, 1.0, 1.0), (0.0, EPS, 1.0), (0.0, 1.0, EPS))
    for rows, biased, chosen in [((2, 3), False, c) for c in constants] + [
        ((2, 3), True, plain),
        ((6,), False, plain),
        ((6,), True, plain),
    ]:
        for dtype, inner in ((FLOAT, None), (HALF, FLOAT)):
            hidden, weight, targets = meta(*rows, 8, dtype=dtype), meta(5, 8, dtype=dtype), meta(6, dtype=torch.int64)
            bias = meta(5, dtype=dtype) if biased else None
            given = (hidden, weight, targets, bias, Chosen(-100_000), CONSTANT, inner, *chosen)
            yield Form("aten.cross_entropy_loss", given)


def _routers() -> Iterator[Form]:
    """With and without renormalisation; weights of logits in half precision also cast back."""
    for renormalise in (True, False):
        yield Form("aten.topk", (meta(6, 4), Chosen(2), renormalise, None))
        yield Form("aten.topk", (meta(6, 4, dtype=HALF), Chosen(2), renormalise, HALF))


def _routers_of_topk() -> Iterator[Form]:
    """The softmax in the logits' dtype or in float32; weights as they are or cast."""
    for dtype, inner, behind in (
        (FLOAT, None, None), (FLOAT, None, HALF), (HALF, FLOAT, None), (HALF, FLOAT, HALF),
    ):  # fmt: skip
        yield Form("aten.topk", (meta(6, 35, dtype=dtype), Chosen(4), inner, behind))


def _routers_of_scores() -> Iterator[Form]:
    """Sigmoids with and without groups; weights as they are, over their sum, over it and an epsilon; with a factor or
    none. Softmaxes with groups (DeepSeek-V2, Mistral 4), and with a bias and a clamped sum (ERNIE 4.5)."""
    for groups, limit in ((Chosen(5), Chosen(3)), (None, None)):
        for renormalise, eps in ((True, EPS), (True, 0.0), (False, 0.0)):
            for scale in (CONSTANT, 1.0):
                given = meta(6, 35), meta(35), Chosen(4), groups, limit, renormalise, eps, scale
                yield Form("aten.sigmoid", given)
    for scale in (CONSTANT, 1.0):
        of_groups = Chosen(5), Chosen(3)
        yield Form("aten.topk", (meta(6, 35), None, Chosen(4), *of_groups, False, 0.0, scale, "deepseek_v2"))
        for renormalise, eps in ((True, EPS), (False, 0.0)):
            for dtype in (FLOAT, HALF):
                logits = meta(6, 35, dtype=dtype)
                yield Form("aten.topk", (logits, None, Chosen(4), *of_groups, renormalise, eps, scale, "mistral4"))
    for renormalise, eps in ((True, EPS), (False, 0.0)):
        of_all = meta(35), Chosen(4), None, None
        yield Form("aten.topk", (meta(6, 35), *of_all, renormalise, eps, 1.0, "ernie4_5"))


def _sparse_softmaxes() -> Iterator[Form]:
    """In one dtype, or in float32 of half precision; the k-th largest sliced or selected; `masked_fill` or `where`."""
    for dtype, inner in ((FLOAT, None), (HALF, FLOAT)):
        for selected, where in itertools.product((False, True), repeat=2):
            yield Form("aten.topk", (meta(2, 4, 6, 9, dtype=dtype), Chosen(7), inner, selected, where))


def _loads() -> Iterator[Form]:
    """Without and with a mask; of logits in float32, and of others, whose chances are cast."""
    for dtype in (FLOAT, HALF):
        yield Form("aten.histc", (meta(6, 4, dtype=dtype), None, Chosen(2)))
        yield Form("aten.scatter_add", (meta(6, 4, dtype=dtype), meta(6), Chosen(2)))


def _experts() -> Iterator[Form]:
    """In one dtype, or with weights of pairs in float32; weights of experts as (experts, outputs, inputs) or not."""
    for dtype in (FLOAT, HALF):
        x, ids = meta(6, 8, dtype=dtype), meta(6, 2, dtype=torch.int64)
        for up, down, transposed in (((4, 10, 8), (4, 8, 5), False), ((4, 8, 10), (4, 5, 8), True)):
            given = x, meta(*up, dtype=dtype), meta(*down, dtype=dtype), meta(6, 2), ids, "silu", transposed
            yield Form("autopart.grouped_linear", given)


def _clamped_experts() -> Iterator[Form]:
    """In one dtype, or with weights of pairs in float32."""
    for dtype in (FLOAT, HALF):
        shapes = (6, 8), (4, 8, 10), (4, 5, 8), (4, 10), (4, 8)
        given = *(meta(*shape, dtype=dtype) for shape in shapes), meta(6, 2), meta(6, 2, dtype=torch.int64)
        yield Form("autopart.grouped_linear", (*given, CONSTANT, EPS))


def _scans() -> Iterator[Form]:
    """Of whole chunks, and padded to whole chunks; step sizes and skips in float32, and in half precision."""
    for length in (26, 20):
        for dtype in (FLOAT, HALF):
            side, skip = meta(2, length, 2, 7, dtype=dtype), meta(4, dtype=dtype)
            x, steps, log = meta(2, length, 4, 8, dtype=dtype), meta(2, length, 4, dtype=dtype), meta(2, length, 4)
            yield Form("aten.cumsum", (x, steps, log, side, side, skip, Chosen(13)))


_X, _VECTOR, _IMAGE = meta(2, 3, 8), meta(8), meta(2, 10, 3, 3)

FORMS: dict[str, tuple[Form, ...]] = {
    "rms_norm": tuple(_rms_norms(1)),
    "add_rms_norm": tuple(_rms_norms(2)),
    "rms_norm_float32": tuple(_rms_norms_in_float32(1)),
    "add_rms_norm_float32": tuple(_rms_norms_in_float32(2)),
    "add_layer_norm": (
        Form("aten.layer_norm", (_X, _X, _VECTOR, _VECTOR, EPS)),
        Form("aten.layer_norm", (_X, _X, _VECTOR, None, EPS)),
        Form("aten.layer_norm", (_X, _X, None, None, EPS)),
    ),
    "layer_norm_float32": tuple(
        Form("aten.rsqrt", (meta(2, 3, 8, dtype=dtype), meta(8, dtype=dtype), EPS)) for dtype in (FLOAT, HALF)
    ),
    "group_norm_silu": (Form("aten.group_norm", (_IMAGE, meta(10), meta(10), Chosen(5), EPS)),),
    "rotary": tuple(_rotary("aten.cat")),
    "rotary_interleaved": tuple(_rotary("aten.stack")),
    "rotary_deinterleaved": (Form("aten.cat", (meta(2, 4, 6, 8), meta(1, 1, 6, 4), meta(1, 1, 6, 4))),),
    "activation": tuple(_activation(name, _X) for name in ACTIVATIONS),
    "bias_activation": tuple(_activation(name, _X, _VECTOR) for name in ACTIVATIONS),
    "swiglu": (_gate("silu"),),
    "geglu": tuple(_gate(name, name) for name in GELUS),
    "reglu": (_gate("relu"),),
    "gated_halves": tuple(
        Form(f"aten.{ACTIVATIONS[name]}", (meta(2, 3, 16), name, first))
        for name in ("silu", *GELUS)
        for first in (True, False)
    ),
    "route": tuple(_routers()),
    "route_topk": tuple(_routers_of_topk()),
    "route_dense": tuple(Form("aten.scatter.src", (meta(6, 4, dtype=dtype), Chosen(2))) for dtype in (FLOAT, HALF)),
    "route_scores": tuple(_routers_of_scores()),
    "experts": tuple(_experts()),
    "clamped_experts": tuple(_clamped_experts()),
    "expert_load": tuple(_loads()),
    "topk_softmax": tuple(_sparse_softmaxes()),
    "linear_loss": tuple(_heads()),
    "scan": tuple(_scans()),
    "attention": (),
}
"""Name of a kernel -> its forms. Attention has no form: `passes/fuse_attention.py` finds it.
A kernel that is not here stands in no graph: the runtime calls it."""
