"""What the compiler knows of a fused kernel, in one record."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from autopart.kernels.ahead import Usage


class Bytes(NamedTuple):
    """Device memory traffic in bytes, at the least: every operand and result once."""

    forward: int
    backward: int


class Kernel(NamedTuple):
    """A fused kernel.

    function     what emitted code calls: the Triton kernels where they apply, else `reference`. Its arguments are
                 tensors, then constants
    reference    the same function in plain PyTorch, of the same arguments: the pattern that is replaced, what runs on a
                 CPU, and the oracle of the tests
    rule         how its tensors may be split, in the notation of `autopart.sharding.notation`
    kept         (arguments, outputs) -> the tensors that the Triton kernels keep for backward: some of the given ones,
                 and new ones for statistics. It is called with meta tensors
    bytes_moved  least bytes that the Triton kernels read and write, of the arguments as meta tensors
    ahead        compute capability (90 for 9.0), keyword arguments -> resources of every Triton kernel by name
    shapes       model -> the keyword arguments of `ahead` for its layers
    """

    function: Callable[..., Any]
    reference: Callable[..., Any]
    rule: str
    kept: Callable[[tuple[Any, ...], tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]
    bytes_moved: Callable[..., Bytes]
    ahead: Callable[..., Mapping[str, Usage]]
    shapes: Mapping[str, Mapping[str, Any]]

    @property
    def name(self) -> str:
        """The name of `function`, which plans and emitted code say."""
        return str(self.function.__name__)
