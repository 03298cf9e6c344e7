"""What a GPU would be given: every kernel's launches, specialised for their arguments as on a GPU, made Triton IR."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from autopart.kernels import clamped_gate
from autopart.kernels.attention import attention
from autopart.kernels.residual_dropout import stochastic_depth
from benchmarks.gpu.calls import differentiable, traced, with_gradients
from benchmarks.gpu.sizes import LAYERS, Layer, arguments, shaped
from benchmarks.kernels.resources import records
from tests.support.launches import MOST, Launch, recorded

pytestmark = pytest.mark.slow

KERNELS = {name: kernel for name, kernel in records().items() if name in LAYERS}
PAIRED = {"gated_halves": 16, "rotary": 8, "rotary_interleaved": 8, "rotary_deinterleaved": 8}
"""Kernel -> the size that has to be even."""
TOKENS = 2**22
COMPOSED = ("experts", "clamped_experts")
"""Their kernels read what kernels before them write, which is not computed here."""
STEPS = ("adamw", "lion")
"""What torch.compile does not see: the runtime calls them."""
ONE, WORD = torch.ones(1, 1, 1, 1, requires_grad=True), torch.ones(1, dtype=torch.int32)
TRUE = torch.ones(1, 1, dtype=torch.bool)
ATTENTIONS = {
    "even": {"padding": TRUE, "even": True, "causal": True},
    "dropout": {"padding": TRUE, "even": True, "rows": WORD[None, None], "columns": WORD, "dropout_scale": 2.0},
    "biases": {"bias": ONE, "relative": ONE[0, 0], "window": 1, "cap": 2.0},
    "mask": {"mask": ONE.detach(), "sinks": ONE[0, 0, 0], "causal": True},
}
"""Arguments of attention with one query and one key."""


def launches(monkeypatch, name: str, given: tuple, wide: bool = False) -> list[Launch]:
    """The launches of a call's forward and backward."""
    kernel = KERNELS[name]
    leaves = with_gradients(given, differentiable(given, kernel.no_gradient))
    with recorded(monkeypatch, wide) as found:
        outputs = traced(kernel.function(*leaves))
        if outputs:
            torch.autograd.grad(outputs, [a for a in leaves if isinstance(a, Tensor) and a.requires_grad],
                                [torch.ones_like(o) for o in outputs], allow_unused=True)  # fmt: skip
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in KERNELS if name not in COMPOSED])
def test_kernels_compile_for_sizes_of_one(name, dtype, monkeypatch):
    ones = {n: 2 if PAIRED.get(name) == n else 1 for n in range(2, 64)}
    for layer in (None, Layer("ones", ones)):
        given = arguments(name, layer, dtype, 2, "cpu")
        assert launches(monkeypatch, name, given)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_compiles_for_one_key(name, monkeypatch):
    with recorded(monkeypatch) as found:
        attention(ONE, ONE, ONE, **ATTENTIONS[name]).sum().backward()
    assert {"forward", "query", "key"} <= {launch.name for launch in found}


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in (*COMPOSED, *STEPS)])
def test_floats_of_torch_compile_widen_no_arithmetic(name, monkeypatch):
    given = arguments(name, None, torch.bfloat16, 32, "cpu")
    assert not any(map(widened, launches(monkeypatch, name, given, wide=True)))


def test_floats_of_torch_compile_widen_no_gate(monkeypatch):
    x, bias, number = torch.ones(3, 8), torch.ones(2, 8), torch.zeros(3, dtype=torch.int64)
    with recorded(monkeypatch, wide=True) as found:
        y = clamped_gate.clamped_gate(x, bias, number, 1.5, 7.0)
        clamped_gate.gradients(y, x, bias, number, 1.5, 7.0)
    assert len(found) == 2 and not any(map(widened, found))


def widened(launch: Launch) -> set[str]:
    """The operators of float64 in a launch's IR, but those that make other numbers of it."""
    return set(re.findall(r"(?:arith|math)\.(\w+) .*f64", launch.ir)) - {"truncf", "constant"}


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in COMPOSED])
def test_grids_of_large_batches_are_within_a_gpu_s_limits(name, monkeypatch):
    for layer in LAYERS[name]:
        given = shaped(name, layer, torch.bfloat16, TOKENS)
        found = launches(monkeypatch, name, given)
        for launch in found:
            assert all(1 <= n <= most for n, most in zip(launch.grid, MOST, strict=True)), (layer.model, launch[:2])


def test_the_grid_of_a_large_image_s_drop_path_is_within_a_gpu_s_limits(monkeypatch):
    x = torch.empty(1, 192, 1024, 1024, dtype=torch.bfloat16, device="meta", requires_grad=True)
    word = torch.empty(1, dtype=torch.int32, device="meta")
    with recorded(monkeypatch) as found:
        stochastic_depth(x, x, word, word, 0, 2.0).sum().backward()
    assert {launch.name for launch in found} == {"forward", "backward"}
    assert all(n <= most for launch in found for n, most in zip(launch.grid, MOST, strict=True))
