"""Calls of kernels and of what they are held against, and the gradients of calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def tensors(found: Any) -> tuple[Tensor, ...]:
    """The tensors of a result."""
    return (found,) if isinstance(found, Tensor) else tuple(t for t in found or () if isinstance(t, Tensor))


def differentiable(arguments: tuple[Any, ...], no_gradient: tuple[int, ...]) -> tuple[int, ...]:
    """Places of the arguments that get a gradient."""
    floats = (i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.is_floating_point())
    return tuple(i for i in floats if i not in no_gradient)


def with_gradients(arguments: tuple[Any, ...], places: tuple[int, ...]) -> tuple[Any, ...]:
    """The arguments, of which those at the places are leaves that get gradients."""
    return tuple(a.detach().requires_grad_() if i in places else a for i, a in enumerate(arguments))


def in_float64(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with all floating-point tensors, and dtypes that are computed in, in float64."""

    def exact(a: Any) -> Any:
        if isinstance(a, Tensor):
            return a.double() if a.is_floating_point() else a
        return torch.float64 if isinstance(a, torch.dtype) else a

    return tuple(map(exact, arguments))


def seeds(outputs: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """Gradients of outputs: normal numbers that `dtype` has, the same for outputs of the same shapes."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    drawn = (torch.randn(o.shape, generator=generator, device=o.device, dtype=torch.float32) for o in outputs)
    return [g.to(dtype).to(o) for g, o in zip(drawn, outputs, strict=True)]


def traced(found: Any) -> tuple[Tensor, ...]:
    """The outputs that have a gradient."""
    return tuple(o for o in tensors(found) if o.requires_grad)


def changes_arguments(function: Function, arguments: tuple[Any, ...]) -> bool:
    """Whether a function returns nothing, as an optimizer's step. It is called with copies."""
    return function(*copies(arguments)) is None


def copies(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, their tensors copied."""
    return tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in arguments)
