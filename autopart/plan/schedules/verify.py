"""Checks the instructions of all stages before anything starts, and orders them so that each can run."""

from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence

from autopart.errors import PartitionError
from autopart.plan.schedules.ops import (
    MESSAGES,
    MUST_FOLLOW,
    MUST_PRECEDE,
    ONCE_A_STEP,
    RECEIVE_OF,
    SEND_OF,
    Channel,
    Instruction,
    Op,
    channel,
)


def verify(lists: Sequence[Sequence[Instruction]]) -> None:
    """Check the instruction lists of all stages.

    - Every stage computes micro-batches 0 to m - 1, each with one forward and one backward after it.
    - Inputs are received before a computation, outputs are sent after it.
    - One REDUCE follows the last backward, one STEP is last.
    - The sends and receives of a channel carry the same micro-batches, all of them, in the same order.
    - No stages wait for each other in a cycle.

    Raises PartitionError with the first instruction at fault; for a cycle, with every stage of the cycle and the
    receive at which it is blocked.
    """
    micro_batches = {entry.micro_batch for program in lists for entry in program if entry.op is Op.FORWARD}
    if not micro_batches:
        raise PartitionError("no stage has a FORWARD", why="there is nothing to run")
    expected = set(range(max(micro_batches) + 1))
    for stage, program in enumerate(lists):
        _verify_stage(stage, program, expected)
    _verify_channels(lists, expected)
    deque(in_causal_order(lists), maxlen=0)


def _verify_stage(stage: int, program: Sequence[Instruction], expected: set[int]) -> None:
    position: dict[Instruction, int] = {}
    for index, entry in enumerate(program):
        if entry.stage != stage:
            raise PartitionError(f"{entry} is in the list of stage {stage}")
        if (entry.op not in MESSAGES and entry.peer != -1) or (entry.op in ONCE_A_STEP and entry.micro_batch != -1):
            raise PartitionError(f"{entry} has a peer or a micro-batch that its operation does not take")
        if entry in position:
            raise PartitionError(f"{entry} appears twice", why=f"at {position[entry]} and at {index}")
        position[entry] = index

    computed = {entry.micro_batch for entry in program if entry.op is Op.FORWARD}
    for batch in sorted(computed ^ expected):
        verb = "is missing" if batch in expected else "has no such micro-batch"
        raise PartitionError(f"{Instruction(Op.FORWARD, stage, batch)} {verb}")

    for entry, index in position.items():
        if entry.op in MUST_FOLLOW:
            earlier = Instruction(MUST_FOLLOW[entry.op], stage, entry.micro_batch)
            if position.get(earlier, index) >= index:
                raise PartitionError(f"{entry} has no {earlier.op.name} before it")
        if entry.op in MUST_PRECEDE:
            later = Instruction(MUST_PRECEDE[entry.op], stage, entry.micro_batch)
            if position.get(later, index) <= index:
                raise PartitionError(f"{entry} has no {later.op.name} after it")

    reduce, step = Instruction(Op.REDUCE, stage), Instruction(Op.STEP, stage)
    last = max((entry for entry in program if entry.op is Op.BACKWARD), key=position.__getitem__)
    if position.get(reduce, -1) < position[last]:
        raise PartitionError(f"{reduce} is missing after {last}", why="it reduces finished gradients")
    if position.get(step, -1) != len(program) - 1:
        raise PartitionError(f"{step} is not last", why=f"the list ends with {program[-1]}")


def _verify_channels(lists: Sequence[Sequence[Instruction]], expected: set[int]) -> None:
    sends: defaultdict[Channel, list[Instruction]] = defaultdict(list)
    receives: defaultdict[Channel, list[Instruction]] = defaultdict(list)
    for entry in (entry for program in lists for entry in program):
        if entry.op in RECEIVE_OF:
            sends[channel(entry)].append(entry)
        elif entry.op in SEND_OF:
            receives[channel(entry)].append(entry)

    for op, sender, receiver in sorted(sends.keys() | receives.keys()):
        sent, received = sends[op, sender, receiver], receives[op, sender, receiver]
        have = {*sent, *received}
        for batch in sorted(expected.union(entry.micro_batch for entry in have)):
            send = Instruction(SEND_OF[op], sender, batch, receiver)
            receive = Instruction(op, receiver, batch, sender)
            for missing, other in ((send, receive), (receive, send)):
                if missing not in have:
                    cause = f"nothing pairs with {other}" if other in have else "its channel skips a micro-batch"
                    raise PartitionError(f"{missing} is missing", why=cause)
        for send, receive in zip(sent, received, strict=True):
            if send.micro_batch != receive.micro_batch:
                raise PartitionError(f"{receive} is out of order", why=f"the message it gets is of {send}")


def in_causal_order(lists: Sequence[Sequence[Instruction]]) -> Iterator[Instruction]:
    """All instructions in an order in which every receive comes after its send.

    Sends do not block, so that the order in which stages are visited changes neither what can run nor when.
    Raises PartitionError, after the instructions that can run, where a stage waits for a message that is never sent.
    """
    position = [0] * len(lists)
    pending: Counter[Channel] = Counter()
    waiting: set[Channel] = set()
    ready = deque(range(len(lists)))
    while ready:
        stage = ready.popleft()
        while position[stage] < len(lists[stage]):
            entry = lists[stage][position[stage]]
            if entry.op in SEND_OF:
                at = channel(entry)
                if not pending[at]:
                    waiting.add(at)
                    break
                pending[at] -= 1
            position[stage] += 1
            yield entry
            if entry.op in RECEIVE_OF:
                at = channel(entry)
                pending[at] += 1
                if at in waiting:
                    waiting.remove(at)
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
