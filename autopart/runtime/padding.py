"""Batches of many lengths as batches of a few, for each of which there is one program."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from autopart.errors import PartitionError


def pad(
    batch: Mapping[str, Any], lengths: Iterable[int], values: Mapping[str, float | None], dim: int = 1
) -> dict[str, Any]:
    """A batch whose dim `dim` is as long as the shortest of `lengths` that it fits in.

    values  name of a tensor -> what is put behind its end: 0 for an attention mask, -100 for the targets of a
            cross-entropy, which ignores these; None leaves a tensor as it is

    Raises PartitionError for a batch longer than all `lengths`, for tensors to pad of several lengths, and for another
    tensor of that length that `values` does not name: the model would read it at the wrong places.
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and value.dim() > dim}
    padded = {name: value for name, value in values.items() if value is not None}
    if missing := padded.keys() - tensors.keys():
        raise PartitionError(
            f"there is no {min(missing)} to pad", f"tensors with a dim {dim}: {', '.join(tensors) or 'none'}"
        )
    sizes = {name: tensors[name].shape[dim] for name in padded}
    if len(set(sizes.values())) != 1:
        told = ", ".join(f"{name} {size}" for name, size in sizes.items()) or "no names"
        raise PartitionError("what is to be padded has not one length", told)
    (length,) = set(sizes.values())
    for name, tensor in tensors.items():
        if tensor.shape[dim] == length and name not in values:
            raise PartitionError(
                f"{name} is {length} long too, and has no value to pad with",
                f"values are given for {', '.join(values)}",
                f"values={{..., {name!r}: 0}}, or None to leave it as it is",
            )
    target = min((each for each in lengths if each >= length), default=None)
    if target is None:
        raise PartitionError(
            f"a batch of length {length} is longer than all lengths", try_="a greater length, or shorter samples"
        )
    return {
        name: _longer(tensors[name], target, padded[name], dim) if name in padded else batch[name] for name in batch
    }


def _longer(tensor: torch.Tensor, length: int, value: float, dim: int) -> torch.Tensor:
    shape = list(tensor.shape)
    shape[dim] = length - shape[dim]
    return torch.cat([tensor, tensor.new_full(shape, value)], dim)
