"""What tests of several kernels share: rounding errors, layouts, comparisons, and checks of registered operators."""

from collections.abc import Callable
from typing import Any

import torch

from autopart.kernels.kernel import Kernel

ROUNDING = {torch.float32: 5e-7, torch.float16: 2**-11, torch.bfloat16: 2**-8}
INTERPRETED_ROUNDING = ROUNDING | {torch.bfloat16: 2**-7}  # the interpreter truncates where a GPU rounds
LAYOUTS = ("sliced", "strided", "expanded", "swapped")
"""Layouts other than the plain one: gaps between rows, gaps between elements, one row for all, dims swapped."""


def laid_out(shape: tuple[int, ...], dtype: torch.dtype, device: str, layout: str = "plain") -> torch.Tensor:
    """A normal sample of `shape` (..., n, d), contiguous in the plain layout alone."""
    *lead, n, d = shape
    sizes = {"sliced": (*lead, n, d + 5), "strided": (*lead, n, 2 * d), "expanded": (*lead, 1, d)}
    sizes |= {"swapped": (n, *lead, d)}
    x = torch.randn(sizes.get(layout, shape)).to(device, dtype)
    views = {"sliced": x[..., :d], "strided": x[..., ::2], "swapped": x.movedim(0, -2)}
    return x.expand(shape) if layout == "expanded" else views.get(layout, x)


def worst(got: torch.Tensor, exact: torch.Tensor, size: torch.Tensor | None = None) -> float:
    """The largest error, over the largest size, which is that of `exact` if it is not given."""
    largest = (exact if size is None else size).abs().max().item() or 1.0
    return float((got.double() - exact).abs().max().item() / largest)


def same_infinities(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> bool:
    """Whether NaNs and infinities agree, and finite elements are equal up to a relative error."""
    want = want.to(got.dtype).float()
    return torch.allclose(got.float(), want, rtol=tolerance, atol=1e-6, equal_nan=True)


def saved_bytes(function: Callable[..., torch.Tensor], *args: Any) -> int:
    """Bytes of the storages that autograd saves in a call."""
    storages: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function(*args)
    return sum(storages.values())


def registered(op: Any, *args: Any) -> bool:
    """Whether an operator has the schema and the autograd that it says. Where Triton interprets."""
    utils = ("test_schema", "test_autograd_registration")
    return set(torch.library.opcheck(op, args, test_utils=utils).values()) == {"SUCCESS"}


def fake_agrees(op: Any, *args: Any) -> bool:
    """Whether an operator, whose launches do nothing, gives the same shapes and strides for fake tensors."""
    return torch.library.opcheck(op, args, test_utils="test_faketensor") == {"test_faketensor": "SUCCESS"}


def both(kernel: Kernel) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The function that emitted code calls, and the reference."""
    return kernel.function, kernel.reference
