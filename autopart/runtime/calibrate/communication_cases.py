"""What ranks do together in a calibration: collectives and messages; and what sharing a host's cores costs."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autopart.hardware.mesh import divisors
from autopart.runtime import collectives
from autopart.runtime.calibrate.timing import Case, Seconds, Timer
from autopart.runtime.flat_slices import gather, scatter_sum, sum_together
from autopart.runtime.process_group import Group

DIFFERENCES = 7
"""Number of differences (seconds with messages less seconds without) of which the median is taken, as each is small
compared with the seconds themselves."""


class CommunicationCases:
    """The cases of one rank."""

    def __init__(self, timer: Timer) -> None:
        self.timer = timer
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.groups = {size: self._group(size) for size in divisors(self.ranks) if size > 1}
        self.up, self.down = (dist.new_group() for _ in range(2))

    def _group(self, size: int) -> Group:
        """This rank's group of `size` neighbours."""
        for first in range(0, self.ranks, size):
            ranks = range(first, first + size)
            handle = dist.new_group(list(ranks))
            if self.rank in ranks:
                mine = Group("calibration", size, self.rank - first, handle)
        return mine

    def cases(self) -> Iterator[Case]:
        """What ranks do together; and what a rank does while others idle, or while messages are on their way."""
        for (size, group), nbytes in itertools.product(self.groups.items(), self.timer.sizes.messages):
            for name, run in COLLECTIVES.items():
                yield Case(name, str(size), (nbytes,), partial(self._collective, run, group, nbytes))
        for nbytes in self.timer.sizes.messages if self.ranks > 1 else ():
            yield Case("p2p", "", (nbytes,), partial(self._message, nbytes))
        yield Case("alone", "", (), self._alone)
        yield Case("overlap", "", (), self._overlap)

    def _collective(self, run: Callable[[Tensor, Group], Any], group: Group, nbytes: int) -> Callable[[], Seconds]:
        """Seconds of a collective: when repeated, or what it adds to a product in front of it, whichever is longer,
        because ranks that share cores do not reach a collective at the same time.
        """
        x, work = self.timer.randn(group.size, nbytes // 4 // group.size), self._work()
        alone, before, without = (
            self.timer.equally(each) for each in (lambda: run(x, group), lambda: (work(), run(x, group)), work)
        )
        return lambda: (max(alone()[0], before()[0] - without()[0]),)

    def _message(self, nbytes: int) -> Callable[[], Seconds]:
        """Half the seconds of an exchange between pairs of ranks, alone or during a product, whichever is longer: as
        stages of a pipeline exchange an activation and a gradient, in a group for either direction. A rank left over
        computes.
        """
        other, pairs = self.rank ^ 1, self.ranks - self.ranks % 2
        there, back = (self.up, self.down) if self.rank < other else (self.down, self.up)
        sent, work = self.timer.randn(nbytes // 4), self._work()
        received = torch.empty_like(sent)

        def send_receive(before: Callable[[], Any]) -> None:
            messages = [dist.irecv(received, other, group=back)] if self.rank < pairs else []
            before()
            messages += [dist.isend(sent, other, group=there)] if self.rank < pairs else []
            for message in messages:
                assert message is not None
                message.wait()

        alone, overlapped, without = (
            self.timer.equally(each) for each in (lambda: send_receive(lambda: None), lambda: send_receive(work), work)
        )

        def half() -> Seconds:
            more = statistics.median(overlapped()[0] - without()[0] for _ in range(DIFFERENCES))
            seconds = max(alone()[0], more) / 2
            return (seconds * self.ranks / pairs if self.rank < pairs else 0.0,)

        return half

    def _work(self) -> Callable[[], Any]:
        """A product that takes a while."""
        size = (
            self.timer.sizes.products[-1] // 4 if len(self.timer.sizes.products) > 2 else self.timer.sizes.products[-1]
        )
        x, y = self.timer.randn(size, size), self.timer.randn(size, size // 4)
        return lambda: x @ y

    def _alone(self) -> Callable[[], Seconds]:
        """Factor by which rank 0 computes faster while the others wait; every rank returns the same."""
        timed = self.timer.repeated(self._work(), 1)

        def both() -> Seconds:
            busy = timed()[0]
            dist.barrier()
            ratio = torch.tensor(busy / timed()[0] if self.rank == 0 else 0.0)
            dist.all_reduce(ratio)
            return (ratio.item(),)

        return both

    def _overlap(self) -> Callable[[], Seconds]:
        """Factor by which a product takes longer while an all-reduce runs."""
        work, message = self._work(), self.timer.randn(self.timer.sizes.messages[-1] // 4)
        group = self.groups.get(self.ranks)

        def seconds(overlapped: bool) -> float:
            total = 0.0
            for _ in range(8):
                sent = dist.all_reduce(message, group=group.handle, async_op=True) if overlapped and group else None
                started = self.timer.now() if self.timer.device.type == "cpu" else time.perf_counter()
                work()
                if self.timer.device.type == "cuda":
                    torch.cuda.current_stream().synchronize()
                total += time.perf_counter() - started
                if sent is not None:
                    sent.wait()
                message.zero_()
                dist.barrier()
            return total

        def both() -> Seconds:
            seconds(False)
            alone = seconds(False)
            return (seconds(True) / alone,)

        return both


# ---- operators ------------------------------------------------------------------------------------------------------


def _split(x: Tensor, group: Group) -> list[Tensor]:
    """A message of four parameters, as they travel together."""
    return list(x.flatten().chunk(4))


def _gathered(x: Tensor, group: Group) -> None:
    parts = _split(x, group)
    gather([part.chunk(group.size)[group.rank] for part in parts], parts, group)


COLLECTIVES: Mapping[str, Callable[[Tensor, Group], Any]] = {
    "all_reduce": lambda x, group: collectives.reduce_from(x, group),
    "all_gather": lambda x, group: collectives.gather_from(x[group.rank], group, 0),
    "reduce_scatter": lambda x, group: collectives.reduce_scatter_to(x, group, 0),
    "all_to_all": lambda x, group: collectives.all_to_all(x, group, 1, 0),
    "merged_all_reduce": lambda x, group: sum_together(_split(x, group), group),
    "merged_all_gather": _gathered,
    "merged_reduce_scatter": lambda x, group: scatter_sum(_split(x, group), group),
}
"""Name -> the collective as the runtime runs it, on x of (ranks, n)."""
