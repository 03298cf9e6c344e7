"""Is a model's training step exact under a plan? Through the public API alone, with a verdict in words."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import autopart
from autopart.compile.check import one_process, worst_error

TOLERANCE = 1e-5
"""Relative error of the loss, of every gradient and of every buffer that is exact, in float32 and in float64."""
NOISE = 10.0
"""How many times as far off as one process's own float32 a plan's step may be, where float64 shows it exact."""
Batch = Mapping[str, Any]


def verdict(model: nn.Module, mesh: str, batch: Batch, **settings: Any) -> tuple[str, autopart.Plan | None]:
    """ "exact", "exact in float64: ...", "wrong: ..." or "refused: ..."; and the plan, if there is one.

    Exact in float64 is a model whose float32 gradients in one process are themselves that far from float64's: its split
    step is within TOLERANCE in float64, and in float32 at most NOISE times as far off as one process.
    """
    try:
        found = autopart.check(model, mesh, batch, **settings)
        off, whose = error_of(found)
        if off <= TOLERANCE:
            return "exact", found.plan
        wide, wide_batch = in_float64(model, batch)
        precise, _ = error_of(autopart.check(wide, mesh, wide_batch, **settings))
    except autopart.PartitionError as error:
        return f"refused: {error.what}" + (f" ({error.why})" if error.why else ""), None
    noise = own_error(model, batch, wide, wide_batch)
    if precise <= TOLERANCE and off <= NOISE * noise:
        return f"exact in float64: {whose} off by {off:.1e} in float32, one process by {noise:.1e}", found.plan
    return f"wrong: {whose} off by {off:.1e}, in float64 by {precise:.1e}; one process by {noise:.1e}", found.plan


def error_of(found: autopart.Check) -> tuple[float, str]:
    """The largest error of a check, and what has it."""
    buffers = (found.buffer_error, found.worst_buffer)
    return max((found.loss_error, "the loss"), (found.gradient_error, found.worst), buffers)


def in_float64(model: nn.Module, batch: Batch) -> tuple[nn.Module, dict[str, Any]]:
    """A copy of a model and its batch whose floating-point tensors are float64, and complex ones complex128."""
    wide = copy.deepcopy(model).double()
    for tensor in [*wide.parameters(), *wide.buffers()]:
        tensor.data = tensor.data.to(torch.complex128) if tensor.is_complex() else tensor.data
    for module in wide.modules():
        if hasattr(module, "_is_expert_parallel"):  # transformers' grouped products have no float64
            module.config._experts_implementation = "batched_mm"  # type: ignore[union-attr]
    return wide, {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in batch.items()
    }


def own_error(model: nn.Module, batch: Batch, wide: nn.Module, wide_batch: Batch) -> float:
    """How far one process's float32 step is from its float64 step."""
    loss, gradients = one_process(copy.deepcopy(model), batch)
    right, wanted = one_process(copy.deepcopy(wide), wide_batch)
    off = abs(float(loss) - float(right)) / max(abs(float(right)), 1e-3)
    return max(off, worst_error(gradients, wanted)[0])
