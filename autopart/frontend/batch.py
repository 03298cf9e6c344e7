"""Batches: the keyword arguments of a model, with samples in dim 0 of every tensor."""

from collections.abc import Mapping
from typing import Any

import torch

from autopart.errors import PartitionError

Batch = Mapping[str, Any]


DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def samples_of(batch: Batch) -> int:
    """The number of samples: the size of dim 0 of every tensor. Raises PartitionError if tensors differ in it, have no
    dim, or have no samples."""
    tensors = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}
    if flat := [k for k, v in tensors.items() if not v.dim()]:
        raise PartitionError(
            f"batch[{flat[0]!r}] has no dims", "samples are in dim 0 of every tensor", "a Python number"
        )
    sizes = {k: v.shape[0] for k, v in tensors.items()}
    if len(set(sizes.values())) != 1:
        raise PartitionError("the batch has no common size", f"samples in dim 0: {sizes}", "equal sizes in dim 0")
    (samples,) = set(sizes.values())
    if samples == 0:
        raise PartitionError("the batch has no samples", f"samples in dim 0: {sizes}", "at least one sample")
    return samples


def take(batch: Batch, samples: int) -> dict[str, Any]:
    """A batch of `samples` samples: the first of a batch, repeated from the start where it has too few."""
    index = torch.arange(samples, device="cpu") % samples_of(batch)
    return {
        k: v[index.to(v.device)] if isinstance(v, torch.Tensor) and v.device.type != "meta"
        else v[:1].expand(samples, *v.shape[1:]) if isinstance(v, torch.Tensor)
        else v
        for k, v in batch.items()
    }  # fmt: skip


def outline(batch: Batch, samples: int) -> dict[str, Any]:
    """A batch of `samples` samples whose tensors are on meta, to trace with."""
    samples_of(batch)
    return {
        k: torch.empty((samples, *v.shape[1:]), dtype=v.dtype, device="meta") if isinstance(v, torch.Tensor) else v
        for k, v in batch.items()
    }
