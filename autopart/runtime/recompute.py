"""Activation checkpointing: blocks that save little for backward and are computed again there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Tensor = torch.Tensor
Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]

KEPT = frozenset(
    f"aten.{name}"
    for name in """mm addmm bmm baddbmm addbmm mv addmv dot _addmm_activation _scaled_mm _scaled_mm_v2 _grouped_mm
    _scaled_grouped_mm _scaled_grouped_mm_v2 convolution
    _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
    _scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math_for_mps""".split()
)
"""Operators whose outputs `recomputed_selectively` keeps: products, convolutions, attention: most of the FLOPs."""


def recomputed(layer: nn.Module, *args: Tensor) -> Any:
    """Call a layer and save its inputs; backward computes the layer again."""
    return _run_again(layer, args, lambda: (nullcontext(), nullcontext()))


def recomputed_selectively(layer: nn.Module, *args: Tensor) -> Any:
    """Call a layer, keep its inputs and the outputs of its products, convolutions and attention, and compute the rest
    again for backward (Korthikanti et al., arXiv 2205.05198, recompute what is cheap and large)."""
    return _run_again(layer, args, lambda: create_selective_checkpoint_contexts(_policy))


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = str(getattr(operator, "overloadpacket", "")) in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _run_again(layer: nn.Module, args: tuple[Tensor, ...], contexts: Contexts) -> Any:
    """Call a layer in backward, from the buffers that the first call had, and leave the buffers as they were.

    torch's checkpoint hands on values alone, so that weights among the arguments are held here.
    """
    weights = {i: arg for i, arg in enumerate(args) if isinstance(arg, nn.Parameter)}
    values = [arg for i, arg in enumerate(args) if i not in weights]
    buffers = dict(layer.named_buffers(recurse=False))

    def both() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        first, again = contexts()
        return first, _with_buffers(layer, buffers, again) if buffers else again

    def run(*values: Tensor) -> Any:
        others = iter(values)
        return layer(*(weights[i] if i in weights else next(others) for i in range(len(args))))

    return checkpoint(run, *values, use_reentrant=False, preserve_rng_state=False, context_fn=both)


@contextmanager
def _with_buffers(layer: nn.Module, buffers: dict[str, Tensor], inner: AbstractContextManager[Any]) -> Iterator[None]:
    now = dict(layer.named_buffers(recurse=False))
    try:
        for name, value in buffers.items():
            setattr(layer, name, value)
        with inner:
            yield
    finally:
        for name, value in now.items():
            setattr(layer, name, value)
