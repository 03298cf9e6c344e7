"""The optimizer's step over all parameters of a model: autopart's one kernel against torch.optim's implementations.

Weights are bfloat16 with float32 masters, as in a step of autopart with a master dtype: the kernel writes both, torch's
steps are followed by a copy. Gradients are clipped to a norm that is known, which the kernel does on the way.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autopart.runtime import one_pass
from benchmarks.gpu.speed import median_us
from benchmarks.gpu.steps import MODELS, build

FACTOR, TOLERANCE = 0.5, 2e-6
WAYS: dict[str, dict[str, Any]] = {
    "autopart": {},
    "torch": {},
    "torch, fused": {"fused": True},
    "torch, one by one": {"foreach": False},
}
"""Who steps, and the settings of torch.optim.AdamW."""


def measure(name: str, device: str) -> dict[str, Any]:
    """Microseconds and most allocated bytes of each way's step, on a GPU; and whether all give the same weights."""
    made, _ = build(MODELS[name], device)
    weights = [p.detach() for p in made.parameters()]
    del made
    found: dict[str, Any] = {"status": "ok", "parameters": sum(w.numel() for w in weights)}
    exact: list[Tensor] = []
    for way, settings in WAYS.items():
        step, masters = stepping(weights, way, settings)
        step()
        if not exact:
            exact = [m.detach().clone() for m in masters]
        error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(masters, exact, strict=True))
        found[way] = {"error": error}
        if not error <= TOLERANCE:
            found["status"] = f"wrong: {way} is off by {error:.2g}"
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            found[way]["microseconds"] = median_us(step, device)
            found[way]["workspace"] = torch.cuda.max_memory_allocated() - before
        del step, masters
    return found


def stepping(weights: list[Tensor], way: str, settings: dict[str, Any]) -> tuple[Callable[[], Any], list[nn.Parameter]]:
    """A step of one way, and the masters that it changes."""
    generator = torch.Generator(weights[0].device).manual_seed(0)
    masters = [nn.Parameter(w.float()) for w in weights]
    copies = dict(zip(masters, (w.clone() for w in weights), strict=True))
    gradients = [torch.randn(m.shape, generator=generator, device=m.device) for m in masters]
    for master, gradient in zip(masters, gradients, strict=True):
        master.grad = gradient
    optimizer = torch.optim.AdamW(masters, lr=1e-3, **settings)
    factor = torch.tensor(FACTOR, dtype=torch.float64, device=weights[0].device)

    def step() -> None:
        taken = one_pass.step(optimizer, factor, copies) if way == "autopart" else set()
        if not taken:
            for gradient in gradients:
                gradient.mul_(factor)
            optimizer.step()
            for master, copy in copies.items():
                copy.copy_(master.detach())

    return step, masters
