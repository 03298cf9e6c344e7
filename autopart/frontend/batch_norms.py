"""Modules that normalise by the statistics of a batch: they mix samples, and a forward pass changes their buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from autopart.frontend.layer_sampling import Sample, SampledLayers
from autopart.frontend.torch_private import BatchNorm


def batch_norms(model: nn.Module) -> Iterator[tuple[str, BatchNorm]]:
    """(path, module) of the modules that normalise by the statistics of a batch."""
    for path, module in model.named_modules():
        if isinstance(module, BatchNorm) and module.training:
            yield path, module


def without_statistics(model: nn.Module, sampled: Sequence[Sample]) -> tuple[tuple[Sample, ...], dict[str, str]]:
    """The samples of lists whose repeated blocks have no batch norm with running statistics, and path -> reason of the
    others: a forward pass would change other buffers in each block."""
    norms = [f"{path}.running_mean" for path, norm in batch_norms(model) if norm.running_mean is not None]
    changed = {sample: next((name for name in norms if _repeats(sample, name)), "") for sample in sampled}
    reasons = {s.path: f"{s.path}: the forward pass changes {name}" for s, name in changed.items() if name}
    return tuple(sample for sample in sampled if not changed[sample]), reasons


def _repeats(sample: Sample, name: str) -> bool:
    """Whether a tensor of this name is in a block that may stand for others."""
    repeated = range(sample.start, sample.after) if isinstance(sample, SampledLayers) else range(sample.blocks)
    return sample.index(name) in repeated
