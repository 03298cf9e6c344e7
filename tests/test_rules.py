"""The table of op rules proves itself.

Every sample call runs whole, and split over simulated ranks in every way its row allows; outputs and input
gradients, put together again, must equal the whole in float64. Corrupted rows must fail the same proof.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autopart import rules
from autopart.kernels.rms_norm import rms_norm
from autopart.notation import Placement, S, Strategy
from autopart.rules import (
    BINARY,
    LINEAR_BINARY,
    POINTWISE,
    RULES,
    Args,
    flatten,
    local_args,
    local_shape,
    op_name,
    strategies,
)

Tensors = list[torch.Tensor]
Op = Callable[..., Any]
Kwargs = dict[str, Any]
SHARDS = (2, 3, 4)
RANDOM = torch.Generator().manual_seed(0)
aten = torch.ops.aten
ATTENTION = "aten.scaled_dot_product_attention"


class Sample(NamedTuple):
    """One call of an operator.

    `hints` are placements that a consumer would like, `constant` is the tensor that cannot have a gradient.
    """

    name: str
    args: Args
    kwargs: Kwargs
    hints: tuple[Placement, ...] = ()
    constant: int = -1

    @property
    def op(self) -> Op:
        return resolve(self.name)


def resolve(name: str) -> Op:
    """The operator a row is about."""
    if name == "autopart.rms_norm":
        return rms_norm
    _, packet, overload = (*name.split("."), "default")[:3]
    return getattr(getattr(aten, packet), overload)


def f(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=RANDOM, dtype=torch.float64)


def u(*shape: int) -> torch.Tensor:
    """Between 0.1 and 0.9: in the domain of log, acos and the like."""
    return torch.rand(shape, generator=RANDOM, dtype=torch.float64) * 0.8 + 0.1


def i(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(high, shape, generator=RANDOM)


def b(*shape: int) -> torch.Tensor:
    return i(2, *shape).bool()


def some(mask: torch.Tensor) -> torch.Tensor:
    """An attention mask that leaves every query at least one key."""
    mask[..., 0] = True
    return mask


def ignoring(targets: torch.Tensor, ignored: int = -100) -> torch.Tensor:
    """A third of the targets ignored, unevenly over the ranks."""
    return targets.index_fill(0, torch.tensor([0, 1, 2, 7]), ignored)


def call(name: str, *args: Any, hints: Sequence[Placement] = (), constant: int = -1, **kwargs: Any) -> Sample:
    return Sample(name, args, kwargs, tuple(hints), constant)


KEEP = {"keepdim": True}
PARTS = [S(1, (12, 24)), S(2, (12, 24)), S(1, (24, 12)), S(1, (12, 12))]  # the last fits no dim of 36
SAMPLES = [
    # contractions
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
    *(call(f"aten.{name}", f(12, 24)) for name in ("clone", "alias", "contiguous", "_to_copy", "neg")),
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


# Elementwise operators: what follows the tensor, and which want integers (`copy`, as it has no gradient).
FOLLOWED = {
    "hardtanh": (-0.5, 0.5),
    "leaky_relu": (0.1,),
    "threshold": (0.3, 2.0),
    "clamp": (None, 0.4),
    "full_like": (2.0,),
    "pow.Tensor_Scalar": (3,),
    "bitwise_and.Scalar": (3,),
    "bitwise_or.Scalar": (3,),
}
INTEGER = ("bitwise", "__", "floor_divide", "copy")


def elementwise() -> Iterator[Sample]:
    for name in (*POINTWISE, *BINARY):
        integer = name.startswith(INTEGER)

        def draw(*shape: int, integer: bool = integer) -> torch.Tensor:
            return i(8, *shape) + 1 if integer else u(*shape)

        if name in POINTWISE:
            scalar = FOLLOWED.get(name, (3 if integer else 0.5,) if name.endswith(".Scalar") else ())
            yield from (call(f"aten.{name}", draw(*shape), *scalar) for shape in ((12, 3, 24), ()))
        else:
            mode = {"rounding_mode": "floor"} if name == "div.Tensor_mode" else {}
            for shape in ((12, 24), (12, 1), (24,), ()):
                yield call(f"aten.{name}", draw(12, 24), draw(*shape), **mode)
        if name in LINEAR_BINARY:
            yield call(f"aten.{name}", u(12, 24), 2.0)
            yield call(f"aten.{name}", u(2, 12, 1), u(24))


SAMPLES += elementwise()
SAMPLES += [call("aten.add.Tensor", f(2, 12, 36), f(*s), hints=PARTS) for s in ((2, 12, 36), (36,), (12, 1))]
SAMPLES += [
    call("aten.add.Tensor", f(12, 24), f(12, 24), alpha=2),
    call("aten.add.Tensor", f(0, 12), f(1, 12)),
]


def swapped(value: Any, tensors: Iterator[Any]) -> Any:
    """`value` with its tensors, in order, replaced."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, (list, tuple)):
        return type(value)(swapped(v, tensors) for v in value)
    return value


