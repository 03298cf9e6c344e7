"""ZeRO (Rajbhandari et al., arXiv 1910.02054), and master copies of weights.

Optimizer states are divided among data-parallel ranks (level 1), also gradients (level 2), also weights (level 3). At
level 0 nothing is divided, and gradients are summed over these ranks. The optimizer may step master copies of weights
in a wider dtype.

- Each rank trains one slice of every weight whose gradient is a partial sum over dp. Levels 1 and 2 keep the weight
  whole, in the memory that its slices lie in. At level 3 the emitted code holds slices only (`groups.weight_slice`).
- Slices may be divided among a part of the dp ranks (`groups.shard`), and be the same in every part, as in PyTorch's
  HSDP, ZeRO++ and MiCS. Weights are gathered within a part. Gradients are reduce-scattered within a part for every
  micro-batch or step, as the level says. Once a step, each rank's sums are all-reduced over the parts
  (`groups.replicas`): at the level 1 and in the last backward of a step right behind the reduce-scatter, in its memory.
- With a master dtype the optimizer trains a copy of the slice, or of the whole weight, in that dtype. Gradients are
  added up in it, over micro-batches and ranks, and weights are written back after a step. At level 3 slices are of the
  master dtype themselves.
- With `offload` the optimizer trains copies on the host (`runtime.offload`), in the master dtype if there is one.
  Slices and weights on the device have the dtype of the weights then, and carry the sums of gradients.
- With `overlap` gradients travel while the backward goes on. A message starts as soon as final gradients fill it. At
  level 2 the gradients of a block are sent together at the latest, so that no more than one block's are whole at once.
  Ranks run the same program, so that gradients become final in the same order on all. At level 3 gradients have a
  communicator of their own, so that no gathered weight waits for them.
- With `prefetch` bytes, at level 3 the weights of the next block travel while a block computes (`runtime.prefetch`), on
  a communicator of their own.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from autopart.runtime.flat_slices import (
    as_slices,
    buckets,
    fill_a_message,
    gather,
    start_scatter,
    start_sum,
    sum_together,
)
from autopart.runtime.gradient_norm import scale
from autopart.runtime.groups import Groups
from autopart.runtime.offload import HostCopies
from autopart.runtime.prefetch import Prefetch
from autopart.runtime.process_group import Group

AHEAD = 2
"""The most messages of gradients of a kind that stay in flight once another one was started, which bounds their
memory."""


class DataParallelState:
    """What one rank trains of a stage. `trained` has its parameters, slices and copies, in the order of the stage's
    weights; they carry the gradients. `stepped_as` has what the optimizer steps: the same, or copies on the host."""

    def __init__(
        self,
        stage: nn.Module,
        groups: Groups,
        level: int,
        master: torch.dtype | None = None,
        overlap: bool = False,
        offload: bool = False,
        prefetch: int = 0,
    ) -> None:
        self.stage, self.group, self.replicas = stage, groups.shard, groups.replicas
        self.level, self.overlap = level, overlap
        self.slice_of: dict[Any, Any] = {}
        self.copy_of: dict[Any, Any] = {}
        self.sent: dict[Any, bool] = {}
        """Weight whose gradient is a partial sum over dp -> whether this step has sent its gradient."""
        self.final: dict[Any, list[Any]] = defaultdict(list)
        """Group of `send_group` -> its weights with final gradients that are not sent yet."""
        self.started: deque[Callable[[], None]] = deque()
        """What waits for the messages within `group`, and for those over `replicas`, in the order of their starts."""
        self.crossing: deque[Callable[[], None]] = deque()
        self.crossed: dict[Any, Tensor] = {}
        """Slice -> what this step has summed over `replicas` of its gradient."""
        self.sends, self.last = level >= 2, False
        """Whether gradients are sent while this backward runs; whether it is the last of a step."""
        weights: list[Any] = [p for _, p in stage.named_parameters() if p.requires_grad]
        for weight in weights:
            shared = groups.dp.size > 1 and weight.origin.placed["dp"].kind == "C"
            if shared and not weight.origin.sliced:
                self.sent[weight] = False
                if level >= 2 or overlap:
                    weight.register_post_accumulate_grad_hook(self._accumulated)
            if level >= 1 and weight in self.sent:
                dtype = weight.dtype if offload else master or weight.dtype
                self.slice_of[weight] = self._slice(weight, dtype)
                self.slice_of[weight].grad_dtype = master or weight.dtype
            elif master not in (None, weight.dtype) and not offload:
                self.copy_of[weight] = _like(weight, weight.detach().to(master))
            weight.grad_dtype = master or weight.dtype
        self.send_group = {
            weight: None if level < 2 else weight if module is stage else module
            for module in stage.modules()
            for _, weight in module.named_parameters(recurse=False)
        }
        """Weight -> the group of weights whose gradients are sent together at the latest: from level 2 on the
        weights of a module, below it all."""
        self.group_sizes = Counter(self.send_group[weight] for weight in self.sent)
        self.channel, self.prefetch = self._channels(groups, prefetch)
        for weight in weights:
            if hasattr(weight, "slicing"):
                weight.slicing = replace(weight.slicing, prefetch=self.prefetch, send=self._send)
        self.trained_as = {**self.slice_of, **self.copy_of}
        """Weight -> the slice or the copy of it that the optimizer trains."""
        self.trained = [self.trained_as.get(weight, weight) for weight in weights]
        self.host = HostCopies(self.trained, master) if offload else None
        self.stepped_as = {share: self.host.copy_of[share] if self.host else share for share in self.trained}
        """What carries a gradient -> what the optimizer steps."""
        self.copies = list(self.stepped_as.values()) if offload else list(self.trained_as.values()) if master else []
        """What the optimizer steps and has memory of its own."""
        self.weight_of: dict[Any, Tensor] = {copy: weight.data for weight, copy in self.copy_of.items()}
        """Copy -> the weight that is written back from it."""
        self.unscaled: tuple[list[Any], Tensor | float] = [], 1.0
        """Those of `trained` whose gradients are still to be multiplied by a factor, and the factor."""

    def _channels(self, groups: Groups, prefetch: int) -> tuple[Group, Prefetch]:
        """The group that sends gradients, and what gathers weights ahead, of at most `prefetch` bytes: at level 3 each
        has a communicator of its own, if it runs beside computing."""
        divided = self.level >= 3 and self.group.size > 1
        channel = groups.apart() if divided and self.overlap else self.group
        ahead = prefetch if divided else 0
        return channel, Prefetch(groups.apart() if ahead else self.group, ahead)

    def _slice(self, weight: Any, dtype: torch.dtype) -> nn.Parameter:
        """Move a weight into memory that holds its slices one a row; this rank's slice, in a dtype."""
        slices = as_slices(weight.detach(), self.group.size).clone()
        weight.data = slices.view(-1)[: weight.numel()].view(weight.shape)
        return _like(weight, slices[self.group.rank].to(dtype), sliced=True)

    def zero_grad(self) -> None:
        """Drop the last step's gradients."""
        self.unscaled = [], 1.0
        self.final.clear()
        self.crossed.clear()
        self.sent = dict.fromkeys(self.sent, False)
        for share in [*dict(self.stage.named_parameters()).values(), *self.trained]:
            share.grad = None

    def backward_begins(self, last: bool) -> None:
        """Note whether gradients become final in this backward: in the last of a step, from level 2 on in every one."""
        self.sends, self.last = self.level >= 2 or (self.overlap and last), last

    def _accumulated(self, weight: Any) -> None:
        """Called when a gradient was accumulated. Final gradients are sent as soon as they fill a message, or are all
        of their group."""
        if self.sends:
            group = self.send_group[weight]
            final = self.final[group]
            final.append(weight)
            if len(final) == self.group_sizes[group] or fill_a_message([w.grad for w in final], self.group):
                self._start(self.final.pop(group))

    def backward_ended(self) -> None:
        """Called when a micro-batch's gradients are complete."""
        for weights in self.final.values():
            self._start(weights)
        self.final.clear()

    def reduce(self) -> None:
        """Called when all micro-batches' gradients are complete: bring the sums over dp into the gradients, or into
        those of the slices. Afterwards every weight that is trained has a gradient."""
        self.last = True
        self._start([weight for weight, sent in self.sent.items() if not sent])
        self._wait(0)
        self._cross()
        for weight, copy in self.copy_of.items():
            copy.grad, weight.grad = weight.grad, None
        for share in self.trained:
            if share.grad is None:
                share.grad = torch.zeros_like(share, dtype=share.grad_dtype)

    def _start(self, weights: list[Any]) -> None:
        """Send the gradients of weights; zeros for a weight that has none."""
        for weight in weights:
            self.sent[weight] = True
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight, dtype=weight.grad_dtype)
        self._send(weights, [weight.grad for weight in weights])

    def _send(self, weights: Sequence[Any], gradients: Sequence[Tensor]) -> None:
        """Send the gradients of weights, or of slices at level 3. Each is let go of once it is in a message."""
        waiting = dict(enumerate(gradients))
        del gradients
        for bucket in list(buckets([*waiting.values()], self.group)):
            self.started.append(self._message([weights[i] for i in bucket], [waiting.pop(i) for i in bucket]))
            self._wait(AHEAD * self.overlap)

    def _wait(self, most: int) -> None:
        """Wait until at most so many messages are in flight, of either kind. The end of a reduce-scatter may start an
        all-reduce."""
        for messages in (self.started, self.crossing):
            while len(messages) > most:
                messages.popleft()()

    def _message(self, weights: Sequence[Any], gradients: Sequence[Tensor]) -> Callable[[], None]:
        """Start one message. The function that is returned waits for it and makes the sums the gradients of weights or
        of their slices."""
        trained = [self.slice_of.get(weight, weight) for weight in weights]
        if self.level == 0:
            finish = start_sum(gradients, self.group)
        else:
            finish = start_scatter(gradients, self.channel, trained[0].grad_dtype)
        for weight in self.sent.keys() & set(weights):
            weight.grad = None
        crosses = self.last and self.replicas.size > 1

        def add() -> None:
            message, sums = finish()
            if crosses:
                self._start_crossing(trained, message, sums)
                return
            for mine, summed in zip(trained, sums, strict=True):
                mine.grad = summed if mine.grad is None else mine.grad.add_(summed)

        return add

    def _start_crossing(self, trained: Sequence[Any], message: Tensor, sums: Sequence[Tensor]) -> None:
        """Start to all-reduce over `replicas` a message of this rank's slices of sums, together with what the step has
        summed of them before."""
        for mine, summed in zip(trained, sums, strict=True):
            if mine.grad is not None:
                summed.add_(mine.grad)
                mine.grad = None
        work = self.replicas.start_all_reduce(message)

        def add() -> None:
            work.wait()
            for mine, summed in zip(trained, sums, strict=True):
                self.crossed[mine] = self.crossed[mine].add_(summed) if mine in self.crossed else summed

        self.crossing.append(add)

    def _cross(self) -> None:
        """Sum over `replicas` what was not summed in a last backward."""
        left = [mine for mine in self.trained if mine.origin.sliced and mine.grad is not None]
        if self.replicas.size == 1 or not (left or self.crossed):
            return
        for mine, summed in zip(left, sum_together([mine.grad for mine in left], self.replicas), strict=True):
            self.crossed[mine] = self.crossed[mine].add_(summed) if mine in self.crossed else summed
        for mine, summed in self.crossed.items():
            mine.grad = summed
        self.crossed.clear()

    def multiply(self, factor: Tensor | float, later: Collection[Any] = ()) -> None:
        """Multiply the complete gradients by a factor, those of `later` when they are asked for."""
        scale([share for share in self.trained if share not in later], factor)
        self.unscaled = list(later), factor

    def stepping(self) -> None:
        """Called before the optimizer's step, once gradients are complete."""
        if self.host:
            self.host.take_gradients()

    def stepped(self, written: Collection[Any] = ()) -> None:
        """Called after the optimizer's step: write the new values of slices and copies into the weights, but for the
        copies that were `written` already."""
        if self.host:
            self.host.write_back()
        gather(list(self.slice_of.values()), [weight.data for weight in self.slice_of], self.group)
        for copy, weight in self.weight_of.items():
            if copy not in written:
                weight.copy_(copy.detach())

    def gradients(self) -> dict[str, Tensor]:
        """The stage's gradients, whole, by the weights' paths; of slices on the first rank of dp alone. All ranks call
        it."""
        scale(*self.unscaled)
        self.unscaled, found = ([], 1.0), {}
        for path, weight in self.stage.named_parameters():
            share = self.trained_as.get(weight, weight)
            if share.grad is not None and (whole := self._whole(weight, share, share.grad)) is not None:
                found[path] = whole
        return found

    def weights(self) -> dict[str, Tensor]:
        """The stage's weights, whole, by their paths, in the master dtype where there are copies in it; of slices on
        the first rank of dp alone. All ranks call it."""
        found = {}
        for path, weight in self.stage.named_parameters():
            share = self.best_of(weight) if self.copies else weight
            if (whole := self._whole(weight, share, share.detach().to(weight.device))) is not None:
                found[path] = whole
        return found

    def best_of(self, weight: Any) -> Any:
        """What has a weight's value in the widest dtype: what the optimizer steps, or a weight that is not trained."""
        trained = self.trained_as.get(weight, weight)
        return self.stepped_as.get(trained, trained)

    def _whole(self, weight: Any, share: Any, value: Tensor) -> Tensor | None:
        """The whole of `value`, which is sliced as `share` is."""
        if not share.origin.sliced:
            return value
        shape = weight.slicing.shape if weight.origin.sliced else weight.shape
        whole = gather([value], [value.new_empty(shape)], self.group)[0].cpu()
        return None if self.group.rank else whole


def _like(weight: Any, value: Tensor, **where: Any) -> nn.Parameter:
    """A parameter with the value `value` and the origin of `weight`, but for the fields `where`."""
    made = nn.Parameter(value)
    made.origin = replace(weight.origin, **where)  # type: ignore[attr-defined]
    return made
