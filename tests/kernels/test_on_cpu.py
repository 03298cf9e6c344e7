"""What CPUs run in the place of kernels' references, against these."""

import pytest
import torch
from torch import Tensor

from autopart.kernels import rms_norm, rotary

EPS = 1e-6
SHAPES = {"rows": (6, 8), "heads": (2, 3, 5, 8), "one row": (8,), "no rows": (0, 8)}


def both(function, reference, tensors, *constants):
    """Outputs with gradients, and bytes that autograd saves of tensors made inside, of a function and its reference."""
    found = []
    for each in (function, reference):
        given = [t.clone().detach().requires_grad_(t.requires_grad) for t in tensors]
        inputs, saved = {t.untyped_storage().data_ptr() for t in given}, {}

        def pack(t: Tensor, inputs=inputs, saved=saved) -> Tensor:
            if t.untyped_storage().data_ptr() not in inputs:
                saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = each(*given, *constants)
        y = y[-1] if isinstance(y, tuple) else y
        dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
        gradients = torch.autograd.grad(y, [t for t in given if t.requires_grad], dy)
        found.append(((y, *gradients), sum(saved.values())))
    return found


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_norm_is_its_reference_and_saves_no_more(shape, dtype):
    x, weight = torch.randn(shape, dtype=dtype, requires_grad=True), torch.rand(8, dtype=dtype, requires_grad=True)
    residual = torch.randn(shape, dtype=dtype, requires_grad=True)
    pairs = (
        (rms_norm.rms_norm, rms_norm.reference, (x, weight)),
        (rms_norm.add_rms_norm, rms_norm.add_reference, (x, residual, weight)),
    )
    for function, reference, tensors in pairs:
        (found, saved), (expected, saved_by_reference) = both(function, reference, tensors, EPS)
        torch.testing.assert_close(found, expected)
        assert saved <= saved_by_reference


@pytest.mark.parametrize("tables", [(5, 8), (2, 1, 5, 8), (1, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_turned_heads_are_those_of_the_reference(tables, dtype):
    x = torch.randn(2, 5, 3, 8, dtype=dtype).transpose(1, 2).requires_grad_()
    cos, sin = torch.randn(tables, dtype=dtype), torch.randn(tables, dtype=dtype)
    (found, _), (expected, _) = both(rotary.rotary, rotary.reference, (x, cos, sin))
    torch.testing.assert_close(found, expected)
    assert found[0].stride() == expected[0].stride()


def test_what_the_functions_do_not_take_goes_to_the_reference():
    x, half = torch.randn(2, 8, requires_grad=True), torch.randn(2, 8, dtype=torch.bfloat16)
    assert torch.equal(rms_norm.rms_norm(x, torch.ones(2, 8), EPS), rms_norm.reference(x, torch.ones(2, 8), EPS))
    assert torch.equal(rms_norm.rms_norm(half, half[0], EPS), rms_norm.reference(half, half[0], EPS))
    wide = torch.randn(3, 2, 8)
    assert torch.equal(rotary.rotary(x, wide, wide), rotary.reference(x, wide, wide))
    table = torch.randn(2, 8, requires_grad=True)
    rotary.rotary(x, table, table.detach()).sum().backward()
    assert table.grad is not None and torch.equal(table.grad, x)
