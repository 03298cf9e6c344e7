"""Whose a stage's bytes are: every parameter's, every value's that backward needs, and those of the moment when most is
alive. What a plan says of a stage's memory is the sum of these.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from autopart.cost.intervals import place
from autopart.cost.training_state import OPTIMIZER_STATES
from autopart.ir.graph import Info, info
from autopart.ir.labels import is_block
from autopart.ir.layered_graph import LayeredGraph, used_parameters
from autopart.passes.stage_graph import OWNED, PRELUDE, PRELUDE_SEGMENT, ShardingAssignment, StageGraph, backward_of
from autopart.plan.schedules import receive_buffer_bytes
from autopart.plan.units import printed_name
from autopart.planner.branch_and_bound import SearchResult
from autopart.planner.interval_costs import crossed
from autopart.planner.search_space import SearchSpace
from autopart.sharding.notation import Placement

KINDS = ("parameters", "gradients", "optimizer", "activations", "messages", "transient")


@dataclass(frozen=True)
class Leaf:
    """Bytes on a rank of a stage: the label of the run that has them ("" for what several share), the parameter or
    operator, and one of KINDS."""

    block: str
    name: str
    kind: str
    bytes: float


Held = tuple[str, str, Info, tuple[Placement, ...], float]
"""A parameter: the label of the first run that reads it, its name there, its record, its placement along every axis,
its bytes on a rank."""


def totals(leaves: Iterable[Leaf]) -> dict[str, float]:
    """Bytes of every kind."""
    found = dict.fromkeys(KINDS, 0.0)
    for leaf in leaves:
        found[leaf.kind] += leaf.bytes
    return found


def parameters(layered: LayeredGraph, choices: ShardingAssignment, span: tuple[int, int]) -> Iterator[Held]:
    """The parameters of a stage, each once."""
    seen = set()
    for position in range(*span):
        for node in used_parameters(layered.segments[layered.sequence[position]]):
            name = layered.parameter_at(position, node)
            if name not in seen:
                seen.add(name)
                placed = choices.placements(layered, (node, 0), 0)
                yield layered.labels[position], name, info(node), placed, choices.size((node, 0), placed)


def sums(choices: ShardingAssignment, record: Info, placed: Sequence[Placement], axis: str) -> bool:
    """Whether a parameter's gradient is a partial sum over an axis."""
    names = [name for name, _ in choices.axes]
    return record.grad and axis in names and placed[names.index(axis)].kind == "C"


def leaves(
    space: SearchSpace,
    found: SearchResult,
    choices: ShardingAssignment,
    graph: StageGraph,
    span: tuple[int, int],
    modes: Sequence[str],
    index: int,
) -> list[Leaf]:
    """All bytes of a stage: the `index`-th, of the runs at the positions `span`, which do as `modes` say."""
    flights = space.in_flight(found.point, index)
    kept = [Leaf(k.block, k.name, k.kind, flights * k.bytes) for k in _kept(space.layered, graph, span, modes)]
    _, takes = messages(space, found, span, index)
    arriving = receive_buffer_bytes(takes, flights, space.micro_batches(found.point))
    moments = [*_backwards(space, found, choices, graph, span, modes, flights, _bytes(kept) / flights)]
    kept += [Leaf(PRELUDE, "of other stages, on its way", "messages", arriving)] if arriving else []
    gone = Leaf(PRELUDE, "activations and messages, gone by then", "transient", -_bytes(kept))
    made = _ending(space, found, choices, span)
    moments.append([Leaf(PRELUDE, "made at the end of a step", "transient", made), gone])
    most = max(moments, key=_bytes)
    return [*_owned(space, found, choices, span), *kept, *(most if _bytes(most) else ())]


