"""The strategies of every node along the data-parallel axis.

They split samples wherever an operator's rule allows it. An operator without samples, such as those behind a batch
norm, which mixes samples, runs whole on every rank: all that it takes and gives is in placement R, C or P. Of these
only what can be of use is left:

P  where an operator that splits samples makes a partial sum that gets there. No reshard makes one of a whole value.
C  where an operator that splits samples takes the value whole, so that its gradient is a partial sum. Behind a batch
   norm none does, and gradients are whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from torch import fx

from autopart.ir.graph import has_gradient, info, operands, shape_args
from autopart.passes.value_positions import ValuePositions
from autopart.sharding.notation import C, Placement, R, S, Strategy, splits
from autopart.sharding.rules import strategies

Output = tuple[int, int]
Sources = Mapping[Output, set[Output]]
"""(node, operand) -> the (node, output) of every value that the operand is in some place."""


def sample_splits(positions: ValuePositions, traced: int) -> dict[fx.Node, list[Strategy]]:
    """Node -> its strategies along `dp`, for a trace of `traced` samples. They are found once for each graph."""
    if not positions.samples:
        sources = defaultdict[Output, set[Output]](set)
        for used in positions.value_uses:
            for use in used.uses:
                sources[use].add((used.source, used.output))
        every = [_samples(node, traced) for node in positions.nodes]
        partial = _partial_sums(every, sources)
        every = _kept(every, "P", lambda n, i: bool(sources[n, i] & partial))
        wanted = _partial_gradients(every, sources)
        every = _kept(every, "C", lambda n, i: (n, i) in wanted)
        positions.samples.update(zip(positions.nodes, every, strict=True))
    return positions.samples


def _kept(every: Sequence[list[Strategy]], kind: str, is_of_use: Callable[[int, int], bool]) -> list[list[Strategy]]:
    """The strategies of each node without those that take a P, or give a C, which is of no use: (node, operand) of a P,
    (node, output) of a C. All of them where none would be left."""
    found = []
    for n, options in enumerate(every):
        placements = [option.inputs if kind == "P" else option.outputs for option in options]
        places = [[i for i, p in enumerate(each) if p is not None and p.kind == kind] for each in placements]
        left = [o for o, at in zip(options, places, strict=True) if all(is_of_use(n, i) for i in at)]
        found.append(left or options)
    return found


def _partial_sums(every: Sequence[Sequence[Strategy]], sources: Sources) -> set[Output]:
    """The values that may be partial sums: those of strategies all of whose partial sums may be."""
    found: set[Output] = set()
    before = -1
    while before < len(found):
        before = len(found)
        for n, options in enumerate(every):
            for option in options:
                made = {(n, i) for i, p in enumerate(option.outputs) if p.kind == "P"} - found
                if made and all(sources[n, i] & found for i, p in enumerate(option.inputs) if p and p.kind == "P"):
                    found |= made
    return found


def _partial_gradients(every: Sequence[Sequence[Strategy]], sources: Sources) -> set[Output]:
    """The values of use in placement C: those that a strategy takes so which gives no C, or gives one of use."""
    found: set[Output] = set()
    before = -1
    while before < len(found):
        before = len(found)
        for n in reversed(range(len(every))):
            for option in every[n]:
                given = [(n, i) for i, p in enumerate(option.outputs) if p.kind == "C"]
                if not given or not found.isdisjoint(given):
                    for i, p in enumerate(option.inputs):
                        found |= sources[n, i] if p is not None and p.kind == "C" else set()
    return found


def _samples(node: fx.Node, traced: int) -> list[Strategy]:
    """The strategies that split samples, or without any those that split nothing.

    Fewer samples may be traced than dp has ranks: a strategy must be able to give each traced sample to another rank.
    """
    options = known_strategies(node, traced, ())
    if info(node).kind == "parameter":
        return [o for o in options if o.name in "RC"]
    return [o for o in options if counts_samples(node, o)] or [o for o in options if o.name in "RCP"]


def known_strategies(node: fx.Node, size: int, wanted: Sequence[Placement]) -> list[Strategy]:
    """All strategies of a node along one axis of `size` ranks."""
    record = info(node)
    if record.kind == "op":
        options = strategies(record.name, shape_args(node), record.shapes, size, wanted)
    else:
        options = [Strategy(p.kind, (), (p,)) for p in (R, *((C,) if record.kind == "parameter" else ()))]
        options += [
            Strategy(f"d{p.dim}", (), (p,))
            for p in (*map(S, range(len(record.shape))), *wanted)
            if (record.kind == "parameter" or p == S(0)) and splits(p, record.shape, size)
        ]
    return options if has_gradient(record.dtype) else [o for o in options if o.name != "P"]


def counts_samples(node: fx.Node, option: Strategy) -> bool:
    """Whether a strategy splits the samples of a value that it takes or gives."""
    record = info(node)
    positions = [info(n).batch if n is not None else None for n in operands(node)] if record.kind == "op" else []
    pairs = [*zip(option.inputs, positions, strict=True), *zip(option.outputs, [record.batch], strict=False)]
    return any(p is not None and p.kind == "S" and p.dim == b for p, b in pairs if b is not None)
