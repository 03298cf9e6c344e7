"""Dropout by hashes of rows and columns (`autopart.kernels.dropout`) in plain PyTorch, with a gradient."""

from typing import Any

import torch

from autopart.kernels import dropout


def dropped(x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, threshold: int, scale: float) -> torch.Tensor:
    """x (..., d) after dropout:

        y[i, j] = scale x[i, j]  if  hash(rows[i] + columns[j]) ^ 0x80000000 >= threshold  else  0

    rows (...) and columns (d,) are int32; the hash is compared as int32. Autograd saves rows and columns alone.
    """
    result: torch.Tensor = _Dropped.apply(x, rows, columns, threshold, scale)
    return result


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, *constants: Any) -> torch.Tensor:
        ctx.save_for_backward(rows, columns)
        ctx.constants = constants
        return _masked(x, rows, columns, *constants)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _masked(gradients[0], *ctx.saved_tensors, *ctx.constants), None, None, None, None


def _masked(x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, threshold: int, scale: float) -> torch.Tensor:
    flat = x.reshape(-1, len(columns)).contiguous()
    return dropout.by_blocks(flat, rows.reshape(-1), columns, threshold, scale).view(x.shape)
