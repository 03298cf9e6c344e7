"""A kernel's outputs and gradients at the sizes of models, against its reference in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autopart.kernels.kernel import Kernel
from benchmarks.gpu.calls import (
    DTYPES,
    Function,
    changes_arguments,
    copies,
    differentiable,
    in_float64,
    seeds,
    tensors,
    traced,
    with_gradients,
)
from benchmarks.gpu.sizes import Layer, arguments

TOLERANCE = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Of the Euclidean norm of the difference over that of the exact tensor, and of a quarter of the largest difference
over the largest exact element."""

OF_REFERENCE = 2.0
"""An error may also be so many times that of the reference in the same dtype, where that is more."""

TOKENS = 2048


def check(kernel: Kernel, layer: Layer | None, dtype: str, device: str) -> dict[str, Any]:
    """Errors of every output and gradient by name, those of the reference beside them, and whether they are small.

    A call without a layer has the sizes of its form.
    """
    given = arguments(kernel.name, layer, DTYPES[dtype], TOKENS, device)
    want = results(kernel.reference, in_float64(given), kernel.no_gradient, DTYPES[dtype])
    rows: dict[str, dict[str, float]] = {}
    for name, function in (("kernel", kernel.function), ("reference", kernel.reference)):
        got = results(function, given, kernel.no_gradient, DTYPES[dtype])
        for part, exact in want.items():
            rows.setdefault(part, {})[name] = error(got[part], exact)
        del got
    bounds = {part: max(TOLERANCE[dtype], OF_REFERENCE * row["reference"]) for part, row in rows.items()}
    wrong = [part for part, row in rows.items() if not row["kernel"] <= bounds[part]]
    count = launches(kernel, given)
    wrong += ["no Triton kernel was launched"] * (count == 0)
    status = f"wrong: {', '.join(wrong)}" if wrong else "ok"
    return {"status": status, "launches": count, "errors": rows}


def results(
    function: Function, given: tuple[Any, ...], no_gradient: tuple[int, ...], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Outputs and gradients of a call by name; the arguments after it, of a function that changes them. The gradients
    of outputs are numbers that `dtype` has."""
    if changes_arguments(function, given):
        changed = copies(given)
        function(*changed)
        return {f"argument {i}": a for i, a in enumerate(changed) if isinstance(a, Tensor)}
    places = differentiable(given, no_gradient)
    leaves = with_gradients(given, places)
    found = tensors(function(*leaves))
    named = {f"output {i}": o.detach() for i, o in enumerate(found)}
    if outputs := traced(found):
        wanted = [leaves[i] for i in places]
        gradients = torch.autograd.grad(outputs, wanted, seeds(outputs, dtype), allow_unused=True)
        named |= {f"gradient {i}": g for i, g in zip(places, gradients, strict=True) if g is not None}
    return named


def error(got: Tensor, exact: Tensor) -> float:
    """The error of a tensor; of whole numbers, the share of those that are others. NaN is no number."""
    if got.shape != exact.shape:
        return float("inf")
    if not exact.is_floating_point():
        return (got != exact).double().mean().item()
    difference = got.double() - exact
    norm, most = exact.norm().clamp_min(1e-300), exact.abs().max().clamp_min(1e-300)
    return float(torch.maximum(difference.norm() / norm, difference.abs().max() / most / 4))


def launches(kernel: Kernel, given: tuple[Any, ...]) -> int | None:
    """Triton kernels that a call launches on a GPU; None on a CPU."""
    if not any(isinstance(a, Tensor) and a.is_cuda for a in given):
        return None
    from triton import knobs

    launched: list[Any] = []
    knobs.runtime.launch_enter_hook.add(launched.append)
    try:
        kernel.function(*copies(given))
    finally:
        knobs.runtime.launch_enter_hook.remove(launched.append)
    return len(launched)
