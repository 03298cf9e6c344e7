"""Bytes of a fused kernel on a rank, besides its operands and results: temporaries, and passes besides its products."""

from collections.abc import Sequence

import torch
from torch import fx

from autopart.ir.graph import NO_BYTES, KernelBytes, info, operands, with_operands
from autopart.kernels.table import kernel_of
from autopart.sharding.notation import R, Strategy
from autopart.sharding.rules import local_shape

IN_PLAIN_TORCH = 4
"""Bytes of a float32 temporary for each element of a kernel's workspace, where plain torch runs and no Triton."""


def is_kernel(node: fx.Node) -> bool:
    """Whether an operator has such bytes."""
    kernel = kernel_of(info(node).name)
    return kernel is not None and kernel.workspace is not None


def kernel_bytes(node: fx.Node, chosen: Sequence[Strategy], ranks: Sequence[int]) -> KernelBytes:
    """The bytes of a traced operator under these strategies, along axes of so many ranks. An axis of 1 rank splits
    nothing: so are counted the samples of all ranks."""
    kernel = kernel_of(info(node).name)
    if kernel is None or kernel.workspace is None:
        return NO_BYTES

    def local(index: int, operand: fx.Node) -> torch.Tensor:
        shape = info(operand).shape
        for strategy, size in zip(chosen, ranks, strict=True):
            shape = local_shape(shape, strategy.inputs[index] or R, size)
        return torch.empty(shape, dtype=info(operand).dtype, device="meta")

    tensors = [None if operand is None else local(i, operand) for i, operand in enumerate(operands(node))]
    args = with_operands(tuple(node.args), tensors)
    computes = info(node).computes
    assert computes is not None
    in_torch = IN_PLAIN_TORCH / computes.itemsize if info(node).plain else 0.0
    taken = kernel.workspace(*args) * (1.0 + in_torch)
    forward, backward = kernel.streamed(*args) if kernel.streamed else (0.0, 0.0)
    return KernelBytes(0.0 if kernel.chunked else taken, taken if kernel.chunked else 0.0, forward, backward)
