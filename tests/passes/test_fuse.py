"""The pass `fuse`: what is a kernel, what is nearly one, and what a plan says of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from transformers.models.mamba2 import modeling_mamba2 as mamba2

import autopart
from autopart import PartitionError
from autopart.frontend.batch import outline
from autopart.ir.graph import calls, info
from autopart.ir.random_ops import stochastic_depth
from autopart.kernels.forms import FORMS
from autopart.kernels.table import KERNELS, kernel_of
from autopart.passes import stored_patterns
from autopart.passes.fuse import fuse
from autopart.passes.pattern import _makers, _read_outside, loose, pattern_of
from autopart.passes.randomness import randomness
from autopart.passes.simplify import simplify
from autopart.passes.stored_patterns import FILE, RELEASE, stored, to_data
from autopart.passes.trace import trace

Tensor = torch.Tensor


class Formula(nn.Module):
    """A loss of a formula of x (samples, 6, 8) and a weight (8,)."""

    def __init__(self, formula: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.formula, self.weight, self.first = formula, nn.Parameter(torch.rand(8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(self.first(x), self.weight).square().mean()


def fused(
    formula: Callable[[Tensor, Tensor], Tensor], off: tuple[str, ...] = (), device: str = "cpu"
) -> tuple[dict[str, int], tuple[str, ...]]:
    """The kernels that are found in a formula, and the near misses."""
    traced = fuse(simplify(trace(Formula(formula), outline({"x": torch.randn(2, 6, 8)}, 2))), device, off)
    names = (info(node).name.partition(".")[2] for node in calls(traced.graph) if kernel_of(info(node).name))
    return dict(Counter(names)), traced.near_misses


def rms(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


FOUND = {
    "RMSNorm": (rms, "rms_norm"),
    "factors in another order": (lambda x, w: torch.rsqrt(1e-5 + x.pow(2).mean(2, keepdim=True)) * x * w, "rms_norm"),
}
NEAR = {
    "epsilon behind the root": lambda x, w: w * (x * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) + 1e-6)),
    "another power": lambda x, w: w * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6)),
    "another dim": lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_kernel_is_found(name: str) -> None:
    formula, kernel = FOUND[name]
    assert fused(formula) == ({kernel: 1}, ())
    assert fused(formula, tuple(KERNELS))[0] == {}


@pytest.mark.parametrize("name", NEAR)
def test_what_differs_is_left(name: str) -> None:
    assert fused(NEAR[name])[0] == {}


def test_a_near_miss_is_listed() -> None:
    found, near = fused(NEAR["another power"])
    assert not found and near and all("rms_norm" in text and " at test_fuse.py:" in text for text in near)


def routed(dim: int, shared: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """The sum of the weights and numbers of the two greatest chances; `shared`: others read the numbers too."""

    def formula(x: Tensor, w: Tensor) -> Tensor:
        chances, numbers = torch.topk(F.softmax(x, dim=dim, dtype=torch.float32), 2, dim=-1)
        found = chances / chances.sum(dim=-1, keepdim=True) + numbers
        return (found + numbers[..., :1] if shared else found) * w[:2]

    return formula


def sparse(select: Callable[[Tensor], Tensor], mask: Callable[[Tensor, Tensor], Tensor], **options: Any) -> Any:
    """Attention of x to itself by the three greatest scores of every query."""

    def formula(x: Tensor, w: Tensor) -> Tensor:
        scores = x @ x.transpose(1, 2)
        return F.softmax(mask(scores, select(scores.topk(3, dim=-1, **options).values)), dim=-1) @ (x * w)

    return formula


def filled(scores: Tensor, least: Tensor) -> Tensor:
    return scores.masked_fill(scores < least, float("-inf"))


SPARSE = {
    "sliced": sparse(lambda v: v[..., -1:], filled),
    "selected": sparse(lambda v: v[..., -1].unsqueeze(-1), filled),
    "with None": sparse(lambda v: v[:, :, -1, None], filled),
    "where, at least": sparse(lambda v: v[..., -1:], lambda s, least: torch.where(s >= least, s, float("-inf"))),
    "where, selected": sparse(lambda v: v[..., -1, None], lambda s, least: torch.where(s >= least, s, float("-inf"))),
}
DENSE = {
    "the second largest": sparse(lambda v: v[..., 1:2], filled),
    "larger ones alone": sparse(lambda v: v[..., -1:], lambda s, least: s.masked_fill(s <= least, float("-inf"))),
    "zero in place of -inf": sparse(lambda v: v[..., -1:], lambda s, least: s.masked_fill(s < least, 0.0)),
    "an unsorted topk": sparse(lambda v: v[..., -1:], filled, sorted=False),
}


@pytest.mark.parametrize("name", SPARSE)
def test_a_softmax_of_the_largest_scores_is_found(name: str) -> None:
    assert fused(SPARSE[name], (), "cuda") == ({"topk_softmax": 1}, ())
    assert fused(SPARSE[name])[0] == {}


@pytest.mark.parametrize("name", DENSE)
def test_another_softmax_is_left(name: str) -> None:
    assert fused(DENSE[name], (), "cuda")[0] == {}


@pytest.mark.parametrize("shared", [False, True])
def test_a_router_is_found_with_both_outputs(shared: bool) -> None:
    assert fused(routed(-1, shared), (), "cuda") == ({"route": 1}, ())
    assert fused(routed(-1, shared))[0] == fused(routed(-1, shared), ("route",), "cuda")[0] == {}
    found, near = fused(routed(1), (), "cuda")
    assert not found and near and "route at test_fuse.py" in near[0]


def test_what_others_read_too_is_computed_again_if_it_has_no_gradient() -> None:
    """Zeros and the mask of each choice, which the loads of two layers share."""

    def loads(x: Tensor, w: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        mask = (rows.detach()[:, 0] > 0).float()
        repeated, zeros, total = mask.repeat_interleave(3), torch.zeros(8, dtype=torch.float32), torch.zeros(8)
        for logits in (rows, rows * w):
            chances = F.softmax(logits, dim=-1)
            chosen = torch.topk(chances, 3, dim=-1).indices.reshape(-1)
            tokens, summed = zeros.scatter_add(0, chosen, repeated), (chances * mask.unsqueeze(-1)).sum(dim=0)
            total = total + tokens * summed
        return total

    assert fused(loads, (), "cuda") == ({"expert_load": 2}, ())


def test_a_value_that_others_read_is_kept() -> None:
    def normed(x: Tensor, w: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return w * (x * scale) + scale

    assert fused(normed)[0] == {}


def test_what_a_value_is_made_from_is_looked_at_once() -> None:
    """By sixty doublings there are as many ways from the last to the first as 64 bits can count."""
    graph = fx.Graph()
    nodes = [graph.placeholder("x")]
    for _ in range(60):
        nodes.append(graph.call_function(torch.add, (nodes[-1], nodes[-1])))
        nodes.append(graph.call_function(torch.add, (nodes[-1], nodes[-2])))
    assert _makers(nodes[-1:]) == set(nodes)
    assert _read_outside(frozenset(nodes[:-1]), [nodes[0]]) == set(nodes[1:-1])


@pytest.mark.parametrize("name", KERNELS)
def test_every_example_has_the_operator_that_its_kernel_needs(name: str) -> None:
    for form in FORMS[name]:
        graph = loose(KERNELS[name], form).outputs[0].graph
        assert form.needs in {info(node).name for node in calls(graph)}


@pytest.mark.parametrize("name", KERNELS)
def test_stored_patterns_are_those_that_are_traced(name: str) -> None:
    """`python scripts/patterns.py` renews them."""
    if json.loads(FILE.read_text())["torch"] != RELEASE:
        pytest.skip("with another release of torch patterns are traced")
    for number, form in enumerate(FORMS[name]):
        graph, kept = pattern_of(KERNELS[name].reference, form.arguments).outputs[0].graph, stored(name, number)
        assert kept is not None and to_data(kept) == to_data(graph)


def test_with_another_torch_patterns_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    form = FORMS["swiglu"][0]
    before = loose.__wrapped__(KERNELS["swiglu"], form)
    monkeypatch.setattr(stored_patterns, "RELEASE", "1.0")
    assert stored("swiglu", 0) is None
    traced = loose.__wrapped__(KERNELS["swiglu"], form)
    assert info(traced.anchor).shape == (2, 3, 8) and to_data(traced.anchor.graph) == to_data(before.anchor.graph)


def test_a_kernel_that_is_not_known_is_an_error() -> None:
    with pytest.raises(PartitionError, match="no_fuse='rms_nrom' is not known"):
        autopart.plan(Formula(rms), "1:cpu", {"x": torch.randn(2, 6, 8)}, no_fuse=["rms_nrom"])


def test_a_plan_says_what_kernels_bring_and_keeps_what_was_left_out() -> None:
    batch = {"x": torch.randn(4, 6, 8)}
    plan = autopart.plan(Formula(rms), "2:cpu", batch)
    (use,) = plan.kernels
    assert (use.name, use.calls) == ("rms_norm", 1) and 0 < use.bytes < use.unfused
    assert "fused kernels: rms_norm x 1" in str(plan)
    without = autopart.plan(Formula(rms), "2:cpu", batch, no_fuse=list(KERNELS))
    assert without.kernels == () and without.no_fuse == tuple(sorted(KERNELS))
    again = autopart.Plan.from_json(without.to_json())
    assert autopart.check(Formula(rms), "2:cpu", batch, plan=again).gradient_error < 1e-5


def test_what_a_reference_cannot_take_is_left() -> None:
    """A layer norm over two dims, behind a sum."""
    wide = torch.ones(6, 8)
    assert fused(lambda x, w: nn.functional.layer_norm(x + x * w, (6, 8), wide))[0] == {}


def scanned(length: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Mamba-2's scan as transformers has it, in chunks of 4 positions: two heads of four, with a state of eight."""

    def formula(x: Tensor, w: Tensor) -> Tensor:
        x = x.repeat(1, 2, 1)[:, :length]
        steps, sides = F.softplus(x[..., :2]), x[:, :, None]
        heads = x.unflatten(-1, (2, 4))
        return mamba2.mamba2_chunk_scan(heads, steps, -w[:2].exp(), sides, sides.tanh(), 4, D=w[:2])

    return formula


