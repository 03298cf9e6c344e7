"""ZeRO (Rajbhandari et al., arXiv 1910.02054): data-parallel ranks share optimizer states (level 1), gradients too
(level 2), weights too (level 3).

Of every weight whose gradient is a partial sum over dp, each rank trains one slice. Levels 1 and 2 keep the weight
whole, in the memory its slices lie in; at level 3 the emitted code holds slices alone (`groups.weight_slice`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from autopart.runtime.groups import Groups
from autopart.runtime.slices import buckets, fill_a_message, gather, rows, scatter_sum

Tensor = torch.Tensor


class Shared:
    """What one rank trains of a stage: `trained`, slices among it, in the order of the stage's weights."""

    def __init__(self, stage: nn.Module, groups: Groups, level: int) -> None:
        self.stage, self.group, self.level = stage, groups.dp, level
        self.slice_of: dict[Any, Any] = {}
        self.waiting: list[Any] = []
        weights: list[Any] = [p for p in stage.parameters() if p.requires_grad]
        for weight in weights:
            shared = groups.dp.size > 1 and weight.origin.placed["dp"].kind == "C"
            if level >= 1 and shared and not weight.origin.sliced:
                self.slice_of[weight] = self._cut(weight)
                if level >= 2:
                    weight.register_post_accumulate_grad_hook(self._accumulated)
        self.trained = [self.slice_of.get(weight, weight) for weight in weights]

    def _cut(self, weight: Any) -> nn.Parameter:
        """Move a weight to where its slices are rows; this rank's."""
        slices = rows(weight.detach(), self.group.size).clone()
        weight.data = slices.view(-1)[: weight.numel()].view(weight.shape)
        mine = nn.Parameter(slices[self.group.rank])
        mine.origin = replace(weight.origin, sliced=True)  # type: ignore[attr-defined]
        return mine

    def zero_grad(self) -> None:
        """Forget the last step's gradients."""
        self.waiting = []
        self.stage.zero_grad(set_to_none=True)
        for share in self.trained:
            share.grad = None

    def _accumulated(self, weight: Any) -> None:
        """Level 2: a micro-batch's gradient is there; it goes out with others as soon as they make a message."""
        self.waiting.append(weight)
        if fill_a_message(self.waiting):
            self.backward_ended()

    def backward_ended(self) -> None:
        """A micro-batch's gradients are all there."""
        self._sum_slices(self.waiting)
        self.waiting = []

    def reduce(self) -> None:
        """All micro-batches' gradients are there: bring the sums over dp into the slices. Afterwards every weight that
        is trained has a gradient."""
        if self.level == 1:
            weights = list(self.slice_of)
            for bucket in buckets(weights):
                self._sum_slices([weights[i] for i in bucket])
        for share in self.trained:
            if share.grad is None:
                share.grad = torch.zeros_like(share)

    def _sum_slices(self, weights: list[Any]) -> None:
        gradients = [w.grad if w.grad is not None else torch.zeros_like(w) for w in weights]
        for weight in weights:
            weight.grad = None
        for weight, summed in zip(weights, scatter_sum(gradients, self.group), strict=True):
            mine = self.slice_of[weight]
            mine.grad = summed if mine.grad is None else mine.grad.add_(summed)

    def stepped(self) -> None:
        """The slices have new values: share them with the ranks that keep the weights whole."""
        weights = list(self.slice_of)
        for bucket in buckets(weights):
            some = [weights[i] for i in bucket]
            wholes = gather([self.slice_of[w] for w in some], [w.shape for w in some], self.group)
            for weight, value in zip(some, wholes, strict=True):
                weight.data.copy_(value)

    def gradients(self) -> dict[str, Tensor]:
        """The stage's gradients, whole, by the weights' paths; of slices on the first rank of dp alone. All ranks call
        it."""
        found = {}
        for path, weight in self.stage.named_parameters():
            share = self.slice_of.get(weight, weight)
            if share.grad is not None and (whole := self._whole(weight, share, share.grad)) is not None:
                found[path] = whole
        return found

    def weights(self) -> dict[str, Tensor]:
        """The stage's weights likewise."""
        weights = self.stage.named_parameters()
        return {path: whole for path, w in weights if (whole := self._whole(w, w, w.detach())) is not None}

    def _whole(self, weight: Any, share: Any, value: Tensor) -> Tensor | None:
        """The whole of `value`, which lies as `share` does."""
        if not share.origin.sliced:
            return value
        shape = weight.slicing.shape if weight.origin.sliced else weight.shape
        whole = gather([value], [shape], self.group)[0].cpu()
        return None if self.group.rank else whole
