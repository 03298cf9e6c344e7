"""Where Triton kernels run, and how they are launched."""

import importlib.util
import os
from typing import Any

import torch

TRITON_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
"""The dtypes that every kernel takes -> their names in Triton's signatures."""


def runs_on(*tensors: torch.Tensor) -> bool:
    """Whether a kernel can take these tensors.

    They are plain tensors with elements, of one device where Triton runs: a GPU, or the CPU where the environment has
    ``TRITON_INTERPRET=1`` and ``AUTOPART_FORCE_TRITON=1``. Tensor subclasses, such as fake tensors, take the reference.
    """
    plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) and t.numel() > 0 for t in tensors)
    if not plain or len({t.device for t in tensors}) != 1:
        return False
    forced = all(os.environ.get(name) == "1" for name in ("TRITON_INTERPRET", "AUTOPART_FORCE_TRITON"))
    return (tensors[0].is_cuda or forced) and importlib.util.find_spec("triton") is not None


def launch(kernel: Any, programs: int | tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a ``triton.jit`` function as so many programs, on the device of its first argument.

    Inside of a ``torch.library.triton_op`` the launch is one that torch.compile and torch.export see. Triton's
    interpreter is called as it is.
    """
    import triton

    wrapped = torch.library.wrap_triton(kernel) if isinstance(kernel, triton.JITFunction) else kernel
    with torch.cuda.device_of(args[0]):
        wrapped[programs if isinstance(programs, tuple) else (programs,)](*args, **options)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x (..., d) as (rows, d) with stride 1 along a row: a view, or a copy where x has another stride."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 4 for a CPU, where the interpreter runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