@pytest.mark.parametrize("length", [8, 7])
def test_a_scan_is_found(length: int) -> None:
    assert fused(scanned(length), (), "cuda") == ({"scan": 1}, ())
    assert fused(scanned(length))[0] == fused(scanned(length), ("scan",), "cuda")[0] == {}


@pytest.mark.parametrize("above", [float("-inf"), -1e4])
def test_a_scan_with_another_constant_is_left(above: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is above the diagonal decays by exp(above): with another constant than minus infinity it is a near miss."""

    def segments(x: Tensor) -> Tensor:
        count = x.shape[-1]
        ones = torch.ones(count, count, dtype=torch.bool)
        x = x[..., None].expand(*x.shape, count).masked_fill(~torch.tril(ones, diagonal=-1), 0)
        return torch.cumsum(x, dim=-2).masked_fill(~torch.tril(ones, diagonal=0), above)

    monkeypatch.setattr(mamba2, "segment_sum", segments)
    found, near = fused(scanned(8), (), "cuda")
    assert found == ({"scan": 1} if above == float("-inf") else {})
    assert (near == ()) is bool(found)


PADS = {"none": ((0, 0, 0, 0), 0), "some": ((0, 0, 0, 1), 1)}


@pytest.mark.parametrize("name", PADS)
def test_a_pad_of_nothing_is_removed(name: str) -> None:
    width, count = PADS[name]
    model = Formula(lambda x, w: F.pad(x, width) * w)
    traced = simplify(trace(model, outline({"x": torch.randn(2, 6, 8)}, 2)))
    assert sum(info(node).name == "aten.pad" for node in calls(traced.graph)) == count


def dropped_paths(keep: float, divisor: float, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Formula:
    def formula(x: Tensor, w: Tensor) -> Tensor:
        x = x.to(dtype)
        stays = (keep + torch.rand(shape, dtype=dtype)).floor()
        return (x.tanh() / divisor * stays + x) * w

    return Formula(formula)


def paths_by_chance(keep: float, divisor: float, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Formula:
    """As timm and torchvision write it."""

    def formula(x: Tensor, w: Tensor) -> Tensor:
        x = x.to(dtype)
        return (x + x.tanh() * x.new_empty(shape).bernoulli_(keep).div_(divisor)) * w

    return Formula(formula)


PATHS = {
    "by chance": (paths_by_chance(0.75, 0.75, (2, 1, 1)), True),
    "by chance, in half precision": (paths_by_chance(0.75, 0.75, (2, 1, 1), torch.bfloat16), True),
    "by chance, another divisor": (paths_by_chance(0.75, 0.5, (2, 1, 1)), False),
    "by chance, rows of a sample": (paths_by_chance(0.75, 0.75, (2, 6, 1)), False),
    "drop path": (dropped_paths(0.75, 0.75, (2, 1, 1)), True),
    "in half precision": (dropped_paths(0.75, 0.75, (2, 1, 1), torch.bfloat16), True),
    "another divisor": (dropped_paths(0.75, 0.5, (2, 1, 1)), False),
    "rows of a sample": (dropped_paths(0.75, 0.75, (2, 6, 1)), False),
    "all samples at once": (dropped_paths(0.75, 0.75, (1, 1, 1)), False),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_drop_path_is_found(name: str) -> None:
    model, there = PATHS[name]
    for device, off, expected in (("cuda", (), there), ("cpu", (), False), ("cuda", ("stochastic_depth",), False)):
        traced = randomness(simplify(trace(model, outline({"x": torch.randn(2, 6, 8)}, 2))), device)
        found = [node for node in calls(fuse(traced, device, off).graph) if node.target is stochastic_depth]
        assert len(found) == expected and all(node.args[2] == 0.25 for node in found)
