"""What of Liger Kernel does the same as a kernel, where it is installed beside: https://github.com/linkedin/Liger-Kernel"""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn

from benchmarks.gpu.calls import Function


def installed() -> bool:
    """Whether there is a liger_kernel."""
    return importlib.util.find_spec("liger_kernel") is not None


def function_of(kernel: str) -> Function | None:
    """A function of the kernel's arguments, or None where Liger has none or is not installed."""
    return FUNCTIONS.get(kernel) if installed() else None


def patched(model: Any) -> nn.Module | None:
    """The model with Liger's kernels in it, of which other models of its class may have some from then on; None where
    Liger knows no such model."""
    if not installed():
        return None
    import liger_kernel.transformers

    patch = getattr(liger_kernel.transformers, f"apply_liger_kernel_to_{model.config.model_type}", None)
    if patch is None:
        return None
    patch(model=model)
    return model


def _functional() -> Any:
    import liger_kernel.transformers.functional as functional

    return functional


def _rms_norm(x: Any, weight: Any, eps: float, *constants: object) -> Any:
    return _functional().liger_rms_norm(x, weight, eps, 0.0, "llama", False)


def _add_rms_norm(x: Any, residual: Any, weight: Any, eps: float, *constants: object) -> Any:
    normal, total = _functional().liger_fused_add_rms_norm(x, residual, weight, eps, 0.0, "llama", False)
    return total, normal


def _rms_norm_float32(x: Any, weight: Any, eps: float, unit_offset: bool, by_power: bool) -> Any:
    return _functional().liger_rms_norm(x, weight, eps, float(unit_offset), "gemma", False)


def _layer_norm(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    return _functional().liger_layer_norm(x, weight, bias, eps)


def _group_norm(x: Any, weight: Any, bias: Any, groups: int, eps: float) -> Any:
    return _functional().liger_group_norm(x, weight, bias, x.shape[1], groups, eps)


def _rotary(x: Any, cos: Any, sin: Any, *constants: object) -> Any:
    """Liger turns queries and keys together, in place: x stands for queries, and keys are a copy of its first head."""
    return _functional().liger_rope(x, x[:, :1].clone(), cos.squeeze(1), sin.squeeze(1))[0]


def _cross_entropy(logits: Any, targets: Any, valid: float) -> Any:
    return _functional().liger_cross_entropy(logits, targets, reduction="sum") / valid


def _linear_loss(
    hidden: Any, weight: Any, targets: Any, bias: Any, ignore_index: int, label_smoothing: float, *constants: object
) -> Any:
    return _functional().liger_fused_linear_cross_entropy(
        hidden.flatten(0, -2), weight, targets, bias, ignore_index=ignore_index, label_smoothing=label_smoothing
    )


FUNCTIONS: dict[str, Function] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rms_norm_float32": _rms_norm_float32,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "rotary": _rotary,
    "swiglu": lambda gate, up: _functional().liger_swiglu(gate, up),
    "geglu": lambda gate, up, name: _functional().liger_geglu(gate, up),
    "cross_entropy": _cross_entropy,
    "linear_loss": _linear_loss,
}
"""Kernel -> Liger's function, of the kernel's arguments. Liger's geglu is that of GELU's tanh approximation."""
