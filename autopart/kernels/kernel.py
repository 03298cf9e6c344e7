"""What the compiler knows of a fused kernel, in one record."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from autopart.kernels.ahead import Usage


class Bytes(NamedTuple):
    """Device memory traffic in bytes, at the least: every operand and result once."""

    forward: int
    backward: int


def always(*arguments: object) -> bool:
    """True: the kernel pays for all arguments."""
    return True


@dataclass(frozen=True, eq=False)
class Kernel:
    """A fused kernel.

    function     what emitted code calls: the Triton kernels where they apply, else `reference`. Its arguments are
                 tensors, then constants
    reference    the same function in plain PyTorch, of the same arguments: the pattern that is replaced, what runs on a
                 CPU, and the oracle of the tests
    rule         how its tensors may be split, in the notation of `autopart.sharding.notation`; or a function
                 of arguments and shapes of outputs that says so; "" where `autopart.sharding.rules` has it
    kept         (arguments, outputs) -> the tensors that the Triton kernels keep for backward: some of the given ones,
                 and new ones for statistics. It is called with meta tensors
    bytes_moved  least bytes that the Triton kernels read and write, of the arguments as meta tensors; the formulas are
                 on top of the kernel's file
    ahead        compute capability (90 for 9.0), keyword arguments -> resources of every Triton kernel by name
    shapes       model -> the keyword arguments of `ahead` for its layers
    no_gradient  places of the arguments that need no gradient, such as tables of cosines: others are not fused
    pays         whether the kernel is worth its place for such arguments, as meta tensors
    on_cpu       whether graphs for CPUs have calls of it
    workspace    most bytes of temporaries besides gradients, of the arguments as meta tensors; None: none
    chunked      whether the workspace is a chunk's, whose size does not grow with the samples
    streamed     bytes that a kernel with a matrix product reads and writes apart from its products, of the arguments as
                 meta tensors; None: none
    everywhere   whether `kept` holds on a CPU too, where other kernels keep what autograd saves of the reference
    """

    function: Callable[..., Any]
    reference: Callable[..., Any]
    rule: str | Callable[[tuple[Any, ...], Any], str]
    kept: Callable[[tuple[Any, ...], tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]
    bytes_moved: Callable[..., Bytes]
    ahead: Callable[..., Mapping[str, Usage]]
    shapes: Mapping[str, Mapping[str, Any]]
    no_gradient: tuple[int, ...] = ()
    pays: Callable[..., bool] = always
    on_cpu: bool = True
    workspace: Callable[..., int] | None = None
    chunked: bool = False
    streamed: Callable[..., Bytes] | None = None
    everywhere: bool = False

    @property
    def name(self) -> str:
        """The name of `function`, which plans and emitted code say."""
        return str(self.function.__name__)
