"""Time the RMS normalisation kernels on a GPU: Triton, eager reference, torch.compile and a plain copy.

Prints a table of microseconds and ratios, then one JSON line a shape. The copy moves as many bytes as
``bytes_moved`` counts, half of them read and half written, so its time is the floor of a kernel.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch._functorch import config as functorch_config

from autopart.kernels import rms_norm

EPS = 1e-6
Norm = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def main() -> None:
    """Time every shape asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--width", type=int, nargs="+", default=[128, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/kernels/rms_norm.py needs a CUDA device, and torch finds none")
    for width in options.width:
        for rows in options.rows:
            report(rows, width, getattr(torch, options.dtype))


def report(rows: int, width: int, dtype: torch.dtype) -> None:
    """Print forward and backward times of x (rows, width), in microseconds, and their ratios to the copy."""
    times = measure(rows, width, dtype)
    for direction, found in times.items():
        row = "  ".join(f"{name} {us:8.1f} us ({us / found['copy']:5.2f}x copy)" for name, us in found.items())
        print(f"{rows:6d} x {width:5d} {direction:8s}  {row}")
    record = {"rows": rows, "width": width, "dtype": str(dtype).removeprefix("torch.")}
    record |= {"device": torch.cuda.get_device_name(), "microseconds": times}
    print(json.dumps(record), flush=True)


def measure(rows: int, width: int, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Median microseconds by direction, then by implementation."""
    x = torch.randn(rows, width, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.rand(width, device="cuda", dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x)

    def reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm.reference(x, weight, EPS, torch.float32)

    def triton(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm.rms_norm(x, weight, EPS, torch.float32)

    torch.compiler.reset()
    functorch_config.donated_buffer = False  # donated buffers forbid repeating a backward
    norms: dict[str, Norm] = {"triton": triton, "reference": reference, "compile": torch.compile(reference)}
    moved = rms_norm.bytes_moved(x, weight)
    times: dict[str, dict[str, float]] = {"forward": {}, "backward": {}}
    for name, norm in norms.items():
        times["forward"][name] = median_us(partial(norm, x, weight))
        backward = partial(torch.autograd.grad, norm(x, weight), (x, weight), dy, retain_graph=True)
        times["backward"][name] = median_us(backward)
    for direction, count in moved._asdict().items():
        source = torch.empty(count // 2, dtype=torch.uint8, device="cuda")
        times[direction]["copy"] = median_us(partial(torch.empty_like(source).copy_, source))
    return times


def median_us(run: Callable[[], Any]) -> float:
    """Median device time of ``run`` in microseconds, the L2 cache cleared before each repetition."""
    from triton.testing import do_bench

    return 1e3 * do_bench(run, warmup=25, rep=100, return_mode="median")


if __name__ == "__main__":
    main()