def messages(space: SearchSpace, found: SearchResult, span: tuple[int, int], index: int) -> tuple[float, float]:
    """Of the `index`-th stage, of the positions `span`: seconds of a micro-batch's messages, and bytes of the values
    that it takes from others."""
    n = len(space.layered.labels)
    rows = crossed(space.weigh(found.point, found.chosen[index]).crossings, n)
    seconds, takes = (float(row[place(*span, n)]) for row in rows)
    return seconds, takes


def _owned(
    space: SearchSpace, found: SearchResult, choices: ShardingAssignment, span: tuple[int, int]
) -> Iterator[Leaf]:
    """Parameters, their gradients, and what the optimizer keeps for them."""
    training = space.training(found.point)
    states = OPTIMIZER_STATES[training.optimizer]
    for block, name, record, placed, nbytes in parameters(space.layered, choices, span):
        shared = sums(choices, record, placed, "dp")
        weight, gradient, optimizer = training.memory(nbytes, record.grad, shared)
        yield Leaf(block, name, "parameters", weight)
        yield Leaf(block, name, "gradients", gradient)
        copies = states + (training.widening > 1 and not training.sliced(shared))
        if copies > states:
            yield Leaf(block, f"{name}, master copy", "optimizer", optimizer / copies)
        yield Leaf(block, f"{name}, states", "optimizer", optimizer * states / max(copies, 1))


def _kept(layered: LayeredGraph, graph: StageGraph, span: tuple[int, int], modes: Sequence[str]) -> Iterator[Leaf]:
    """What is kept for backward, of one micro-batch."""
    named = {node.name: _operator(node) for node in layered.traced.graph.nodes if node.op != "output"}
    nodes = dict(zip(graph.indices, (mine for _, mine in graph.segments), strict=True))
    inside: dict[int, list[tuple[str, float]]] = defaultdict(list)
    for (key, _), memory in graph.kept.items():
        name = named.get(key, "") or f"{named[key.removesuffix(' inside')]}, its own"
        if memory.shared:
            yield Leaf(PRELUDE, name, "activations", memory.size)
        for run in memory.segments if not memory.shared else ():
            inside[run].append((name, memory.size))
    for name, size in inside[PRELUDE_SEGMENT]:
        yield Leaf(PRELUDE, name, "activations", size)
    for position, mode in zip(range(*span), modes, strict=True):
        run = layered.sequence[position]
        rows = inside[run] if mode == "none" else _kept_again(nodes[run], mode)
        for name, size in rows:
            yield Leaf(layered.labels[position], _within(name, layered, run), "activations", size)
    if any(mode != "none" for mode in modes):
        blocks = {run for position, run in enumerate(layered.sequence) if is_block(layered.labels[position])}
        several = {n: None for run in sorted(blocks & nodes.keys()) for n in _taken(nodes[run]) if info(n).several}
        for node in several:
            yield Leaf(PRELUDE, f"{_operator(node)}, taken by blocks", "activations", info(node).size)


def _kept_again(nodes: Sequence[fx.Node], mode: str) -> Iterator[tuple[str, float]]:
    """What a block keeps for a micro-batch where it is run again, besides what other blocks take too."""
    yield from _results(nodes) if mode == "selective" else ()
    for node in _taken(nodes):
        if not info(node).several:
            yield f"{_operator(node)}, taken", info(node).size


def _results(nodes: Sequence[fx.Node]) -> Iterator[tuple[str, float]]:
    """What products give, with what they keep."""
    for node in nodes:
        record = info(node)
        if record.product and not record.view:
            yield _operator(node), record.size + record.inner