def ways(sample: Sample, shards: int) -> list[Strategy]:
    sizes = swapped(sample.args, (t.shape for t in tensors_of(sample)))
    outputs = [o.shape for o in called(sample.op, sample.args, sample.kwargs)]
    return strategies(sample.name, sizes, outputs, shards, sample.hints)


def tensors_of(sample: Sample) -> Tensors:
    return [a for a in flatten(sample.args) if isinstance(a, torch.Tensor)]


def called(op: Op, args: Args, kwargs: Kwargs) -> Tensors:
    result = op(*args, **kwargs)
    return list(result) if isinstance(result, (list, tuple)) else [result]


def shards_of(whole: torch.Tensor, placement: Placement, shards: int) -> Tensors:
    """Every rank's piece of a split tensor."""
    segments = whole.split(placement.parts or whole.shape[placement.dim], placement.dim)
    pieces = zip(*(s.tensor_split(shards, placement.dim) for s in segments), strict=True)
    return [torch.cat(piece, placement.dim) for piece in pieces]


def joined(pieces: Tensors, placement: Placement) -> torch.Tensor:
    """The inverse of `shards_of`."""
    dim, shards = placement.dim, len(pieces)
    parts = placement.parts or (pieces[0].shape[dim] * shards,)
    segments = zip(*(p.split([n // shards for n in parts], dim) for p in pieces), strict=True)
    return torch.cat([t for segment in segments for t in segment], dim)


def partial_sums(whole: torch.Tensor, shards: int) -> Tensors:
    """Random tensors that sum to `whole`."""
    draw = f if whole.is_floating_point() else lambda *shape: i(9, *shape).to(whole.dtype)
    rest = [draw(*whole.shape) for _ in range(shards - 1)]
    return [whole - sum(rest), *rest]


def placed(whole: torch.Tensor, placement: Placement, shards: int) -> Tensors:
    """What every rank holds of `whole`."""
    if placement.kind == "S":
        return shards_of(whole, placement, shards)
    return partial_sums(whole, shards) if placement.kind == "P" else [whole] * shards


def check(held: Tensors, whole: torch.Tensor, placement: Placement, what: str) -> None:
    """Fail unless what the ranks hold, placed so, is `whole`."""
    if placement.kind in "SP":
        held = [joined(held, placement) if placement.kind == "S" else torch.stack(held).sum(0)]
    for value in held:
        torch.testing.assert_close(value, whole, rtol=1e-10, atol=1e-10, msg=lambda text: f"{what}: {text}")


DUAL = {"R": "R", "C": "P", "S": "S", "P": "R"}


def gradient(placement: Placement) -> Placement:
    """Where the gradient of a tensor placed so lies."""
    return placement if placement.kind == "S" else Placement(DUAL[placement.kind])


def mean(op: Op, ranks: list[Args], kwargs: Kwargs, whole: Args) -> list[Tensors]:
    return [[o / len(ranks) for o in called(op, args, kwargs)] for args in ranks]


def cross_entropy_sum(op: Op, ranks: list[Args], kwargs: Kwargs, whole: Args) -> list[Tensors]:
    _, _, weight, _, ignored, smoothing = (*whole, *(None, 1, -100, 0.0)[len(whole) - 2 :])
    count = (whole[1] != ignored).sum()
    return [[op(x, target, weight, 2, ignored, smoothing) / count] for x, target, *_ in ranks]


def vocab_embedding(op: Op, ranks: list[Args], kwargs: Kwargs, whole: Args) -> list[Tensors]:
    def one(rank: int, weight: torch.Tensor, ids: torch.Tensor, padding: int = -1) -> torch.Tensor:
        ids, padding = ids - rank * len(weight), padding - rank * len(weight)
        mine = (ids >= 0) & (ids < len(weight))
        found = op(weight, ids * mine, padding if 0 <= padding < len(weight) else -1)
        return found * mine.unsqueeze(-1)

    return [[one(rank, *args[:3])] for rank, args in enumerate(ranks)]


def vocab_cross_entropy(op: Op, ranks: list[Args], kwargs: Kwargs, whole: Args) -> list[Tensors]:
    """The formula alone, over all ranks at once; tests with real processes prove its collectives."""
    target, ignored = whole[1], (*whole, *(None, 1, -100)[len(whole) - 2 :])[4]
    top = torch.stack([x.detach().amax(-1) for x, *_ in ranks]).amax(0)
    log_sum = top + sum((x - top[:, None]).exp().sum(-1) for x, *_ in ranks).log()
    at = [target - rank * x.shape[1] for rank, (x, *_) in enumerate(ranks)]
    mine = [(t >= 0) & (t < x.shape[1]) for t, (x, *_) in zip(at, ranks, strict=True)]
    hits = sum(x.gather(1, (t * m)[:, None])[:, 0] * m for (x, *_), t, m in zip(ranks, at, mine, strict=True))
    valid = target != ignored
    return [[((log_sum - hits) * valid).sum() / valid.sum()]] * len(ranks)


def plain(op: Op, ranks: list[Args], kwargs: Kwargs, whole: Args) -> list[Tensors]:
    return [called(op, args, kwargs) for args in ranks]


LOCAL = {"": plain} | {k.__name__: k for k in (mean, cross_entropy_sum, vocab_embedding, vocab_cross_entropy)}


def differentiable(tensors: Sequence[torch.Tensor]) -> list[int]:
    return [k for k, t in enumerate(tensors) if t.requires_grad]


def leaves(tensors: Sequence[torch.Tensor], constant: int) -> Tensors:
    wants = [t.is_floating_point() and k != constant for k, t in enumerate(tensors)]
    return [t.detach().clone().requires_grad_(w) for t, w in zip(tensors, wants, strict=True)]


def gradients(outputs: Tensors, inputs: Tensors, cotangents: Tensors) -> Tensors:
    """Of the differentiable inputs."""
    wanted = [t for t in inputs if t.requires_grad]
    at = differentiable(outputs)
    given = [cotangents[k] for k in at]
    return list(torch.autograd.grad([outputs[k] for k in at], wanted, given, True, materialize_grads=True))


def prove(sample: Sample, strategy: Strategy, shards: int) -> None:
    """Fail unless the split run gives the outputs and input gradients of the whole."""
    what = f"{sample.name} {strategy} over {shards}"
    inputs = leaves(tensors_of(sample), sample.constant)
    args = swapped(sample.args, iter(inputs))
    outputs = called(sample.op, args, sample.kwargs)
    took = [p for p in strategy.inputs if p is not None]
    held = [placed(t.detach(), p, shards) for t, p in zip(inputs, took, strict=True)]
    local_inputs = [leaves([h[rank] for h in held], sample.constant) for rank in range(shards)]
    sizes = [local_shape(o.shape, p, shards) for o, p in zip(outputs, strategy.outputs, strict=True)]
    ranks = [local_args(sample.name, swapped(sample.args, iter(t)), sizes) for t in local_inputs]
    gave = LOCAL[strategy.local](sample.op, ranks, sample.kwargs, args)
    for k, (whole, placement) in enumerate(zip(outputs, strategy.outputs, strict=True)):
        assert all(tuple(o[k].shape) == sizes[k] for o in gave), what
        check([o[k].detach() for o in gave], whole.detach(), placement, f"{what}, output {k}")
    if not differentiable(outputs) or not differentiable(inputs):
        return
    cotangents = [f(*o.shape) for o in outputs]
    expected = gradients(outputs, inputs, cotangents)
    given = [placed(g, gradient(p), shards) for g, p in zip(cotangents, strategy.outputs, strict=True)]
    found = [gradients(gave[r], local_inputs[r], [g[r] for g in given]) for r in range(shards)]
    for k, at in enumerate(differentiable(inputs)):
        check([g[k] for g in found], expected[k], gradient(took[at]), f"{what}, gradient of input {at}")


def identified(samples: Sequence[Sample]) -> list[str]:
    return [f"{s.name}-{k}" for k, s in enumerate(samples)]


def test_every_row_has_a_sample() -> None:
    assert {s.name for s in SAMPLES} == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_every_row_is_an_operator(name: str) -> None:
    assert op_name(resolve(name)) == name


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("sample", SAMPLES, ids=identified(SAMPLES))
def test_row(sample: Sample, shards: int) -> None:
    for strategy in ways(sample, shards):
        prove(sample, strategy, shards)


def spelled(sample: Sample, shards: int) -> set[str]:
    """The splits, as "S0 C -> P", with what replaces the operator."""
    return {
        f"{' '.join(str(p) for p in s.inputs if p)} -> {' '.join(map(str, s.outputs))} {s.local}".strip()
        for s in ways(sample, shards)
        if s.shards_work
    }


SPLITS = [  # every split there is over 2 ranks: a row that allows too little proves itself as well
    (call("aten.mm", f(4, 6), f(6, 8)), "S0 C -> S0; S1 S0 -> P; C S1 -> S1"),
    (call("aten.linear", f(3, 4, 6), f(8, 6)), "S1 C -> S1; S2 S1 -> P; C S0 -> S2"),
    (call("aten.linear", f(4, 6), f(8, 6), f(8)), "S0 C C -> S0; C S0 S0 -> S1"),
    (call("aten.linear", f(4, 6), f(8, 6), hints=[S(1, (2, 6)), S(1, (4, 6))]),
     "S0 C -> S0; S1 S1 -> P; C S0 -> S1; C S0[2+6] -> S1[2+6]"),
    (call("aten.conv2d", f(2, 4, 5, 5), f(6, 4, 3, 3)), "S0 C -> S0; S1 S1 -> P; C S0 -> S1"),
    (call("aten.conv2d", f(2, 4, 5, 5), f(4, 1, 3, 3), None, [1, 1], [0, 0], [1, 1], 4), "S0 C -> S0"),
    (call(ATTENTION, f(2, 4, 6, 8), f(2, 4, 6, 8), f(2, 4, 6, 8)),
     "S0 S0 S0 -> S0; S1 S1 S1 -> S1; S2 C C -> S2"),
    (call(ATTENTION, f(2, 4, 6, 8), f(2, 4, 6, 8), f(2, 4, 6, 8), None, 0.0, True),
     "S0 S0 S0 -> S0; S1 S1 S1 -> S1"),
    (call(ATTENTION, f(1, 4, 5, 8), f(1, 2, 5, 8), f(1, 2, 5, 8), enable_gqa=True),
     "S1 S1 S1 -> S1"),
    (call("aten.embedding", f(4, 6), i(4, 8)), "S0 C -> P vocab_embedding; S1 C -> S1; C S0 -> S0"),
    (call("aten.cross_entropy_loss", f(6, 8), i(8, 6)),
     "S0 S0 -> P cross_entropy_sum; S1 C -> R vocab_cross_entropy"),
    (call("aten.cross_entropy_loss", f(6, 8), i(8, 6), None, 2), "S0 S0 -> P"),
    (call("aten.layer_norm", f(4, 6), [6], f(6), f(6)), "S0 C C -> S0"),
    (call("aten.mean.dim", f(4, 6), [-1]), "S0 -> S0; S1 -> P mean"),
    (call("aten.amax", f(4, 6), [-1]), "S0 -> S0"),
    (call("aten.view", f(4, 24), [4, 3, 8]), "S0 -> S0"),
    (call("aten.view", f(4, 24), [4, 6, 4]), "S0 -> S0; S1 -> S1"),
    (call("aten.view", f(3, 6, 4), [3, 24]), "S1 -> S1"),
    (call("aten.expand", f(4, 1), [2, 4, 6]), "C -> S0; S0 -> S1; C -> S2"),
    (call("aten.split.Tensor", f(3, 12), 6, 1), "S1[6+6] -> S1 S1"),
    (call("aten.cat", [f(3, 4), f(3, 6)], 1), "S1 S1 -> S1[4+6]"),
    (call("aten.cat", [f(3, 4), f(3, 5)], 1), ""),
    (call("aten.index.Tensor", f(4, 5, 6), [None, i(5, 8)]), "S0 C -> S0; S2 C -> S2; C S0 -> S1"),
    (call("aten.gather", f(4, 6), 1, i(6, 4, 2)), "S0 S0 -> S0; C S1 -> S1"),
    (call("aten.pad", f(4, 6), [1, 1]), "S0 -> S0"),
    (call("aten.add.Tensor", f(4, 6), f(6)), "S0 C -> S0; S1 S0 -> S1"),
    (call("aten.add.Tensor", f(4, 6), 1.0), "S0 -> S0; S1 -> S1"),
    (call("aten.full", [4, 6], 1.0), "-> S0; -> S1"),
]  # fmt: skip


@pytest.mark.parametrize("sample, expected", SPLITS, ids=identified([s for s, _ in SPLITS]))
def test_splits(sample: Sample, expected: str) -> None:
    assert spelled(sample, 2) == set(filter(None, expected.split("; ")))


@pytest.mark.parametrize("name", ["aten.relu", "aten.softmax.int", "aten.amax", "aten.where.ScalarOther"])
def test_no_partial_sum_passes(name: str) -> None:
    sample = next(s for s in SAMPLES if s.name == name)
    assert all("P" not in {p.kind for p in s.inputs if p} for s in ways(sample, 2))


@st.composite
def views(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two shapes of as many elements."""
    primes = draw(st.lists(st.sampled_from([1, 2, 3, 4]), max_size=5))

    def grouped() -> list[int]:
        cuts = sorted(draw(st.sets(st.integers(0, len(primes)), max_size=4)) | {0, len(primes)})
        return [math.prod(primes[a:z]) for a, z in pairwise(cuts)]

    return grouped(), grouped()


@given(views())
@settings(max_examples=100, deadline=None)
def test_any_view(shapes: tuple[list[int], list[int]]) -> None:
    sample = call("aten.view", f(*shapes[0]), shapes[1])
    for strategy in ways(sample, 2):
        prove(sample, strategy, 2)


CORRUPTED = [  # the operator's wrong row, and a call that shows it
    ("a k -> a k", call("aten.softmax.int", f(12, 24), -1)),
    ("a k -> a k", call("aten.log_softmax.int", f(12, 24), 1)),
    ("... -> ...", call("aten.cumsum", f(12, 24), 0)),
    ("... d, -, d, d -> ... d", call("aten.layer_norm", f(12, 24), [24], f(24), f(24))),
    ("... d, d -> ... d", call("autopart.rms_norm", f(12, 24), f(24), 1e-6)),
    ("k m, k n -> m n", call("aten.mm", f(12, 12), f(12, 12))),
    ("m k, n k -> m n", call("aten.mm", f(12, 12), f(12, 12))),
    ("... k, k n -> ... n", call("aten.linear", f(12, 12), f(12, 12))),
    ("... k, n k, n -> ... n", call("aten.linear", f(12, 24), f(36, 24), f(36))),
    ("b h q d!, b h k d!, b h k e! -> b h q e!", call(ATTENTION, *(f(2, 3, 12, 5),) * 3)),
    ("b h q d, b h k! d, b h k! e! -> b h q e!", call(ATTENTION, *(f(2, 3, 5, 12),) * 3)),
    ("b h q d!, b h k! d!, b h k! e! -> b h q e!",
     call(ATTENTION, *(f(2, 3, 12, 5),) * 3, None, 0.0, True)),
    ("b (g h) q! d!, b h k! d!, b h k! d! -> b (g h) q! d!",
     call(ATTENTION, f(1, 24, 2, 5), *(f(1, 12, 3, 5),) * 2, enable_gqa=True)),
    ("d v, ... -> ... d", call("aten.embedding", f(12, 12), i(12, 12))),
    ("v d, ... -> ... d", call("aten.embedding", f(12, 12), i(12, 12))),
    ("b v, b -> ", call("aten.cross_entropy_loss", f(12, 12), ignoring(i(12, 12)))),
    ("... -> ", call("aten.mean", f(12, 24))),
    ("a b -> a", call("aten.amax", f(12, 24), [1])),
    ("a b -> a", call("aten.var.correction", f(12, 24), [1])),
    ("a b -> (b a)", call("aten.view", f(12, 12), [144])),
    ("(a b) -> b a", call("aten.view", f(24), [2, 12])),
    ("a b -> a b", call("aten.transpose.int", f(12, 12), 0, 1)),
    ("(a 3) -> a, a, a", call("aten.split.Tensor", f(36), 12)),
    ("a b, a c -> a d", call("aten.cat", [f(12, 12), f(12, 12)], 1)),
    ("a b, -, a c -> a c", call("aten.gather", f(12, 24), 0, i(12, 12, 24))),
    ("a b, i -> i b", call("aten.index.Tensor", f(12, 3), [i(12, 24)])),
    ("a b -> a b", call("aten.pad", f(12, 12), [1, -1])),
    ("b c a!, o c w!, o -> b o z!", call("aten.conv1d", f(12, 12, 5), f(12, 12, 3), f(12))),
    ("... k -> ...", call("aten.relu", f(12))),
]  # fmt: skip


@pytest.mark.parametrize("row, sample", CORRUPTED, ids=[f"{s.name}: {r}" for r, s in CORRUPTED])
def test_wrong_row_fails(row: str, sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    for strategy in ways(sample, 2):
        prove(sample, strategy, 2)
    monkeypatch.setitem(RULES, sample.name, rules.Rule(row))
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        for strategy in ways(sample, 2):
            prove(sample, strategy, 2)


@pytest.mark.parametrize("sample", [call("aten.relu", f(12)), call("aten.mul.Tensor", f(12), f(12))])
def test_wrong_linearity_fails(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, sample.name, replace(RULES[sample.name], linear=-1))
    (partial,) = (s for s in ways(sample, 2) if s.name == "P")
    with pytest.raises(AssertionError, match="not close"):
        prove(sample, partial, 2)
