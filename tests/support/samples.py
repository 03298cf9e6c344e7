"""Sample calls of the operators that the table of rules knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers.integrations.moe  # noqa: F401  registers its operators
from proof import RANDOM, Sample, f, i, z

import autopart.ir.ctc  # noqa: F401  registers its operator
from autopart.ir.random_ops import Stream
from autopart.sharding import rules as rules
from autopart.sharding.notation import Placement, S
from autopart.sharding.rules.pointwise import LINEAR_BINARY

ATTENTION = "aten.scaled_dot_product_attention"


def u(*shape: int) -> torch.Tensor:
    """Between 0.1 and 0.9: in the domain of log, acos and the like."""
    return torch.rand(shape, generator=RANDOM, dtype=torch.float64) * 0.8 + 0.1


def b(*shape: int) -> torch.Tensor:
    return i(2, *shape).bool()


def normed(name: str, *args: Any) -> Sample:
    """A batch norm: its running mean and variance have no gradient."""
    return Sample(f"aten.{name}", args, {}, (), (3, 4))


def some(mask: torch.Tensor) -> torch.Tensor:
    """An attention mask that leaves every query at least one key."""
    mask[..., 0] = True
    return mask


def ignoring(targets: torch.Tensor, ignored: int = -100) -> torch.Tensor:
    """A third of the targets ignored, unevenly over the ranks."""
    return targets.index_fill(0, torch.tensor([0, 1, 2, 7]), ignored)


def call(name: str, *args: Any, hints: Sequence[Placement] = (), constant: int = -1, **kwargs: Any) -> Sample:
    return Sample(name, args, kwargs, tuple(hints), () if constant < 0 else (constant,))


KEEP = {"keepdim": True}
PARTS = [S(1, (12, 24)), S(2, (12, 24)), S(1, (24, 12)), S(1, (12, 12))]  # the last fits no dim of 36
SAMPLES = [
    call("autopart.dropout", f(12, 24), 0.1, Stream("drop")),
    call("autopart.residual_dropout", f(12, 24), None, f(12, 24), 0.1, Stream("drop")),
    call("autopart.residual_dropout", f(4, 12, 24), f(24), f(4, 12, 24), 0.1, Stream("drop")),
    call("autopart.stochastic_depth", f(12, 24), f(12, 24), 0.1, Stream("drop")),
    call("autopart.returned", f(12, 24), Stream("logits")),
    call("autopart.uniform", f(12, 24), Stream("drop"), torch.float64),
    call("autopart.uniform_of", [12, 24], torch.float64, Stream("drop")),
    call("autopart.grouped_linear", f(24, 12), f(12, 24, 12), i(12, 24), False),
    call("autopart.grouped_linear", f(24, 12), f(12, 12, 24), i(12, 24), True),
    call("autopart.experts", f(12, 6), f(12, 48, 6), f(12, 6, 24), f(12, 2), i(12, 12, 2), "silu", False),
    call("autopart.experts", f(12, 6), f(12, 6, 48), f(12, 24, 6), f(12, 2), i(12, 12, 2), "gelu", True),
    call(
        "autopart.clamped_experts",
        f(12, 6),
        f(12, 6, 48),
        f(12, 24, 6),
        f(12, 48),
        f(12, 6),
        f(12, 2),
        i(12, 12, 2),
        1.7,
        0.5,
    ),
    call("autopart.route", f(12, 6, 8), 3, True, None, constant=1),
    call("autopart.route_topk", f(12, 6, 8), 3, None, None),
    call("autopart.route_dense", f(12, 8), 3),
    call("autopart.route_scores", f(12, 8), f(8), 3, 4, 2, True, 1e-20, 2.5, constant=1),
    call("autopart.route_scores", f(12, 6, 8), f(8), 3, None, None, True, 0.0, 1.0, constant=1),
    call("autopart.route_scores", f(12, 8), None, 3, 4, 2, False, 0.0, 2.5, "deepseek_v2"),
    call("autopart.topk_softmax", f(12, 12, 6, 8), 3, None, True, False),
    call("autopart.expert_load", f(24, 8), None, 3),
    call("autopart.expert_load", f(24, 8), (f(24) > 0).float(), 3, constant=1),
    # contractions
    *(
        call(f"autopart.{name}", f(12, 12, 12, 5), *kv, *masks, 0.5, causal, window, 0.0, even, *drawn)
        for heads, masks, causal, window, even in (
            (12, [None] * 5, False, 0, False),
            (12, [None] * 5, True, 0, False),
            (6, [None] * 5, True, 0, False),
            (12, (f(1, 12, 12, 12), *[None] * 4), False, 0, False),
            (6, (None, some(b(12, 12)), None, None, f(12)), True, 5, False),
            (12, (None, some(b(12, 12)), f(1, 12, 12, 12), f(12, 23), None), False, 0, True),
        )
        for kv in [(f(12, heads, 12, 5), f(12, heads, 12, 3))]
        for name, drawn in (("attention", ()), ("dropout_attention", (0.1, Stream("drop"))))
    ),
    call("aten.mm", f(12, 24), f(24, 12)),
    call("aten.bmm", f(12, 4, 12), f(12, 12, 3)),
    call("aten.matmul", f(12, 24), f(24, 36), hints=PARTS),
    call("aten.matmul", f(4, 12, 24), f(24, 36), hints=PARTS),
    call("aten.matmul", f(12, 1, 4, 12), f(12, 12, 3)),
    call("aten.matmul", f(4, 12), f(12, 12, 3)),
    call("aten.matmul", f(12), f(12, 24)),
    call("aten.matmul", f(12, 24), f(24)),
    call("aten.linear", f(2, 12, 24), f(36, 24), hints=PARTS),
    call("aten.linear", f(12, 24), f(36, 24), f(36), hints=PARTS),
    call("aten.linear", f(12, 24), f(36, 24), None, hints=PARTS),
    call("aten.linear", f(24), f(36, 24)),
    call("aten.conv1d", f(12, 12, 7), f(24, 12, 3)),
    call("aten.conv1d", f(12, 12, 7), f(24, 12, 3), f(24), [2], [1]),
    call("aten.conv1d", f(12, 12, 7), f(24, 1, 3), None, [1], [0], [1], 12),
    call("aten.conv1d", f(12, 7), f(24, 12, 3)),
    call("aten.conv2d", f(12, 12, 5, 6), f(12, 12, 3, 3), None, [2, 2], [1, 1]),
    call("aten.conv2d", f(12, 12, 5, 6), f(24, 12, 3, 3), f(24)),
    call("aten.conv2d", f(12, 12, 5, 6), f(24, 3, 3, 3), f(24), [1, 1], [0, 0], [1, 1], 4),
    call("aten.conv2d", f(12, 5, 6), f(24, 12, 3, 3)),
    call("aten.conv3d", f(12, 12, 3, 4, 2), f(12, 12, 2, 2, 2)),
    call("aten.conv3d", f(12, 12, 3, 4, 2), f(12, 12, 2, 2, 2), f(12)),
    *(
        call(ATTENTION, f(12, 12, 12, 5), f(12, 12, 7, 5), f(12, 12, 7, 3), *rest, **scale)
        for scale in ({}, {"scale": 0.3})
        for rest in ((), (None, 0.0, True), (None, 0.0, False), (some(b(12, 7)),), (f(12, 1, 12, 7),))
    ),
    *(
        call(ATTENTION, f(12, 12, 12, 5), f(12, 12, 12, 5), f(12, 12, 12, 5), mask)
        for mask in (some(b(12, 12, 12, 12)), f(12, 12, 12), f(1, 12, 1, 12), f(1, 12))
    ),
    call(ATTENTION, f(12, 12, 5), f(12, 12, 5), f(12, 12, 5), some(b(12, 12, 12))),
    call(ATTENTION, f(12, 12, 5), f(12, 12, 5), f(12, 12, 5), f(12, 12)),
    call(ATTENTION, f(12, 12, 5), f(12, 7, 5), f(12, 7, 3)),
    *(
        call(ATTENTION, f(2, 24, 12, 5), f(2, h, 7, 5), f(2, h, 7, 3), *mask, enable_gqa=True)
        for h in (12, 2, 1)
        for mask in ((), (f(2, 24, 12, 7),), (f(2, 1, 12, 7),), (f(12, 7),))
    ),
    # lookups and losses
    call("aten.embedding", f(12, 24), i(12, 12, 12)),
    call("aten.embedding", f(24, 12), i(24, 12), 7),
    call("aten.embedding", f(24, 12), i(24, 12), 0, False),
    call("aten.embedding", f(12, 12), i(3, 12), -1, True),
    *(
        call("aten.cross_entropy_loss", f(12, 24), *rest)
        for rest in (
            (i(24, 12),),
            (ignoring(i(24, 12)),),
            (ignoring(i(24, 12), 5), None, 1, 5),
            (ignoring(i(24, 12)), None, 1, -100, 0.1),
            (ignoring(i(24, 12)), None, 2),
            (ignoring(i(24, 12)), None, 0),
            (u(12, 24),),
        )
    ),
    call("aten.cross_entropy_loss", f(12, 24), i(24, 12), u(24), constant=2),
    call("aten.cross_entropy_loss", f(12, 24, 5), i(24, 12, 5)),
    *(
        call(f"aten.{name}", f(12, 4), f(12, 4), *rest)
        for name in ("mse_loss", "l1_loss", "smooth_l1_loss")
        for rest in ((), (0,), (1,), (2,))
    ),
    call("aten.binary_cross_entropy_with_logits", f(12, 4), u(12, 4)),
    # normalisation and reductions
    call("aten.layer_norm", f(2, 12, 24), [24], f(24), f(24)),
    call("aten.layer_norm", f(12, 12, 24), [12, 24], f(12, 24), None, 1e-3),
    call("aten.layer_norm", f(12, 24), [24], None, None),
    call("aten.layer_norm", f(12, 24), [24]),
    call("autopart.rms_norm", f(2, 12, 24), f(24), 1e-6),
    call("autopart.rms_norm", f(12, 24), f(24), 1e-6, torch.float64),
    call("autopart.add_rms_norm", f(2, 12, 24), f(2, 12, 24), f(24), 1e-6),
    call("autopart.layer_norm_float32", f(12, 24), f(24), 1e-6),
    *(
        call("autopart.add_layer_norm", f(2, 12, 24), f(2, 12, 24), *vectors, 1e-5)
        for vectors in ((f(24), f(24)), (f(24), None), (None, None))
    ),
    *(
        call("autopart.rms_norm_float32", f(2, 12, 24), *rest)
        for rest in ((f(24), 1e-6), (f(24), 1e-6, True), (None, 1e-6))
    ),
    call("autopart.add_rms_norm_float32", f(12, 24), f(12, 24), f(24), 1e-6, True),
    call("autopart.group_norm_silu", f(12, 24, 3, 3), f(24), f(24), 4, 1e-5),
    # other fused kernels
    *(call("autopart.activation", f(2, 12, 24), name) for name in ("gelu_new", "quick_gelu", "bloom_gelu")),
    call("autopart.bias_activation", f(2, 12, 24), f(24), "gelu"),
    call("autopart.swiglu", f(2, 12, 24), f(2, 12, 24)),
    call("autopart.geglu", f(12, 24), f(12, 24), "gelu_new"),
    call("autopart.reglu", f(12, 24), f(12, 24)),
    *(call("autopart.gated_halves", f(2, 12, 24), "silu", first) for first in (True, False)),
    call("autopart.rotary", f(2, 12, 6, 24), f(1, 1, 6, 24), f(1, 1, 6, 24)),
    call("autopart.rotary", f(2, 12, 6, 24), f(1, 1, 6, 6), f(1, 1, 6, 6), True),
    call("autopart.rotary_interleaved", f(2, 6, 12, 24), f(1, 6, 1, 8), f(1, 6, 1, 8)),
    call("autopart.rotary_deinterleaved", f(2, 12, 6, 24), f(1, 1, 6, 12), f(1, 1, 6, 12)),
    call("autopart.scan", f(12, 6, 24, 4), u(12, 6, 24), -u(12, 6, 24), *(f(12, 6, 12, 5) for _ in "bc"), f(24), 4),
    call("autopart.scan", f(12, 6, 24, 4), None, -u(12, 6, 24), *(f(12, 6, 1, 5) for _ in "bc"), None, 4),
    call("autopart.linear_loss", f(12, 6, 8), f(24, 8), ignoring(i(24, 72)), None),
    call("autopart.linear_loss", f(12, 8), f(24, 8), i(24, 12), f(24), -100, 0.1),
    call("autopart.linear_loss", f(12, 8), f(24, 8), i(24, 12), f(24), -100, 0.0, None, 3.0),
    *(call(f"aten.{n}softmax.int", f(12, 4, 12), d) for n in ("", "log_") for d in (0, -1, 2)),
    *(call(f"aten.{n}softmax", f(12, 4, 12), d, False) for n in ("_", "_log_") for d in (1, -1)),
    *(call("aten.cumsum", f(12, 4, 12), d) for d in (0, 1, -1)),
    *(call(f"aten.{n}", x) for n in ("sum", "mean") for x in (f(12, 24), f(12), f())),
    *(
        call(f"aten.{n}", f(12, 3, 24), *rest)
        for n in ("sum.dim_IntList", "mean.dim", "amax", "amin")
        for rest in (([0],), ([-1], True), ([0, -1],), ([0, 2], True), ([],))
    ),
    call("aten.mean.dim", f(12, 24), None),
    call("aten.sum.dim_IntList", i(9, 12, 24), [0]),
    *(call("aten.var.correction", f(12, 3, 24), d, **kw) for d in ([0], [-1, 0], None) for kw in ({}, KEEP)),
    call("aten.var.correction", f(12, 24), [-1], correction=0),
    # shape
    *(
        call(f"aten.{name}", f(*source), [*target])
        for name in ("view", "reshape", "_unsafe_view")
        for source, target in (
            ((12, 36), (12, 12, 3)),
            ((12, 12, 3), (-1, 36)),
            ((12, 24), (288,)),
            ((2, 1, 24), (2, 24, 1)),
            ((24, 6), (12, 2, 6)),
            ((4, 6, 4, 2), (24, 8)),
            ((4, 4, 4), (2, 4, 8)),
            ((12, 2, 9), (12, 3, 6)),
            ((1,), ()),
            ((), (1, 1)),
            ((0, 12), (12, 0)),
        )
    ),
    *(
        call("aten.expand", f(*source), [*target])
        for source, target in (
            ((12, 1), (12, 24)),
            ((12,), (12, 2, 12)),
            ((1, 12, 1), (2, -1, 12)),
            ((), (12,)),
            ((12, 4), (-1, -1)),
            ((1, 4), (1, 4)),
        )
    ),
    call("aten.expand", i(9, 12, 1), [-1, 24]),
    *(call("aten.transpose.int", f(12, 3, 24), *d) for d in ((0, 1), (-1, -2), (2, 0), (1, 1))),
    *(call("aten.permute", f(12, 3, 24), d) for d in ([2, 0, 1], [-1, 0, -2])),
    *(call("aten.t", x) for x in (f(12, 24), f(12), f())),
    *(call("aten.unsqueeze", x, d) for x in (f(12, 24), f()) for d in (0, -1)),
    call("aten.unsqueeze", f(12, 24), 1),
    *(call("aten.squeeze.dim", f(*s), d) for s, d in (((12, 1, 3), 1), ((12, 2), -1), ((1,), 0), ((), 0), ((4, 3), 0))),
    *(call("aten.squeeze.dims", f(1, 4, 1, 12), d) for d in ([0], [0, 2], [-2, 1], [])),
    *(
        call("aten.slice.Tensor", f(12, 24), *rest)
        for rest in (
            (0, 2, 6),
            (1, -6, 2**63 - 1),
            (-1, 0, 24),
            (0,),
            (0, -12, 12),
            (1, 0, 24, 2),
            (),
            (1, 6, -6),
        )
    ),
    *(call("aten.select.int", f(12, 24), d, at) for d, at in ((0, 3), (1, -1), (-1, 0))),
    *(
        call("aten.slice_scatter", f(12, 24), f(*s), *rest)
        for s, rest in (((4, 24), (0, 2, 6)), ((12, 12), (-1, 0, 24, 2)), ((12, 24), ()))
    ),
    *(call("aten.select_scatter", f(12, 24), f(n), d, 1) for n, d in ((24, 0), (12, 1), (12, -1))),
    *(call("aten.split.Tensor", f(12, 36), *rest) for rest in ((12, 1), (24, -1), (4,), (36, 1), (5, 1))),
    *(
        call("aten.split_with_sizes", f(12, 36), *rest)
        for rest in (([12, 24], 1), ([24, 6, 6], -1), ([12], 0), ([4, 8],))
    ),
    *(
        call("aten.cat", [f(*s) for s in shapes], *d)
        for shapes, *d in (
            [[(12, 24), (12, 12)], 1],
            [[(4, 12), (12, 12), (8, 12)]],
            [[(12, 24)], -1],
            [[(12, 3), (12, 4)], -1],
            [[(12, 1), (12, 1)], 1],
            [[(0,), (12, 12)], -1],
        )
    ),
    *(
        call("aten.gather", f(12, 24), d, i(12, *s))
        for d, s in ((1, (12, 12)), (-1, (6, 24)), (0, (24, 24)), (0, (3, 12)))
    ),
    *(
        call("aten.index.Tensor", f(12, 4, 12), indices)
        for indices in (
            [i(12, 24)],
            [None, i(4, 12)],
            [None, None, i(12, 4, 12)],
            [None, i(4, 12), None],
            [i(12, 12), i(4, 12)],
            [i(12, 12), None, i(12, 12)],
            [i(12)],
            [torch.arange(12) % 5 == 0],
        )
    ),
    *(
        call(f"aten.{name}", f(12, 4, 12), *rest)
        for name in ("pad", "constant_pad_nd")
        for rest in (([1, 2],), ([0, 0, 1, 0],), ([1, -1, 0, 0],), ([0, 0, 0, 0, -4, 4],))
    ),
    call("aten.pad", f(12, 4, 12), [1, 1], "reflect"),
    call("aten.constant_pad_nd", f(12, 12), [2, 0], 3.0),
    *(call(f"aten.{name}", f(12, 24)) for name in ("clone", "alias", "contiguous", "_to_copy", "neg", "detach")),
    call("aten.neg", f()),
    call("aten._to_copy", i(9, 12, 3), dtype=torch.float64),
    # the rest
    *(call(f"aten.{name}.Scalar", f(12, 24), 1.7) for name in ("mul", "div")),
    *(
        call("aten.where.self", b(*c), f(*x), f(*y))
        for c, x, y in (
            ((12, 24), (12, 24), (12, 24)),
            ((12, 1), (24,), (12, 24)),
            ((), (12, 1), (24,)),
            ((12, 24), (), ()),
        )
    ),
    *(call("aten.where.ScalarOther", b(12, 1), x, 0.0) for x in (f(12, 24), f())),
    *(call("aten.where.ScalarSelf", b(12, 1), 0.5, x) for x in (f(12, 24), f())),
    *(call("aten.masked_fill.Scalar", x, b(12, 24), -3.0) for x in (f(12, 24), f(12, 1))),
    *(call("aten.masked_fill.Tensor", x, b(24), f()) for x in (f(12, 24), f(2, 12, 1))),
    *(call("aten.fill.Tensor", x, f()) for x in (f(12, 24), f())),
    *(call("aten.fill.Scalar", x, 2.0) for x in (f(12, 24), i(9, 12))),
    *(call("aten.copy", i(9, 12, 24), i(9, *s)) for s in ((12, 24), (12, 1), (24,), ())),
    *(call("aten.addcmul", f(12, 24), f(12, 1), f(24), **kw) for kw in ({}, {"value": 0.3})),
    *(call("aten.dropout", f(12, 24), *rest) for rest in ((0.5, False), (0.0, True))),
    *(call("aten.native_dropout", f(12, 24), *rest) for rest in ((0.5, False), (0.0, True))),
    *(call(f"aten.{name}", f(3, 12), [12, 24]) for name in ("new_zeros", "new_ones")),
    call("aten.new_full", f(3, 12), [12, 24], 7),
    call("aten.new_zeros", f(12), []),
    *(call(f"aten.{name}", [12, 24]) for name in ("zeros", "ones")),
    call("aten.full", [12, 24], 0.5, dtype=torch.float64),
    call("aten.full", [], 0.5),
    call("aten.arange", 12),
    call("aten.arange.start", 2, 14),
    call("aten.arange.start_step", 0, 24, 2),
]


# Elementwise operators that PyTorch's own tests do not call, or not by that name: what follows the tensor.
UNARY = {
    "relu": (),
    "clamp_max": (0.4,),
    "float_power.Tensor_Scalar": (2.0,),
    "bitwise_left_shift.Tensor_Scalar": (2,),
    "bitwise_right_shift.Tensor_Scalar": (1,),
    "fmod.Scalar": (0.3,),
    **{
        f"{n}.Scalar": (0.3,)
        for n in "greater greater_equal less less_equal not_equal subtract multiply divide".split()
    },
    **{n: () for n in "contiguous lift_fresh_copy absolute negative fix".split()},
    **{f"arc{n}": () for n in "cos cosh sin sinh tan tanh".split()},
    "clip": (0.3, 0.6),
    **{f"{n}.Scalar": (3,) for n in "bitwise_and bitwise_or bitwise_xor __and__ __or__ __xor__ floor_divide".split()},
}
BINARY = """__and__.Tensor __or__.Tensor __xor__.Tensor multiply.Tensor greater.Tensor greater_equal.Tensor
    less.Tensor less_equal.Tensor arctan2 not_equal.Tensor""".split()
INTEGER = ("bitwise", "__", "floor_divide")


def elementwise() -> Iterator[Sample]:
    for name in (*UNARY, *BINARY, *LINEAR_BINARY):
        integer = name.startswith(INTEGER)

        def draw(*shape: int, integer: bool = integer) -> torch.Tensor:
            return i(8, *shape) + 1 if integer else u(*shape)

        if name in UNARY:
            yield from (call(f"aten.{name}", draw(*shape), *UNARY[name]) for shape in ((12, 3, 24), ()))
        elif name != "complex":
            yield from (call(f"aten.{name}", draw(12, 24), draw(*shape)) for shape in ((12, 24), (12, 1), (24,), ()))
        if name in ("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor"):
            yield call(f"aten.{name}", u(12, 24), 2.0)
            yield call(f"aten.{name}", u(2, 12, 1), u(24))


SAMPLES += elementwise()
SAMPLES += [  # what PyTorch's own tests do not call, or only with shapes too small to split
    call("aten.ger", f(12), f(24)),
    call("aten.chain_matmul", [f(12, 24), f(24, 36), f(36, 12)]),
    call("aten.linalg_multi_dot", [f(24), f(24, 36), f(36, 12)]),
    call("aten.linalg_multi_dot", [f(12, 24), f(24, 36), f(36)]),
    *(call("aten.einsum", e, [f(*s) for s in shapes]) for e, *shapes in (
        ("bmk,bkn->bmn", (4, 12, 24), (4, 24, 12)), ("mk , kn", (12, 24), (24, 12)),
        ("...k,kn->...n", (2, 12, 24), (24, 12)), ("bhqd,bkhd->bhqk", (4, 12, 6, 3), (4, 2, 12, 3)),
        ("ii->i", (12, 12)), ("...i,...j", (4, 12), (1, 24)), ("a,b,ab->", (12,), (24,), (12, 24)),
    )),
    call("aten.convolution", f(12, 12, 5), f(24, 12, 3), f(24), [1], [0], [1], False, [0], 1),
    call("aten.convolution", f(12, 12, 5), f(12, 24, 3), None, [2], [1], [1], True, [1], 1),
    call("aten.convolution", f(12, 12, 5), f(12, 1, 3), None, [1], [0], [1], False, [0], 12),
    *(call(f"aten.conv{n}d.padding", f(12, 12, *[4] * n), f(12, *c, *[3] * n), *b, [1] * n, "same", [1] * n, g)
      for n in (1, 2, 3) for c, g in (((12,), 1), ((3,), 4), ((1,), 12)) for b in ((None,), (f(12),))),
    *(call("aten.conv2d", f(*b, 12, 5, 5), f(m * 12, 1, 3, 3), f(m * 12), [2], [1], [1], 12)
      for b in ((), (2,)) for m in (1, 2)),
    *(call(f"aten.{n}", f(12, 5, 12), states, [f(g * 12, 12), f(g * 12, 12), f(g * 12), f(g * 12)],
           True, 1, 0.0, False, False, first)
      for n, g, states in (("gru.input", 3, f(1, 12, 12)), ("rnn_tanh.input", 1, f(1, 12, 12)),
                           ("rnn_relu.input", 1, f(1, 12, 12)), ("lstm.input", 4, [f(1, 12, 12), f(1, 12, 12)]))
      for first in (True,)),
    call("aten.gru.input", f(5, 12, 12), f(1, 12, 12), [f(36, 12), f(36, 12)], False, 1, 0.0, False, False, False),
    call("transformers.grouped_mm_fallback", f(24, 12), f(3, 12, 24), torch.tensor([5, 5, 24])),
    *(call("aten.index.Tensor", f(12, 4, 12, 6), indices) for indices in (
        [i(12, 24), i(4, 24)], [i(12, 24, 1), i(4, 12), None], [None, i(4, 12), i(12, 12, 1)],
        [i(12, 24), None, i(12, 24)], [None, i(4, 24), None, i(6, 12, 1)], [i(12), i(4, 12)],
    )),
    *(call("aten.index_put", f(12, 12, 24), indices, values, add) for add in (False, True)
      for indices, values in (
        ([torch.arange(12)], f(12, 12, 24)), ([None, torch.arange(5)], f(12, 5, 24)), ([None, torch.arange(5)], f()),
        ([torch.arange(4), torch.arange(4)], f(4, 24)), ([torch.arange(4), None, torch.arange(4)], f(4, 12)),
        ([torch.arange(4), None, torch.arange(4)], f(12)), ([None, None, torch.arange(24).reshape(12, 2)], f(12, 2)),
        ([b(12, 12)], f()), ([b(12, 12, 24)], f()), ([b(12, 12)], f(24)), ([b(12)], f(12, 24)),
    )),
    *(call(f"aten.{n}", f(12, 24), 1, i(24, 12, *s), *rest) for s in ((24,), (3,)) for n, *rest in (
        ("scatter.value", 2.0), ("scatter_add", f(12, *s)))),
    *(call(f"aten.scatter.{n}", f(12, 24), 1, i(1, 12, 1), v, reduce="add")._replace(constants=(0, 1, 2))
      for n, v in (("value_reduce", 2.0), ("reduce", f(12, 1)))),
    call("aten.histc", f(12, 24), 5, -1, 1),
    *(call("aten.squeeze", f(size, 1)) for size in (4, 12)),
    call("aten.nan_to_num", f(12).log()),
    call("aten.dstack", [f(12, 24, 12), f(12, 24, 12)]),
    *(call(f"aten.{n}", f(12, 3, 24), 0, 2) for n in ("swapaxes", "swapdims", "movedim.int")),
    *(call(f"aten.{n}", [f(12, 24), f(12, 12)], 1) for n in ("concat", "concatenate")),
    *(call("aten.repeat", f(*s), [*r])
      for s, r in (((12,), (2, 3)), ((1, 12), (12, 2)), ((12, 1), (1, 24)), ((12,), (12, 1)))),
    *(call("aten.tile", f(*s), [*r]) for s, r in (((12, 1), (24,)), ((1, 12), (12, 1, 2)))),
    *(call("aten.repeat_interleave.self_int", f(12, 24), *r) for r in ((3, 0), (2, -1), (2,))),
    call("aten.repeat_interleave.self_Tensor", f(12, 24), torch.arange(12), 0),
    call("aten.unflatten.int", f(12, 24), -1, [12, 2]),
    *(call("aten.type_as", f(12, 24), f(*s)) for s in ((12, 24), (12, 3), (), (1, 12, 24))),
    *(call("aten.new_ones", f(*s), [12, 24]) for s in ((12, 24), (12, 3, 4), (24,), (1, 24))),
    call("aten.where.Scalar", b(12, 24), 1.0, 0.0),
    *(call(f"aten.{n}", 2.0, u(12, 24)) for n in ("pow.Scalar", "float_power.Scalar")),
    *(call("aten.div.Scalar_mode", u(12, 24), 0.3, rounding_mode=m) for m in ("floor", "trunc")),
    call("aten.divide.Scalar_mode", u(12, 24), 0.3, rounding_mode="floor"),
    call("aten.clip.Tensor", f(12, 24), f(24), None),
    call("aten.affine_grid_generator", f(12, 2, 3), [12, 3, 4, 5], False),
    call("aten.affine_grid_generator", f(12, 3, 4), [12, 3, 4, 5, 2], True),
    Sample("aten._grouped_mm", (i(3, 24, 48).float(), i(3, 3, 48, 48).float(), torch.tensor([5, 5, 24]).int()), {}, (),
           (0, 1)),
    call("aten.norm.Scalar", f(12, 24)),
    *(call("aten.linalg_vector_norm", f(12, 24), order, [-1]) for order in (1, 2)),
    call("aten.inverse", f(12, 4, 4)),
    call("aten.view.dtype", f(12, 24), torch.float64, constant=0),
    call("aten.view.dtype", i(9, 12, 24), torch.int32),
    call("aten.col2im", f(12, 48, 36), [7, 7], [2, 2], [1, 1], [0, 0], [1, 1]),
    call("aten.native_channel_shuffle", f(12, 12, 4, 4), 3, constant=0),
    call("aten._fused_rms_norm", f(2, 12, 24), [24], f(24), 1e-6),
    call("aten.rms_norm", f(2, 12, 24), [12, 24], None, 1e-6),
    *(normed("_native_batch_norm_legit_functional", f(12, 12, 5), f(12), f(12), f(12), u(12), t, 0.1, 1e-5)
      for t in (True, False)),
    *(normed("batch_norm", f(12, 12, 5), f(12), f(12), f(12), u(12), t, 0.1, 1e-5, False) for t in (True, False)),
    *(normed("_native_batch_norm_legit_no_training", f(12, 12, *s), f(12), f(12), f(12), u(12), 0.1, 1e-5)
      for s in ((), (5, 4))),
    call("aten._native_batch_norm_legit.no_stats", f(12, 12, 5), f(12), f(12), True, 0.1, 1e-5),
    *(call("aten.group_norm", f(12, 12, 5), g, f(12), f(12)) for g in (1, 4, 12)),
    call("aten.native_group_norm", f(12, 24, 5), f(24), f(24), 12, 24, 5, 12, 1e-5),
    call("aten.instance_norm", f(12, 12, 5), f(12), f(12), None, None, True, 0.1, 1e-5, False),
    *(normed("instance_norm", f(12, 12, 5), f(12), f(12), f(12), u(12), t, 0.1, 1e-5, False) for t in (False,)),
    *(call(f"aten.upsample_nearest{n}d", f(12, 12, *[3] * n), [6] * n) for n in (1, 2, 3)),
    *(call(f"aten._upsample_nearest_exact{n}d", f(12, 12, *[3] * n), [6] * n) for n in (1, 2, 3)),
    *(call(f"aten.upsample_{k}", f(12, 12, *[3] * n), [6] * n, False)
      for k, n in (("linear1d", 1), ("bilinear2d", 2), ("bicubic2d", 2), ("trilinear3d", 3))),
    call("aten._upsample_bicubic2d_aa", f(12, 12, 4, 4), [2, 2], False),
    call("aten._upsample_bicubic2d_aa.vec", f(12, 12, 4, 4), [2, 2], False, None),
    # complex
    *(call(f"aten.{n}", f(12, 24), f(12, 24)) for n in ("complex", "polar")),
    *(call(f"aten.fft_{n}", f(12, 12, 6)) for n in ("rfft", "ihfft", "rfft2", "rfftn")),
    *(call(f"aten.fft_{n}", z(12, 12, 6)) for n in (
        "fft", "ifft", "irfft", "hfft", "fft2", "ifft2", "irfft2", "fftn", "ifftn", "irfftn", "fftshift")),
    *(call(f"aten.fft_{n}n", z(12, 12, 6), None, [1]) for n in ("fft", "ifft", "irfft")),
    call("aten._fft_c2c", z(12, 12, 6), [1], 0, True),
    call("aten._fft_c2r", z(12, 7, 6), [1], 0, 12),
    call("aten._fft_r2c", f(12, 12, 6), [1], 0, True),
    *(call(f"aten.{n}", z(12, 24)) for n in ("view_as_real", "real", "imag", "angle", "abs", "conj_physical", "sum")),
    call("aten.view_as_complex", f(12, 24, 2)),
    call("aten.einsum", "bix,iox->box", [z(12, 4, 3), z(4, 24, 3)]),
    call("aten.mm", z(12, 24), z(24, 12)),
    *(call(f"aten.{n}.Tensor", z(12, 24), z(12, 24)) for n in ("add", "mul", "div")),
    # one step of recurrent layers, lengths of rows, bags of rows
    call("aten.lstm_cell", f(12, 4), [f(12, 6), f(12, 6)], f(24, 4), f(24, 6), f(24), f(24)),
    *(call(f"aten.{n}_cell", f(12, 4), f(12, 6), f(k * 6, 4), f(k * 6, 6), f(k * 6), f(k * 6))
      for n, k in (("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1))),
    call("aten.lstm_cell", f(12, 4), [f(12, 6), f(12, 6)], f(24, 4), f(24, 6), None, None),
    *(call("aten._weight_norm", f(12, 4, 12), f(*(12 if i == d else 1 for i in range(3))), d) for d in (0, 2)),
    call("aten._weight_norm", f(12, 24), f(1, 1), -1),
    call("autopart.ctc_losses", f(8, 12, 5).log_softmax(-1), i(4, 12, 3) + 1, i(3, 12) + 6, i(3, 12) + 1, 0, True),
    call("aten.embedding_bag", f(24, 12), i(24, 36), torch.arange(0, 36, 3), False, 2),
    call("aten.embedding_bag.padding_idx", f(24, 12), i(24, 12), torch.arange(12), False, 0, False, None, False, 5),
    # random: with nothing to draw
    *(call(f"aten.{n}", [0]) for n in ("rand", "randn")),
    call("aten.randperm", 1),
    *(call(f"aten.{n}", f(0), constant=0) for n in ("rand_like", "randn_like", "bernoulli", "uniform", "exponential",
                                        "normal_functional")),
    call("aten.bernoulli.p", f(12), 0.0, constant=0),
    call("aten.multinomial", torch.ones(12, 1, dtype=torch.float64), 1),
    *(call(f"aten.{n}_window", 12, dtype=torch.float64) for n in ("hann", "hamming")),
]  # fmt: skip
SAMPLES += [call("aten.add.Tensor", f(2, 12, 36), f(*s), hints=PARTS) for s in ((2, 12, 36), (36,), (12, 1))]
SAMPLES += [
    call("aten.add.Tensor", f(12, 24), f(12, 24), alpha=2),
    call("aten.add.Tensor", f(0, 12), f(1, 12)),
]
