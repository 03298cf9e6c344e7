"""A schedule with its messages: the instruction list of every stage."""

from collections.abc import Iterable, Sequence

from autopart.errors import PartitionError
from autopart.plan.schedules import compute_order
from autopart.plan.schedules.ops import IN_FLIGHT_CHANGE, MUST_PRECEDE, ONCE_A_STEP, SEND_OF, Instruction, Op


def instructions(
    schedule: str, stages: int, micro_batches: int, edges: Iterable[tuple[int, int]]
) -> list[list[Instruction]]:
    """The instruction list of every stage.

    edges  pairs (producer stage, consumer stage) with producer < consumer, which may skip stages; a repeated pair
           counts once

    A forward receives from every producer and sends to every consumer, the lowest stage first. Its backward receives
    from every consumer and sends to every producer, the highest stage first. REDUCE and STEP close the list.

    Raises PartitionError for fewer than one stage, for an edge that does not lead to a later stage of the pipeline,
    and as `compute_order` does.
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
        lists.append(program + [Instruction(op, stage) for op in ONCE_A_STEP])
    return lists


def receives_ahead(program: Sequence[Instruction]) -> dict[Instruction, list[Instruction]]:
    """Every computation of a stage -> the receives to post before it begins.

    These are the receives of the next computation, where that goes in the other direction (a forward after a backward,
    or the reverse). Receives of the same direction are not posted ahead: on one communicator of NCCL messages go one
    after the other, so that a receive posted before this stage's own send would make stages wait for each other.
    """
    found: dict[Instruction, list[Instruction]] = {}
    computation = None
    for at in program:
        if at.op in IN_FLIGHT_CHANGE:
            computation = at
            found[at] = []
        elif computation and at.op in SEND_OF and MUST_PRECEDE[at.op] != computation.op:
            found[computation].append(at)
    return found
