"""Pipeline schedules as data: the instructions of every stage, their verifier and their simulator.

A schedule is a static list of instructions for each stage. Sends are non-blocking, receives block, and
activations and gradients travel on separate channels that each keep the order of their messages.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from autopart.errors import PartitionError


class Op(StrEnum):
    """What one instruction does."""

    FORWARD = "forward"
    BACKWARD = "backward"
    SEND = "send"
    RECV = "recv"
    SEND_GRAD = "send_grad"
    RECV_GRAD = "recv_grad"
    REDUCE = "reduce"
    STEP = "step"


@dataclass(frozen=True, slots=True)
class Instruction:
    """One step of one stage; `micro_batch` is -1 for REDUCE and STEP, `peer` -1 for all but messages."""

    op: Op
    stage: int
    micro_batch: int = -1
    peer: int = -1

    def __str__(self) -> str:
        batch = f" micro-batch {self.micro_batch}" if self.micro_batch >= 0 else ""
        peer = f" {_TOWARDS[self.op]} stage {self.peer}" if self.op in _TOWARDS else ""
        return f"stage {self.stage} {self.op.name}{batch}{peer}"


Order = list[tuple[Op, int]]
Link = tuple[Op, int, int]

_RECEIVE_OF = {Op.SEND: Op.RECV, Op.SEND_GRAD: Op.RECV_GRAD}
_SEND_OF = {receive: send for send, receive in _RECEIVE_OF.items()}
_TOWARDS = dict.fromkeys(_RECEIVE_OF, "to") | dict.fromkeys(_SEND_OF, "from")
_FOLLOWS = {Op.BACKWARD: Op.FORWARD, Op.SEND: Op.FORWARD, Op.SEND_GRAD: Op.BACKWARD}
_PRECEDES = {Op.FORWARD: Op.BACKWARD, Op.RECV: Op.FORWARD, Op.RECV_GRAD: Op.BACKWARD}
_CLOSING = (Op.REDUCE, Op.STEP)
_HELD = {Op.FORWARD: 1, Op.BACKWARD: -1}


def gpipe(stage: int, stages: int, micro_batches: int) -> Order:
    """All forwards, then all backwards (Huang et al., GPipe, arXiv 1811.06965).

    The backwards run in ascending order, so that gradients add up in the order of a plain loop over
    micro-batches; the paper's descending order takes the same time and memory.
    """
    return [(op, batch) for op in (Op.FORWARD, Op.BACKWARD) for batch in range(micro_batches)]


def one_f_one_b(stage: int, stages: int, micro_batches: int) -> Order:
    """Warm-up forwards, then one forward and one backward in turn, then the backwards left over.

    The warm-up of `stage` is min(micro_batches, stages - 1 - stage) forwards (Narayanan et al.,
    PipeDream-Flush, arXiv 2006.09503).
    """
    warm_up = min(micro_batches, stages - 1 - stage)
    order = [(Op.FORWARD, batch) for batch in range(warm_up)]
    for batch in range(micro_batches):
        if warm_up + batch < micro_batches:
            order.append((Op.FORWARD, warm_up + batch))
        order.append((Op.BACKWARD, batch))
    return order


SCHEDULES: dict[str, Callable[[int, int, int], Order]] = {"gpipe": gpipe, "1f1b": one_f_one_b}


HELD: dict[str, Callable[[int, int, int], int]] = {
    "gpipe": lambda stage, stages, micro_batches: micro_batches,
    "1f1b": lambda stage, stages, micro_batches: min(micro_batches, stages - stage),
}
"""(stage, stages, micro-batches) -> how many micro-batches a stage holds at most."""


def compute_order(schedule: str, stage: int, stages: int, micro_batches: int) -> Order:
    """The forwards and backwards of `stage` under the named schedule.

    Raises PartitionError for an unknown schedule, a stage outside the pipeline, or no micro-batches.
    """
    if schedule not in SCHEDULES:
        raise PartitionError(f"unknown schedule {schedule!r}", try_=f"use one of {', '.join(SCHEDULES)}")
    if not 0 <= stage < stages:
        raise PartitionError(f"stage {stage} is not one of {stages} stages")
    if micro_batches < 1:
        raise PartitionError(f"{micro_batches} micro-batches", why="a pipeline step needs at least one")
    return SCHEDULES[schedule](stage, stages, micro_batches)


def in_flight(schedule: str, stage: int, stages: int, micro_batches: int) -> int:
    """Most micro-batches whose activations `stage` holds at once, counted along its compute order.

    A second turn of a pipeline holds no more than the first, so that of many micro-batches HELD says the number.
    Raises PartitionError as `compute_order` does.
    """
    if schedule in HELD and micro_batches > 2 * stages:
        return HELD[schedule](stage, stages, micro_batches)
    return _peak(op for op, _ in compute_order(schedule, stage, stages, micro_batches))


def on_its_way(takes: Any, in_flight: int, micro_batches: int) -> Any:
    """Bytes that a stage has ready for messages when most is alive, of those that it takes from others for a
    micro-batch: most is alive in a backward, and where not all micro-batches are in flight a forward is next (`ahead`).
    """
    return takes * (micro_batches > in_flight)


def instructions(
    schedule: str, stages: int, micro_batches: int, edges: Iterable[tuple[int, int]]
) -> list[list[Instruction]]:
    """The instruction list of every stage.

    `edges` are (producer stage, consumer stage) pairs with producer < consumer, which may skip stages; a
    repeated pair counts once. A forward receives from every producer and sends to every consumer, from
    the first stage on; its backward does the reverse, from the last stage on: what is there first goes first.
    REDUCE and STEP close the list.

    Raises PartitionError for fewer than one stage, an edge that does not lead to a later stage of the
    pipeline, and as `compute_order` does.
    """
    if stages < 1:
        raise PartitionError(f"{stages} stages", why="a pipeline needs at least one")
    inputs: list[list[int]] = [[] for _ in range(stages)]
    outputs: list[list[int]] = [[] for _ in range(stages)]
    for producer, consumer in sorted(set(edges)):
        if not 0 <= producer < consumer < stages:
            raise PartitionError(
                f"edge from stage {producer} to stage {consumer}",
                why=f"an edge leads to a later one of the {stages} stages",
            )
        inputs[consumer].append(producer)
        outputs[producer].append(consumer)

    lists = []
    for stage in range(stages):
        messages = {
            Op.FORWARD: (Op.RECV, inputs[stage], Op.SEND, outputs[stage]),
            Op.BACKWARD: (Op.RECV_GRAD, outputs[stage][::-1], Op.SEND_GRAD, inputs[stage][::-1]),
        }
        program: list[Instruction] = []
        for op, batch in compute_order(schedule, stage, stages, micro_batches):
            receive, sources, send, targets = messages[op]
            program += [Instruction(receive, stage, batch, peer) for peer in sources]
            program.append(Instruction(op, stage, batch))
            program += [Instruction(send, stage, batch, peer) for peer in targets]
        lists.append(program + [Instruction(op, stage) for op in _CLOSING])
    return lists


def ahead(program: Sequence[Instruction]) -> dict[Instruction, list[Instruction]]:
    """Every computation of a stage -> the receives that the next one waits for, where it goes the other way: what to be
    ready for when it begins. Of the same way, what it sends must go first: where messages of one way go one after the
    other, as on one communicator of NCCL, stages would wait for each other."""
    found: dict[Instruction, list[Instruction]] = {}
    computation = None
    for at in program:
        if at.op in _HELD:
            computation = at
            found[at] = []
        elif computation and at.op in _SEND_OF and _PRECEDES[at.op] != computation.op:
            found[computation].append(at)
    return found


def verify(lists: Sequence[Sequence[Instruction]]) -> None:
    """Check the lists of all stages before anything starts.

    Every stage computes micro-batches 0 to m - 1, each with one forward and one backward after it, inputs
    received before and outputs sent after the computation, one REDUCE after the last backward and one STEP
    last. On every channel from one stage to another, sends and receives carry the same micro-batches, all
    of them, in the same order. No stages wait for each other in a cycle.

    Raises PartitionError naming the first instruction at fault; for a cycle, every stage of the cycle and
    the receive it is blocked at.
    """
    micro_batches = {entry.micro_batch for program in lists for entry in program if entry.op is Op.FORWARD}
    if not micro_batches:
        raise PartitionError("no stage has a FORWARD", why="there is nothing to run")
    expected = set(range(max(micro_batches) + 1))
    for stage, program in enumerate(lists):
        _verify_stage(stage, program, expected)
    _verify_links(lists, expected)
    deque(_walk(lists), maxlen=0)


@dataclass(frozen=True, slots=True)
class Timeline:
    """What a simulated step takes.

    `seconds` is the time from the first instruction to the last end. `busy_seconds` is, by stage, the time
    in FORWARD, BACKWARD, REDUCE and STEP. `bubble` is 1 - mean(busy_seconds) / span, where span is the
    longest time over stages from the start of a stage's first such instruction to the end of its last; for
    equal stages it is the bubble rate of Qi et al., Zero Bubble Pipeline Parallelism, arXiv 2401.10241.
    `peak_in_flight` is, by stage, the most micro-batches held at once. `events` are (stage, instruction,
    start, end) in seconds by start: a send ends when its message arrives, a receive starts when posted.
    """

    seconds: float
    busy_seconds: tuple[float, ...]
    bubble: float
    peak_in_flight: tuple[int, ...]
    events: tuple[tuple[int, Instruction, float, float], ...]


def simulate(
    lists: Sequence[Sequence[Instruction]],
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    send_seconds: Mapping[tuple[int, int], float],
    sync_seconds: Sequence[float] = (),
    step_seconds: Sequence[float] = (),
) -> Timeline:
    """Run verified lists on a clock.

    By stage, `forward_seconds` and `backward_seconds` are for one micro-batch, `sync_seconds` for REDUCE
    and `step_seconds` for STEP (empty: zero). `send_seconds[(producer, consumer)]` is the latency of the
    tensors of an edge, the same in both directions; messages of one link overlap, as a latency does.

    Raises PartitionError for a duration list of another length than `lists`, an edge without a latency,
    and a stage that waits for ever.
    """
    stages = len(lists)
    seconds_of = {
        Op.FORWARD: forward_seconds,
        Op.BACKWARD: backward_seconds,
        Op.REDUCE: sync_seconds or [0.0] * stages,
        Op.STEP: step_seconds or [0.0] * stages,
    }
    for op, durations in seconds_of.items():
        if len(durations) != stages:
            raise PartitionError(f"{len(durations)} durations of {op.name} for {stages} stages")

    clock = [0.0] * stages
    busy = [0.0] * stages
    first = [float("inf")] * stages
    arrivals: defaultdict[Link, deque[float]] = defaultdict(deque)
    events: list[tuple[int, Instruction, float, float]] = []
    for entry in _walk(lists):
        stage = entry.stage
        start = end = clock[stage]
        if entry.op in _RECEIVE_OF:
            end = start + _latency(send_seconds, entry)
            arrivals[_link(entry)].append(end)
        elif entry.op in _SEND_OF:
            clock[stage] = end = max(start, arrivals[_link(entry)].popleft())
        else:
            seconds = seconds_of[entry.op][stage]
            clock[stage] = end = start + seconds
            busy[stage] += seconds
            first[stage] = min(first[stage], start)
        events.append((stage, entry, start, end))

    span = max((end - start for start, end in zip(first, clock, strict=True)), default=0.0)
    return Timeline(
        seconds=max(clock, default=0.0),
        busy_seconds=tuple(busy),
        bubble=1 - sum(busy) / (stages * span) if span > 0 else 0.0,
        peak_in_flight=tuple(_peak(entry.op for entry in program) for program in lists),
        events=tuple(sorted(events, key=lambda event: event[2])),
    )


def _peak(ops: Iterable[Op]) -> int:
    held = peak = 0
    for op in ops:
        held += _HELD.get(op, 0)
        peak = max(peak, held)
    return peak


def _latency(send_seconds: Mapping[tuple[int, int], float], entry: Instruction) -> float:
    edge = (min(entry.stage, entry.peer), max(entry.stage, entry.peer))
    if edge not in send_seconds:
        raise PartitionError(f"{entry} has no latency", try_=f"give send_seconds[{edge}]")
    return send_seconds[edge]


def _link(entry: Instruction) -> Link:
    """The channel, sender and receiver of a message; a channel goes by the name of its receives."""
    if entry.op in _RECEIVE_OF:
        return _RECEIVE_OF[entry.op], entry.stage, entry.peer
    return entry.op, entry.peer, entry.stage


def _verify_stage(stage: int, program: Sequence[Instruction], expected: set[int]) -> None:
    position: dict[Instruction, int] = {}
    for index, entry in enumerate(program):
        if entry.stage != stage:
            raise PartitionError(f"{entry} is in the list of stage {stage}")
        if (entry.op not in _TOWARDS and entry.peer != -1) or (entry.op in _CLOSING and entry.micro_batch != -1):
            raise PartitionError(f"{entry} has a peer or a micro-batch that its operation does not take")
        if entry in position:
            raise PartitionError(f"{entry} appears twice", why=f"at {position[entry]} and at {index}")
        position[entry] = index

    computed = {entry.micro_batch for entry in program if entry.op is Op.FORWARD}
    for batch in sorted(computed ^ expected):
        verb = "is missing" if batch in expected else "has no such micro-batch"
        raise PartitionError(f"{Instruction(Op.FORWARD, stage, batch)} {verb}")

    for entry, index in position.items():
        if entry.op in _FOLLOWS:
            earlier = Instruction(_FOLLOWS[entry.op], stage, entry.micro_batch)
            if position.get(earlier, index) >= index:
                raise PartitionError(f"{entry} has no {earlier.op.name} before it")
        if entry.op in _PRECEDES:
            later = Instruction(_PRECEDES[entry.op], stage, entry.micro_batch)
            if position.get(later, index) <= index:
                raise PartitionError(f"{entry} has no {later.op.name} after it")

    reduce, step = Instruction(Op.REDUCE, stage), Instruction(Op.STEP, stage)
    last = max((entry for entry in program if entry.op is Op.BACKWARD), key=position.__getitem__)
    if position.get(reduce, -1) < position[last]:
        raise PartitionError(f"{reduce} is missing after {last}", why="it reduces finished gradients")
    if position.get(step, -1) != len(program) - 1:
        raise PartitionError(f"{step} is not last", why=f"the list ends with {program[-1]}")


def _verify_links(lists: Sequence[Sequence[Instruction]], expected: set[int]) -> None:
    sends: defaultdict[Link, list[Instruction]] = defaultdict(list)
    receives: defaultdict[Link, list[Instruction]] = defaultdict(list)
    for entry in (entry for program in lists for entry in program):
        if entry.op in _RECEIVE_OF:
            sends[_link(entry)].append(entry)
        elif entry.op in _SEND_OF:
            receives[_link(entry)].append(entry)

    for op, sender, receiver in sorted(sends.keys() | receives.keys()):
        sent, received = sends[op, sender, receiver], receives[op, sender, receiver]
        have = {*sent, *received}
        for batch in sorted(expected.union(entry.micro_batch for entry in have)):
            send = Instruction(_SEND_OF[op], sender, batch, receiver)
            receive = Instruction(op, receiver, batch, sender)
            for missing, other in ((send, receive), (receive, send)):
                if missing not in have:
                    cause = f"nothing pairs with {other}" if other in have else "its link skips a micro-batch"
                    raise PartitionError(f"{missing} is missing", why=cause)
        for send, receive in zip(sent, received, strict=True):
            if send.micro_batch != receive.micro_batch:
                raise PartitionError(f"{receive} is out of order", why=f"the message it gets is of {send}")


def _walk(lists: Sequence[Sequence[Instruction]]) -> Iterator[Instruction]:
    """All instructions in an order in which every receive comes after its send.

    As sends do not block, the order in which stages take turns changes neither what can run nor when.
    Raises PartitionError, after the instructions that can run, if a stage is left waiting.
    """
    position = [0] * len(lists)
    pending: Counter[Link] = Counter()
    waiting: set[Link] = set()
    ready = deque(range(len(lists)))
    while ready:
        stage = ready.popleft()
        while position[stage] < len(lists[stage]):
            entry = lists[stage][position[stage]]
            if entry.op in _SEND_OF:
                link = _link(entry)
                if not pending[link]:
                    waiting.add(link)
                    break
                pending[link] -= 1
            position[stage] += 1
            yield entry
            if entry.op in _RECEIVE_OF:
                link = _link(entry)
                pending[link] += 1
                if link in waiting:
                    waiting.remove(link)
                    ready.append(entry.peer)

    blocked = {stage: lists[stage][at] for stage, at in enumerate(position) if at < len(lists[stage])}
    if blocked:
        raise _deadlock(blocked)


def _deadlock(blocked: Mapping[int, Instruction]) -> PartitionError:
    stage = min(blocked)
    chain: list[int] = []
    while stage in blocked and stage not in chain:
        chain.append(stage)
        stage = blocked[stage].peer
    if stage not in blocked:
        return PartitionError(f"{blocked[chain[-1]]} waits for ever", why=f"stage {stage} sends no more")
    cycle = chain[chain.index(stage) :]
    return PartitionError(
        f"{blocked[stage]} waits for ever",
        why=f"these wait for each other: {'; '.join(str(blocked[member]) for member in cycle)}",
        try_="move the receives after the sends that their senders wait for",
    )
