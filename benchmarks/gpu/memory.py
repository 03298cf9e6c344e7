"""Predicted and measured peak memory of the configurations of `benchmarks.accuracy.gpu` that need one device."""

from __future__ import annotations

import gc
from typing import Any

import torch

import autopart
from benchmarks.accuracy import gpu

ROWS = {row.name: row for row in gpu.rows() if row.devices == 1}


def measure(name: str, device: str, mesh_device: str) -> dict[str, Any]:
    """The plan's bytes, and those that a training step with AdamW allocates at the most, without what was there before.

    On a CPU the configuration's tiny version runs, and no bytes are told.
    """
    row, dry = ROWS[name], device == "cpu"
    plan = gpu.plan_of(row, dry, mesh_device)
    model, batch = gpu.build(row, dry, meta=False)
    model.train()
    batch = {k: v.to(device) for k, v in batch.items()}
    before = 0 if dry else allocated()
    compiled = autopart.compile(model, plan.mesh, batch, plan=plan)
    compiled.optimizer(torch.optim.AdamW, lr=1e-3)
    losses = [float(compiled.step(batch)) for _ in range(2)]
    found: dict[str, Any] = {"status": "ok", "losses": losses, "fits": plan.fits}
    if not dry:
        torch.cuda.reset_peak_memory_stats()
        losses.append(float(compiled.step(batch)))
        measured = torch.cuda.max_memory_allocated() - before
        predicted = max(plan.memory_bytes)
        found |= {"predicted_bytes": predicted, "measured_bytes": measured, "bytes_error": predicted / measured - 1}
    return found


def allocated() -> int:
    """Bytes that are allocated on the GPU when nothing is needed any more."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()
