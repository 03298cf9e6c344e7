"""The bytes that a stage's collectives and messages move in a step, for each axis and collective."""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from torch import fx

from autopart.cost.position_costs import Crossings
from autopart.cost.training_state import Training, collectives_per_step
from autopart.ir.graph import info
from autopart.passes.price_stage import PricedSegment
from autopart.passes.stage_graph import ShardingAssignment
from autopart.plan.stages import StageTraffic
from autopart.planner.candidate import SearchResult
from autopart.planner.search_space import SearchSpace
from autopart.planner.stage_parameters import Parameter, distinct, parameters


def collectives_of(
    counted: Iterable[tuple[PricedSegment, str]], read: Sequence[Parameter], training: Training
) -> list[StageTraffic]:
    """The traffic of a stage's collectives over dp and tp, without messages and tied weights.

    counted   its segments, one for each position, with their checkpointing modes
    read      its parameters, each once
    """
    total = defaultdict[tuple[str, str], float](float)
    for segment, mode in counted:
        for moved in (segment.moved, segment.moved_again[mode], _of_slices(segment, mode, training)):
            for key, nbytes in moved.items():
                total[key] += nbytes * training.micro_batches
    for parameter in read:
        for key, nbytes in _of_parameter(parameter, training).items():
            total[key] += nbytes
    return [StageTraffic(axis, name, round(nbytes)) for (axis, name), nbytes in sorted(total.items()) if nbytes]


def _of_slices(segment: PricedSegment, mode: str, training: Training) -> dict[tuple[str, str], float]:
    """The traffic at ZeRO 3 of a segment's parameters for a micro-batch: each segment that reads a parameter gathers
    it, backward gathers it again but for the words of an embedding, which no backward reads, and the gradient is
    reduced for each segment alone. Biases, which backward does not read either, count as if it did."""
    found, axis = defaultdict[tuple[str, str], float](float), _axis(training)
    readers = defaultdict[fx.Node, list[str]](list)
    for node in segment.nodes:
        for n in node.all_input_nodes:
            readers[n] += [info(node).name] if info(n).kind == "parameter" else []
    for node, names in readers.items():
        record = info(node)
        if names and record.grad and training.sliced(dict(record.placed).get("dp") == "C"):
            again = mode != "none" or not all("embedding" in name for name in names)
            found[axis, "all_gather"] += (1 + again) * record.size
            found[axis, "reduce_scatter"] += record.size * training.widening
            if training.replicas:  # once a step
                slices = training.divided.ranks * training.micro_batches
                found["replicas", "all_reduce"] += record.size * training.widening / slices
    return found


def _axis(training: Training) -> str:
    """The ranks that ZeRO divides among, by the name that `StageTraffic` has for them."""
    return "shard" if training.shard else "dp"


def _of_parameter(parameter: Parameter, training: Training) -> dict[tuple[str, str], float]:
    """The traffic of a parameter's gradient and new value that is no `_of_slices`, as `Training.sync_seconds` prices
    it."""
    found = defaultdict[tuple[str, str], float](float)
    gradient = parameter.bytes * training.widening
    if parameter.over_dp and training.ranks > 1 and not training.sliced(True):
        gathers, scatters = collectives_per_step(training.zero, training.micro_batches)
        if training.zero:
            found[_axis(training), "all_gather"] = gathers * parameter.bytes
            found[_axis(training), "reduce_scatter"] = scatters * gradient
            if training.replicas:
                found["replicas", "all_reduce"] = gradient / training.divided.ranks
        else:
            found["dp", "all_reduce"] = gradient
    if parameter.over_tp:
        found["tp", "all_reduce"] = gradient / training.slices(parameter.over_dp)
    return found


def tied_of(read: Sequence[Parameter], stages_of: dict[str, tuple[int, ...]], training: Training) -> list[StageTraffic]:
    """The traffic of gradients that ranks of several stages add up: of weights that all of these read.

    stages_of  parameter -> the stages that read it
    """
    found = defaultdict[tuple[int, ...], float](float)
    for parameter in read:
        stages = stages_of[parameter.name]
        if len(stages) > 1 and parameter.record.grad:
            found[stages] += parameter.bytes * training.widening / training.slices(parameter.over_dp)
    return [StageTraffic("pp", "all_reduce", round(nbytes), stages) for stages, nbytes in sorted(found.items())]


def sends_of(
    space: SearchSpace, found: SearchResult, index: int, span: tuple[int, int]
) -> list[tuple[int, int, float]]:
    """(later stage, bytes, seconds) of the values that a stage sends; the seconds include their gradients, which are
    sent back."""
    total, seconds = Counter[int](), defaultdict[int, float](float)
    for to, crossings in _sent(space, found, index, span):
        total[to] += round(crossings.size)
        seconds[to] += crossings.seconds
    return [(to, size, seconds[to]) for to, size in sorted(total.items())]


def _sent(
    space: SearchSpace, found: SearchResult, index: int, span: tuple[int, int]
) -> Iterator[tuple[int, Crossings]]:
    """(later stage, a value) for every message that a stage sends."""
    costs = space.position_costs(found.point, found.chosen[index])
    for crossings in costs.crossings:
        ends = zip(crossings.producers.tolist(), crossings.consumers.tolist(), strict=True)
        pairs = {(p, bisect_right(found.starts, c) - 1) if crossings.one else (p, c) for p, c in ends}
        for producer, consumer in pairs:
            to = consumer if crossings.one else bisect_right(found.starts, consumer) - 1
            if span[0] <= producer < span[1] and to != index:
                yield to, crossings


def traffic_of(
    space: SearchSpace, found: SearchResult, choices: ShardingAssignment, counted: Sequence[tuple[PricedSegment, str]],
    index: int, span: tuple[int, int],
) -> Iterator[StageTraffic]:  # fmt: skip
    """What a stage's ranks move in a step."""
    training, readers = space.training(found.point), space.layered.readers
    read = distinct(parameters(space.layered, choices, span))
    stages = {p.name: tuple(sorted({bisect_right(found.starts, at) - 1 for at in readers[p.name]})) for p in read}
    yield from collectives_of(counted, read, training)
    yield from tied_of(read, stages, training)
    sent = Counter[int]()
    for to, crossings in _sent(space, found, index, span):
        sent[to] += round(crossings.size * (1 + crossings.grad))
    for to, nbytes in sorted(sent.items()):
        yield StageTraffic("pp", "send", nbytes * training.micro_batches, (index, to))
