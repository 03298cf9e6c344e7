"""Instructions of a pipeline schedule, and which instruction of one stage pairs with which of another."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


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
    """One instruction of one stage. `micro_batch` is -1 for REDUCE and STEP, `peer` is -1 for all but messages."""

    op: Op
    stage: int
    micro_batch: int = -1
    peer: int = -1

    def __str__(self) -> str:
        batch = f" micro-batch {self.micro_batch}" if self.micro_batch >= 0 else ""
        peer = f" {MESSAGES[self.op]} stage {self.peer}" if self.op in MESSAGES else ""
        return f"stage {self.stage} {self.op.name}{batch}{peer}"


Order = list[tuple[Op, int]]
"""The computations of a stage in order: (FORWARD or BACKWARD, micro-batch)."""

Channel = tuple[Op, int, int]
"""What keeps messages in order: (the operation that receives, sending stage, receiving stage)."""

RECEIVE_OF = {Op.SEND: Op.RECV, Op.SEND_GRAD: Op.RECV_GRAD}
SEND_OF = {receive: send for send, receive in RECEIVE_OF.items()}
MESSAGES = dict.fromkeys(RECEIVE_OF, "to") | dict.fromkeys(SEND_OF, "from")
MUST_FOLLOW = {Op.BACKWARD: Op.FORWARD, Op.SEND: Op.FORWARD, Op.SEND_GRAD: Op.BACKWARD}
MUST_PRECEDE = {Op.FORWARD: Op.BACKWARD, Op.RECV: Op.FORWARD, Op.RECV_GRAD: Op.BACKWARD}
ONCE_A_STEP = (Op.REDUCE, Op.STEP)
IN_FLIGHT_CHANGE = {Op.FORWARD: 1, Op.BACKWARD: -1}
"""Computation -> by how many it changes the number of micro-batches in flight on its stage."""


def channel(message: Instruction) -> Channel:
    """The channel of a send or a receive."""
    if message.op in RECEIVE_OF:
        return RECEIVE_OF[message.op], message.stage, message.peer
    return message.op, message.peer, message.stage


def peak_in_flight(ops: Iterable[Op]) -> int:
    """The most micro-batches in flight at once along a stage's operations."""
    now = peak = 0
    for op in ops:
        now += IN_FLIGHT_CHANGE.get(op, 0)
        peak = max(peak, now)
    return peak
