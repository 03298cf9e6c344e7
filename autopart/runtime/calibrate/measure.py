"""What is timed, and how: cases, each in turn on all ranks at once, round after round.

Compute is timed by the wall: each rank repeats a case until its time is over, so that all are busy all the while. What
ranks do together they repeat equally often. Results are made anew by every call and held for some calls, as training
does; operators run under autograd, forward and backward timed apart.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from autopart.hardware.mesh import divisors
from autopart.runtime import collectives
from autopart.runtime.launch import cores_here
from autopart.runtime.process_group import Group
from autopart.runtime.slices import gather, scatter_sum, sum_together

Tensor = torch.Tensor
Seconds = tuple[float, ...]


@dataclass(frozen=True)
class Sizes:
    """What is measured, and for how long.

    products   m, n and k of products, in every combination of at most `flops` FLOPs
    sequences, heads  of attention, in every combination;  flops_attention: of each, about
    streams    bytes that operators move;  messages: bytes of collectives;  parameters: bytes of a parameter
    held       bytes of results that are held
    window     seconds of a case in a round
    """

    products: tuple[int, ...]
    flops: float
    sequences: tuple[int, ...]
    heads: tuple[int, ...]
    flops_attention: float
    streams: tuple[int, ...]
    messages: tuple[int, ...]
    parameters: tuple[int, ...]
    held: int
    window: float


KIB, MIB = 2**10, 2**20
DIFFERENCES = 7
"""Of how many differences between seconds with messages and without the median is taken: each is small beside them."""
FULL: Mapping[str, Sizes] = {
    "cpu": Sizes(
        products=(16, 64, 256, 1024, 4096), flops=2.2e9, sequences=(64, 256, 1024), heads=(32, 64, 128),
        flops_attention=1.5e8, streams=(4 * KIB, 64 * KIB, MIB, 8 * MIB, 32 * MIB),
        messages=(4 * KIB, 128 * KIB, MIB, 8 * MIB, 32 * MIB), parameters=(4 * KIB, 256 * KIB, 4 * MIB, 16 * MIB),
        held=64 * MIB, window=0.04,
    ),
    "cuda": Sizes(
        products=(64, 256, 1024, 4096, 16384), flops=3e12, sequences=(256, 1024, 4096), heads=(64, 128),
        flops_attention=3e11, streams=(64 * KIB, MIB, 16 * MIB, 256 * MIB),
        messages=(64 * KIB, MIB, 16 * MIB, 256 * MIB), parameters=(64 * KIB, 4 * MIB, 64 * MIB), held=2**30,
        window=0.02,
    ),
}  # fmt: skip
QUICK: Mapping[str, Sizes] = {
    type_: Sizes(
        products=(64, 256), flops=full.flops, sequences=(64, 128), heads=(32,), flops_attention=1e7,
        streams=(4 * KIB, 256 * KIB), messages=(4 * KIB, 256 * KIB), parameters=(4 * KIB, 256 * KIB), held=MIB,
        window=0.002,
    )
    for type_, full in FULL.items()
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One thing to time: the table and the entry there that it is for, its sizes, and what makes a function that times
    it for a window and gives its seconds."""

    table: str
    entry: str
    sizes: tuple[float, ...]
    make: Callable[[], Callable[[], Seconds]]


@dataclass
class Found:
    """What was measured.

    cases   (table, entry, sizes) -> the seconds of every round, each the mean over ranks
    ranks, threads   as in `Measured`;  cores: that the ranks share
    """

    ranks: int
    threads: int
    cores: int
    cases: dict[tuple[str, str, tuple[float, ...]], list[Seconds]] = field(default_factory=lambda: defaultdict(list))


def measure(sizes: Sizes, dtypes: tuple[str, ...], rounds: int, device: torch.device) -> Found:
    """Time every case in every round."""
    bench = Bench(sizes, device)
    cases = [*bench.compute(dtypes), *bench.together()]
    found = Found(dist.get_world_size(), torch.get_num_threads(), cores_here())
    for case in (case for _ in range(rounds) for case in cases):
        timed = case.make()
        dist.barrier()
        seconds = torch.tensor(timed(), dtype=torch.float64)
        dist.all_reduce(seconds)
        mean = tuple((seconds / found.ranks).tolist())
        found.cases[case.table, case.entry, case.sizes].append(mean)
    return found


