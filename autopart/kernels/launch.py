"""Where Triton kernels run, and how they are launched."""

import importlib.util
import os
from collections.abc import Callable, Iterable
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
    found = (tensors[0].is_cuda or forced) and importlib.util.find_spec("triton") is not None
    if found:
        register_operators()
    return found


class Operator:
    """A function that becomes a `torch.library.triton_op` when `register_operators` is called."""

    def __init__(self, name: str, mutates_args: Iterable[str], function: Callable[..., Any]) -> None:
        self.name, self.mutates_args, self.function = name, mutates_args, function
        self.gradients: tuple[Callable[..., Any], Callable[..., Any]] | None = None

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """As of `torch.library.CustomOpDef`."""
        self.gradients = backward, setup_context

    def register(self) -> None:
        """Make it an operator of torch's."""
        made: Any = torch.library.triton_op(self.name, self.function, mutates_args=self.mutates_args)
        if self.gradients:
            made.register_autograd(self.gradients[0], setup_context=self.gradients[1])


_WAITING: list[Operator] = []


def triton_op(name: str, *, mutates_args: Iterable[str]) -> Callable[[Callable[..., Any]], Operator]:
    """`torch.library.triton_op`, which imports Triton and reads the function's source, once Triton is to run."""

    def waiting(function: Callable[..., Any]) -> Operator:
        _WAITING.append(Operator(name, mutates_args, function))
        return _WAITING[-1]

    return waiting


def register_operators() -> None:
    """Register the operators of all kernels that were imported. `runs_on` calls this where Triton runs."""
    while _WAITING:
        _WAITING.pop().register()


class Jit:
    """A Triton function before Triton is imported. In its file ``tl`` becomes ``triton.language``: Triton's
    interpreter looks for its language among a function's globals."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__name__ = function.__name__
        self.made: Any = None


def jit(function: Callable[..., Any]) -> Any:
    """``triton.jit``, once `jitted` is called: a machine without Triton imports the function's file."""
    return Jit(function)


def jitted(kernel: Any) -> Any:
    """The ``triton.jit`` function of a `Jit`, with those that it calls. The first call imports Triton, which reads
    TRITON_INTERPRET from the environment then."""
    if isinstance(kernel, Jit) and kernel.made is None:
        import triton
        import triton.language

        kernel.made = triton.jit(kernel.function)
        names = kernel.function.__globals__
        names["tl"] = triton.language
        names.update({name: jitted(value) for name, value in names.items() if isinstance(value, Jit)})
    return kernel.made if isinstance(kernel, Jit) else kernel


def interprets() -> bool:
    """Whether Triton's interpreter runs kernels."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def launch(kernel: Any, programs: int | tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a `jit` function as so many programs, on the device of its first argument.

    Inside of a ``torch.library.triton_op`` the launch is one that torch.compile and torch.export see. Triton's
    interpreter is called as it is.
    """
    import triton

    made = jitted(kernel)
    wrapped = torch.library.wrap_triton(made) if isinstance(made, triton.JITFunction) else made
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
