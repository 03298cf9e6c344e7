"""Device time of a kernel beside a copy of as many bytes, its reference, torch.compile of that, and Liger Kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autopart.kernels.kernel import Kernel
from benchmarks.gpu import liger
from benchmarks.gpu.calls import (
    DTYPES,
    Function,
    changes_arguments,
    copies,
    differentiable,
    seeds,
    tensors,
    traced,
    with_gradients,
)
from benchmarks.gpu.correct import error
from benchmarks.gpu.sizes import Layer, arguments

Runs = dict[str, Callable[[], Any]]
TOKENS = 8192
BACKEND = {"cpu": "eager", "cuda": "inductor"}
"""Of torch.compile: a dry run compiles nothing."""
AGREES = 3e-2
"""By how much Liger's first output may differ from the kernel's."""


def measure(kernel: Kernel, layer: Layer | None, dtype: str, device: str) -> dict[str, Any]:
    """Median microseconds by direction, then by implementation: of the forward pass, and of both passes. A CPU runs all
    once, and None stands for the microseconds.

    The time of "copy" is that of a copy with as many bytes as the kernel moves at the least, half of them read and half
    written. A run is captured as a CUDA graph, so that the time of Python does not count. "called" names runs that wait
    for the GPU and cannot be captured. An implementation that fails is named with its error instead.
    """
    given = arguments(kernel.name, layer, DTYPES[dtype], TOKENS, device)
    moved = kernel.bytes_moved(*on_meta(given))
    times: dict[str, dict[str, float | None]] = {"forward": {}, "both": {}}
    failed: dict[str, str] = {}
    called: list[str] = []
    for name, function in implementations(kernel, given).items():
        try:
            if name == "liger":
                agree(function, kernel.function, given)
            for direction, run in passes(function, given, no_gradient_of(kernel, given)).items():
                replay = captured(run) if device == "cuda" else None
                times[direction][name] = median_us(replay or run, device)
                called += [] if replay else [f"{name} {direction}"]
        except Exception as error_:
            failed[name] = why(error_)
    for direction, count in {"forward": moved.forward, "both": sum(moved)}.items():
        if times[direction]:
            times[direction]["copy"] = median_us(copy_of(count, device), device)
    status = f"failed: {failed['kernel']}" if "kernel" in failed else "ok"
    return {"status": status, "microseconds": times, "bytes": moved._asdict(), "called": called, "failed": failed}


def no_gradient_of(kernel: Kernel, given: tuple[Any, ...]) -> tuple[int, ...] | None:
    """Places of the arguments that get no gradient; None where none gets one."""
    if changes_arguments(kernel.function, given) or not differentiable(given, kernel.no_gradient):
        return None
    return kernel.no_gradient


def warm(kernel: Kernel, layer: Layer | None, dtype: str, device: str) -> dict[str, Any]:
    """Run what torch.compile makes of the reference once, so that its kernels are in the cache on disk."""
    given = arguments(kernel.name, layer, DTYPES[dtype], TOKENS, device)
    compiled = implementations(kernel, given)["compile"]
    for run in passes(compiled, given, no_gradient_of(kernel, given)).values():
        run()
    return {"status": "ok"}


def implementations(kernel: Kernel, given: tuple[Any, ...]) -> dict[str, Function]:
    """Name -> a function of the kernel's arguments."""
    torch.compiler.reset()
    device = next(a.device.type for a in given if isinstance(a, Tensor))
    compiled = torch.compile(kernel.reference, backend=BACKEND[device], dynamic=False)
    found: dict[str, Function] = {"kernel": kernel.function, "eager": kernel.reference, "compile": compiled}
    rival = liger.function_of(kernel.name) if device == "cuda" else None
    if rival is not None:
        found["liger"] = rival
    return found


def agree(rival: Function, function: Function, given: tuple[Any, ...]) -> None:
    """Raise ArithmeticError where the first output of a rival is not that of the kernel. Both are given copies: some of
    Liger's functions write into their arguments."""
    with torch.no_grad():
        got, expected = (tensors(f(*copies(given)))[0] for f in (rival, function))
    off = error(got.view(expected.shape), expected.double())
    if not off <= AGREES:
        raise ArithmeticError(f"its output is off by {off:.2g}")


def passes(function: Function, given: tuple[Any, ...], no_gradient: tuple[int, ...] | None) -> Runs:
    """The forward pass and, unless `no_gradient` is None, the forward and backward pass."""
    if no_gradient is None:
        return {"forward": partial(function, *copies(given))}
    leaves = with_gradients(given, places := differentiable(given, no_gradient))
    wanted = [leaves[i] for i in places]
    outputs = traced(function(*leaves))
    if not outputs:
        return {"forward": partial(function, *leaves)}
    gradients = seeds(outputs, torch.float32)

    def both() -> None:
        torch.autograd.grad(traced(function(*leaves)), wanted, gradients, allow_unused=True)

    return {"forward": partial(function, *leaves), "both": both}


def median_us(run: Callable[[], Any], device: str) -> float | None:
    """Median microseconds of a run on a GPU, the L2 cache cleared before each; None on a CPU, after one run."""
    if device == "cpu":
        run()
        return None
    from triton.testing import do_bench

    return 1e3 * do_bench(run, warmup=20, rep=60, return_mode="median")


def captured(run: Callable[[], Any]) -> Callable[[], Any] | None:
    """A replay of a run as a CUDA graph; None where the run waits for the GPU, as to read a number of it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        except RuntimeError:
            return None
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def copy_of(count: int, device: str) -> Callable[[], Any]:
    """A copy that reads and writes `count` bytes in all."""
    source = torch.empty(count // 2, dtype=torch.uint8, device=device)
    return partial(torch.empty_like(source).copy_, source)


def on_meta(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, their tensors on meta."""
    return tuple(a.to("meta") if isinstance(a, Tensor) else a for a in given)


def why(error_: Exception) -> str:
    """An error in a line."""
    return f"{type(error_).__name__}: {(str(error_).strip().splitlines() or [''])[0]}"[:300]