def _taken(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The values that a run takes from outside; parameters and buffers are there anyway."""
    inside = set(nodes)
    taken = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside)
    return [n for n in taken if info(n).kind not in OWNED]


def _bytes(some: Iterable[Leaf]) -> float:
    return sum(leaf.bytes for leaf in some)


def _bytes_of(rows: Iterable[tuple[str, float]]) -> float:
    return sum(nbytes for _, nbytes in rows)


def _ending(space: SearchSpace, found: SearchResult, choices: ShardingAssignment, span: tuple[int, int]) -> float:
    """Bytes that are made at the end of a step: by the optimizer, or of messages of gradients and parameters."""
    training = space.training(found.point)
    held = [
        (nbytes, record.grad, sums(choices, record, placed, "dp"))
        for _, _, record, placed, nbytes in parameters(space.layered, choices, span)
    ]
    stepping, summed = ([each(*row) for row in held] for each in (training.stepping, training.summed))
    made = sum(stepping) if training.together else max(stepping, default=0.0)
    return max(made, float(training.ending(sum(summed), max(summed, default=0.0))))


def _backwards(
    space: SearchSpace,
    found: SearchResult,
    choices: ShardingAssignment,
    graph: StageGraph,
    span: tuple[int, int],
    modes: Sequence[str],
    flights: int,
    one: float,
) -> Iterator[list[Leaf]]:
    """What exists at the moments of a step's backwards besides what is kept, less what is gone or not there yet. Where
    all micro-batches are in flight before the first backward there are no gradients then, and one micro-batch, which
    keeps `one` bytes, less afterwards."""
    own = _own_gradients(space, found, choices, span)
    if flights < space.micro_batches(found.point):
        yield from _backward(space, found, choices, graph, span, modes, {}, False)
        return
    yield from _backward(space, found, choices, graph, span, modes, own, True)
    gone = Leaf(PRELUDE, "activations of a micro-batch, gone by then", "transient", -one)
    for moment in _backward(space, found, choices, graph, span, modes, {}, False) if flights > 1 else ():
        yield [*moment, gone]


def _backward(
    space: SearchSpace,
    found: SearchResult,
    choices: ShardingAssignment,
    graph: StageGraph,
    span: tuple[int, int],
    modes: Sequence[str],
    own: Mapping[int, float],
    first: bool,
) -> Iterator[list[Leaf]]:
    """What exists in the backward of every run, the `first` of a step or another: gradients of an operator, its
    parameters, where it gathers them, and what a block that is run again keeps until it is done, at one of two moments
    where that lets go of products' results on the way; or, when that is gone and ranks sum its gradients, these. Gone
    by then is what later runs kept; of blocks that do not all do the same only before the first of them; not there yet
    are those of `own`, gradients by position, that come later."""
    layered, training = space.layered, space.training(found.point)
    nodes = dict(zip(graph.indices, (mine for _, mine in graph.segments), strict=True))
    inside: dict[int, float] = defaultdict(float)
    wide: dict[int, float] = defaultdict(float)
    products: dict[int, float] = defaultdict(float)
    for memory in graph.kept.values():
        for run in memory.segments if not memory.shared else ():
            inside[run] += memory.size
            products[run] += memory.size * memory.product
        for run, size in memory.wide.items():
            wide[run] += size
    early, late, of_blocks = sum(own.values()), 0.0, 0.0
    positions = [(p, layered.sequence[p], mode) for p, mode in zip(range(*span), modes, strict=True)]
    alike = len({mode for p, _, mode in positions if is_block(layered.labels[p])}) <= 1
    last, waiting = _waiting(space, found, choices, span)
    yield [Leaf(PRELUDE, "gradients that are not there yet", "transient", -early)]
    for position, run, mode in [*reversed(positions), (-1, PRELUDE_SEGMENT, "none")]:
        label = layered.labels[position] if run != PRELUDE_SEGMENT else PRELUDE
        block = run != PRELUDE_SEGMENT and is_block(label)
        left = not any(is_block(layered.labels[p]) for p in range(span[0], position + 1))
        summed, read = [0.0], used_parameters(layered.segments[run]) if run != PRELUDE_SEGMENT else []
        for node in read:
            placed = choices.placements(layered, (node, 0), 0)
            shared = sums(choices, info(node), placed, "dp")
            summed.append(training.summed(choices.size((node, 0), placed), info(node).grad, shared))
        summing = float(training.summing(sum(summed), max(summed), len(read) == 1))
        gradients = [
            (backward_of(node, training.anew(first)), _within(_operator(node), layered, run))
            for node in nodes.get(run, ())
        ]
        (largest, _), its_name = max(gradients, key=lambda row: row[0][0], default=((0.0, 0.0), ""))
        (_, backward), name = max(gradients, key=lambda row: row[0][1], default=((0.0, 0.0), ""))
        early -= own.get(position, 0.0)
        kept = inside[run] if mode == "none" else _bytes_of(_kept_again(nodes.get(run, ()), mode))
        whole, gradient = inside[run] + wide[run], (f"{its_name}, gradient", largest)
        gathered = ("parameters gathered", float(training.gathered(sum(summed))))
        results = _bytes_of(_results(nodes.get(run, ()))) if mode == "selective" else 0.0
        again = whole - results if mode != "none" else 0.0
        ways = [[(f"{name}, gradients", backward), gathered, ("what is run again", again)]]
        if mode == "selective":
            ways.append([gradient, gathered, ("what was run again", whole - products[run])])
        ways.append([gradient, ("gradients that ranks sum, with messages", summing)])
        rows = [
            *max(ways, key=_bytes_of),
            ("what later runs kept, gone by then", -late - of_blocks * left),
            ("gradients that are not there yet", -early if run != PRELUDE_SEGMENT else 0.0),
            ("gradients of shared parameters, waiting", waiting if -1 < position < last else 0.0),
        ]
        yield [Leaf(label, name, "transient", nbytes) for name, nbytes in rows if nbytes]
        if block and not alike:
            of_blocks += kept
        elif run != PRELUDE_SEGMENT:
            late += kept


def _waiting(
    space: SearchSpace, found: SearchResult, choices: ShardingAssignment, span: tuple[int, int]
) -> tuple[int, float]:
    """The last position of a stage that reads a parameter which an earlier one reads too, and bytes of the gradients of
    all such."""
    layered, last, waiting = space.layered, span[0], 0.0
    read: dict[str, list[tuple[int, fx.Node]]] = defaultdict(list)
    for position in range(*span):
        for node in dict.fromkeys(used_parameters(layered.segments[layered.sequence[position]])):
            read[layered.parameter_at(position, node)].append((position, node))
    for (_, node), *more in read.values():
        placed = choices.placements(layered, (node, 0), 0)
        shared = sums(choices, info(node), placed, "dp")
        nbytes = space.training(found.point).waiting(choices.size((node, 0), placed), info(node).grad, shared)
        if more and nbytes:
            last, waiting = max(last, more[-1][0]), waiting + nbytes
    return last, waiting


def _own_gradients(
    space: SearchSpace, found: SearchResult, choices: ShardingAssignment, span: tuple[int, int]
) -> dict[int, float]:
    """Position -> bytes of the gradients of the parameters that it alone reads."""
    layered, training = space.layered, space.training(found.point)
    read = [
        (position, layered.parameter_at(position, node), node)
        for position, run in enumerate(layered.sequence)
        for node in dict.fromkeys(used_parameters(layered.segments[run]))
    ]
    readers, own = Counter(name for _, name, _ in read), defaultdict[int, float](float)
    for position, name, node in read:
        if readers[name] == 1 and span[0] <= position < span[1]:
            placed = choices.placements(layered, (node, 0), 0)
            shared = sums(choices, info(node), placed, "dp")
            own[position] += training.memory(choices.size((node, 0), placed), info(node).grad, shared)[1]
    return own


def _within(name: str, layered: LayeredGraph, run: int) -> str:
    """A name without that of the run it is in."""
    return name.removeprefix(layered.segments[run].label).lstrip(". ") if run != PRELUDE_SEGMENT else name


def _operator(node: fx.Node) -> str:
    """A node as a reader knows it: its module and operator, or its name."""
    record = info(node)
    return f"{record.module} {printed_name(record.name)}".strip() if record.kind == "op" else record.name