class Bench:
    """The cases of one rank."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.groups = {size: self._group(size) for size in divisors(self.ranks) if size > 1}
        self.up, self.down = (dist.new_group() for _ in range(2))

    def _group(self, size: int) -> Group:
        """This rank's group of so many neighbours."""
        for first in range(0, self.ranks, size):
            ranks = range(first, first + size)
            handle = dist.new_group(list(ranks))
            if self.rank in ranks:
                mine = Group("calibration", size, self.rank - first, handle)
        return mine

    # ---- timing -----------------------------------------------------------------------------------------------------

    def _now(self) -> float:
        """The time once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _apart(self, forward: Callable[[], Tensor], inputs: list[Tensor], results: int) -> Callable[[], Seconds]:
        """Time `forward` and its backward apart, `results` calls of each at a time."""

        def timed() -> Seconds:
            there = back = 0.0
            count, gradients = -1, list[Tensor]()
            while count < 1 or there + back < self.sizes.window:
                if count == 0:
                    there = back = 0.0
                begun = self._now()
                outputs = [forward() for _ in range(results)]
                turned = self._now()
                gradients = gradients or [torch.ones_like(output) for output in outputs]
                paused = self._now()
                for output, gradient in zip(outputs, gradients, strict=True):
                    torch.autograd.grad(output, inputs, gradient)
                ended = self._now()
                there, back, count = there + turned - begun, back + ended - paused, count + 1
            return there / (count * results), back / (count * results)

        return timed

    def _repeated(self, run: Callable[[], Any], held: int) -> Callable[[], Seconds]:
        """Time `run`, whose last `held` results are kept."""

        def timed() -> Seconds:
            kept: list[Any] = [None] * held
            kept[0] = run()
            count, started = 0, self._now()
            while count < 2 or (now := self._now()) - started < self.sizes.window:
                for _ in range(max(1, count // 4)):
                    kept[count % held] = run()
                    count += 1
                now = self._now()
            return ((now - started) / count,)

        return timed

    def _equally(self, run: Callable[[], Any]) -> Callable[[], Seconds]:
        """Time `run`, equally often on all ranks."""

        def timed() -> Seconds:
            run()
            started = self._now()
            run()
            longest = torch.tensor(self._now() - started)
            dist.all_reduce(longest, dist.ReduceOp.MAX)
            count = min(max(2, int(self.sizes.window / longest.item())), 200)
            dist.barrier()
            started = self._now()
            for _ in range(count):
                run()
            return ((self._now() - started) / count,)

        return timed

    def _held(self, nbytes: float) -> int:
        """How many results of so many bytes are held."""
        return max(1, min(16, int(self.sizes.held / nbytes)))

    # ---- cases ------------------------------------------------------------------------------------------------------

    def compute(self, dtypes: tuple[str, ...]) -> Iterator[Case]:
        """What each rank does for itself."""
        for name in dtypes:
            dtype = getattr(torch, name)
            for m, n, k in itertools.product(self.sizes.products, repeat=3):
                if 2.0 * m * n * k <= self.sizes.flops:
                    yield Case("products", name, (m, n, k), partial(self._product, m, n, k, dtype))
            for length, head, causal in itertools.product(self.sizes.sequences, self.sizes.heads, (0, 1)):
                sizes = length, head, causal
                yield Case("attention", name, sizes, partial(self._attention, *sizes, dtype))
        dtype = getattr(torch, dtypes[0])
        for (kind, make), nbytes in itertools.product(OPERATORS.items(), self.sizes.streams):
            yield Case("operators", kind, (nbytes,), partial(self._operator, make, nbytes, dtype))
        for optimizer, nbytes in itertools.product(OPTIMIZERS, self.sizes.parameters):
            yield Case("updates", optimizer, (nbytes,), partial(self._update, OPTIMIZERS[optimizer], nbytes))
        for nbytes in self.sizes.parameters:
            yield Case("accumulate", "", (nbytes,), partial(self._accumulate, nbytes))

    def _randn(self, *shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
        return torch.randn(*shape, device=self.device).to(dtype).requires_grad_(grad)

    def _product(self, m: int, n: int, k: int, dtype: torch.dtype) -> Callable[[], Seconds]:
        """In turn as products lie forward, and in the gradients of either factor."""
        x, w, v = (self._randn(*shape, dtype=dtype) for shape in ((m, k), (n, k), (k, n)))
        y = self._randn(k, m, dtype=dtype)
        turns = itertools.cycle([lambda: x @ w.t(), lambda: x @ v, lambda: y.t() @ v])
        return self._repeated(lambda: next(turns)(), self._held(m * n * dtype.itemsize))

    def _attention(self, length: int, head: int, causal: int, dtype: torch.dtype) -> Callable[[], Seconds]:
        flops = 4.0 * length * length * head * (0.5 if causal else 1.0)
        many = max(1, round(self.sizes.flops_attention / flops))
        q, k, v = (self._randn(1, many, length, head, dtype=dtype, grad=True) for _ in range(3))
        timed = self._apart(
            lambda: F.scaled_dot_product_attention(q, k, v, is_causal=bool(causal)), [q, k, v], self._held(q.nbytes)
        )

        def each() -> Seconds:
            return tuple(seconds / (many * flops) for seconds in timed())

        return each

    def _operator(self, make: Callable[..., Any], nbytes: int, dtype: torch.dtype) -> Callable[[], Seconds]:
        forward, inputs = make(self._randn, nbytes, dtype)
        return self._apart(forward, inputs, self._held(nbytes))

    def _update(self, make: Callable[..., torch.optim.Optimizer], nbytes: int) -> Callable[[], Seconds]:
        parameters = [nn.Parameter(self._randn(nbytes // 4)) for _ in range(self._held(4 * nbytes))]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        timed = self._repeated(make(parameters, lr=1e-6).step, 1)
        return lambda: (timed()[0] / len(parameters),)

    def _accumulate(self, nbytes: int) -> Callable[[], Seconds]:
        sums = [self._randn(nbytes // 4) for _ in range(self._held(2 * nbytes))]
        more = [torch.ones_like(total) for total in sums]
        turns = itertools.cycle(zip(sums, more, strict=True))

        def add() -> None:
            total, gradient = next(turns)
            total.add_(gradient)

        return self._repeated(add, 1)

    def together(self) -> Iterator[Case]:
        """What ranks do together; and what a rank does while others idle, or while messages are on their way."""
        for (size, group), nbytes in itertools.product(self.groups.items(), self.sizes.messages):
            for name, run in COLLECTIVES.items():
                yield Case(name, str(size), (nbytes,), partial(self._collective, run, group, nbytes))
        for nbytes in self.sizes.messages if self.ranks > 1 else ():
            yield Case("p2p", "", (nbytes,), partial(self._message, nbytes))
        yield Case("alone", "", (), self._alone)
        yield Case("overlap", "", (), self._overlap)

    def _collective(self, run: Callable[[Tensor, Group], Any], group: Group, nbytes: int) -> Callable[[], Seconds]:
        """One after the other, or what each adds to a product before it, whichever is longer: ranks that share cores
        do not reach a collective at the same time."""
        x, work = self._randn(group.size, nbytes // 4 // group.size), self._work()
        alone, before, without = (
            self._equally(each) for each in (lambda: run(x, group), lambda: (work(), run(x, group)), work)
        )
        return lambda: (max(alone()[0], before()[0] - without()[0]),)

    def _message(self, nbytes: int) -> Callable[[], Seconds]:
        """Half of what an exchange between ranks in pairs takes, alone or beside the product that they compute before
        it, whichever is longer: as stages of a pipeline exchange a value and a gradient, in a group for either
        direction. One left over computes."""
        other, pairs = self.rank ^ 1, self.ranks - self.ranks % 2
        there, back = (self.up, self.down) if self.rank < other else (self.down, self.up)
        sent, work = self._randn(nbytes // 4), self._work()
        received = torch.empty_like(sent)

        def exchange(before: Callable[[], Any]) -> None:
            messages = [dist.irecv(received, other, group=back)] if self.rank < pairs else []
            before()
            messages += [dist.isend(sent, other, group=there)] if self.rank < pairs else []
            for message in messages:
                assert message is not None
                message.wait()

        alone, beside, without = (
            self._equally(each) for each in (lambda: exchange(lambda: None), lambda: exchange(work), work)
        )

        def half() -> Seconds:
            more = statistics.median(beside()[0] - without()[0] for _ in range(DIFFERENCES))
            seconds = max(alone()[0], more) / 2
            return (seconds * self.ranks / pairs if self.rank < pairs else 0.0,)

        return half

    def _work(self) -> Callable[[], Any]:
        """A product that takes a while, for what else there is to be compared."""
        size = self.sizes.products[-1] // 4 if len(self.sizes.products) > 2 else self.sizes.products[-1]
        x, y = self._randn(size, size), self._randn(size, size // 4)
        return lambda: x @ y

    def _alone(self) -> Callable[[], Seconds]:
        """How many times as fast rank 0 computes while the others wait; every rank says the same."""
        timed = self._repeated(self._work(), 1)

        def both() -> Seconds:
            busy = timed()[0]
            dist.barrier()
            ratio = torch.tensor(busy / timed()[0] if self.rank == 0 else 0.0)
            dist.all_reduce(ratio)
            return (ratio.item(),)

        return both

    def _overlap(self) -> Callable[[], Seconds]:
        """How many times as long a product takes while an all-reduce is on its way."""
        work, message = self._work(), self._randn(self.sizes.messages[-1] // 4)
        group = self.groups.get(self.ranks)

        def seconds(beside: bool) -> float:
            total = 0.0
            for _ in range(8):
                sent = dist.all_reduce(message, group=group.handle, async_op=True) if beside and group else None
                started = self._now() if self.device.type == "cpu" else time.perf_counter()
                work()
                if self.device.type == "cuda":
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

WIDTH = 1024
"""Elements of the dim along which operators normalise or sum."""

Made = tuple[Callable[[], Tensor], list[Tensor]]


def _rows(randn: Any, nbytes: float, dtype: torch.dtype, width: int = WIDTH) -> Tensor:
    """A tensor of so many bytes, of rows of `width` elements or one shorter row, through which gradients flow."""
    elements = max(8, int(nbytes / dtype.itemsize))
    wide = min(width, elements)
    tensor: Tensor = randn(elements // wide, wide, dtype=dtype, grad=True)
    return tensor


def _unary(function: Callable[[Tensor], Tensor], share: float = 0.5) -> Callable[..., Made]:
    """An operator of one tensor, which is `share` of what it reads and writes."""

    def make(randn: Any, nbytes: int, dtype: torch.dtype) -> Made:
        x = _rows(randn, nbytes * share, dtype)
        return lambda: function(x), [x]

    return make


def _stream(randn: Any, nbytes: int, dtype: torch.dtype) -> Made:
    x = _rows(randn, nbytes / 3, dtype)
    y = torch.ones_like(x)
    return lambda: x * y, [x]


def _norm(randn: Any, nbytes: int, dtype: torch.dtype) -> Made:
    x = _rows(randn, nbytes / 2, dtype)
    weight, bias = (randn(x.shape[1], dtype=dtype, grad=True) for _ in range(2))
    return lambda: F.layer_norm(x, x.shape[1:], weight, bias), [x, weight, bias]


def _cross_entropy(randn: Any, nbytes: int, dtype: torch.dtype) -> Made:
    """Of logits over 4096 words, as the runtime takes it."""
    x = _rows(randn, nbytes, dtype, 4096)
    targets = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    return lambda: F.cross_entropy(x, targets, reduction="sum"), [x]


def _embedding(randn: Any, nbytes: int, dtype: torch.dtype) -> Made:
    """As many words looked up as make a quarter of the table."""
    table = _rows(randn, nbytes * 0.8, dtype, 512)
    ids = torch.arange(max(1, table.shape[0] // 4), device=table.device) * 4 % table.shape[0]
    return lambda: F.embedding(ids, table), [table]


OPERATORS: Mapping[str, Callable[..., Made]] = {
    "stream": _stream,
    "sum": _unary(lambda x: x.sum(-1), 1.0),
    "tanh": _unary(torch.tanh),
    "gelu": _unary(F.gelu),
    "silu": _unary(F.silu),
    "softmax": _unary(lambda x: x.softmax(-1)),
    "norm": _norm,
    "cross_entropy": _cross_entropy,
    "embedding": _embedding,
}
"""Kind, of `autopart.cost.measured_tables.KINDS`, -> what stands for it."""

OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
"""Those of `autopart.cost.training_state.OPTIMIZER_STATES`."""


def _split(x: Tensor, group: Group) -> list[Tensor]:
    """A message of several parameters, as they travel together."""
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
"""Collectives as the runtime runs them, on x of (ranks, n)."""
