"""LayeredGraph -> LayeredGraph: the row of the whole model, from a trace of some of its blocks.

A period is the blocks after which the kinds of blocks repeat. The second of two traced periods stands for all that were
left out if the two compute the same, each reads the same of the period before it, and only the second period reads
values of the first. Where kinds of blocks mix, one block stands for others of its kind: `unfold_mixed`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from autopart.frontend.layer_sampling import MixedLayers, Sample, SampledLayers, UnlikeLayers
from autopart.ir.fingerprint import Fingerprints
from autopart.ir.graph import info
from autopart.ir.layered_graph import LayeredGraph, Segment, node_keys, own_values
from autopart.passes.block_segments import first_segments, rename, works_for
from autopart.passes.unfold_mixed import walk_of


@dataclass(frozen=True)
class _Pair:
    """Two equal periods of a list of blocks, one after the other.

    first, second  their segments
    after          the number, in the trace, of the first block behind them
    """

    sample: SampledLayers
    first: range
    second: range
    after: int

    @property
    def times(self) -> int:
        """How many periods were left out."""
        return self.sample.dropped // self.sample.period


def unfold_layers(layered: LayeredGraph, sampled: Sequence[Sample]) -> LayeredGraph:
    """Have the traced blocks of the lists `sampled` stand for those that were left out of the trace.

    Raises UnlikeLayers where they do not compute the same as the other traced blocks of their kinds.
    """
    if not sampled:
        return layered
    unlike = [error for error in (_unlike(layered, sample) for sample in sampled) if error is not None]
    if unlike:
        unlike[0].others = tuple(unlike[1:])
        raise unlike[0]
    walks = [walk_of(layered, sample) for sample in sampled if isinstance(sample, MixedLayers)]
    found = [_pair(layered, sample) for sample in sampled if isinstance(sample, SampledLayers)]
    pairs = sorted((pair for pair in found if pair is not None), key=lambda pair: pair.first.start)
    for pair, other in itertools.pairwise(pairs):
        if other.first.start < pair.second.stop:
            raise UnlikeLayers(other.sample, f"its blocks run in between those of {pair.sample.path}")
    count = Counter(layered.count)
    walk_at = {walk.base: walk for walk in walks if walk is not None}
    for walk in walk_at.values():
        walk.rename(layered)
        for node in walk.repeats(layered):
            count[layered.same[node]] += info(node).times
    for pair in pairs:
        _rename(layered, pair)
        for i in pair.second:
            segment = layered.segments[i]
            for node in [*segment.nodes, *own_values(segment)]:
                count[layered.same[node]] += pair.times * info(node).times
    repeated: dict[int, range] = {}
    handed_on: dict[int, tuple[frozenset[int], tuple[int, int]]] = {}
    row: list[tuple[int, str]] = []
    for index, segment in enumerate(layered.segments):
        if index in walk_at:
            handed_on |= walk_at[index].handed_on(len(row))
            row += walk_at[index].row()
        if any(index in walk.segments for walk in walk_at.values()):
            continue
        row.append((index, segment.label))
        for pair in (p for p in pairs if p.second.stop == index + 1):
            for repeat in range(1, pair.times + 1):
                for i in pair.second:
                    repeated[len(row)] = pair.first
                    row.append((i, pair.sample.moved(layered.segments[i].label, repeat * pair.sample.period)))
    return replace(
        layered,
        count=count,
        keys=node_keys(layered.keys),
        sequence=tuple(index for index, _ in row),
        labels=tuple(label for _, label in row),
        repeated=repeated,
        handed_on=handed_on,
    )


def _unlike(layered: LayeredGraph, sample: Sample) -> UnlikeLayers | None:
    """Why no blocks of a list stand for others, however many are traced; None where some may."""
    first = first_segments(layered, sample)
    start, after = (sample.start, sample.after) if isinstance(sample, SampledLayers) else (0, sample.kept)
    away = next((segment for segment in layered.segments if first and works_for(segment, sample, start)), None)
    if away is not None:
        why = f"{away.label or 'what segments outside'} does part of the work of other blocks"
        return UnlikeLayers(sample, why, whole=True)
    changed = next((name for name in layered.traced.updated if sample.index(name) in range(start, after)), None)
    if changed is not None:
        return UnlikeLayers(sample, f"the forward pass changes {changed}", whole=True)
    if isinstance(sample, MixedLayers):
        return None
    runs = [block for block in range(sample.kept) if block in first]
    regular = all(
        (block in first) == (block + sample.period in first)
        for block in range(sample.start, sample.after - sample.period)
    )
    if first and not (regular and runs == sorted(runs, key=first.__getitem__)):
        return UnlikeLayers(sample, "its blocks do not run one after the other", whole=True)
    return None


def _pair(layered: LayeredGraph, sample: SampledLayers) -> _Pair | None:
    """The first two equal periods; None where the model runs none of the blocks. Raises UnlikeLayers if none are
    equal."""
    first = first_segments(layered, sample)
    runs = [block for block in range(sample.kept) if block in first]

    def start_of(block: int) -> int | None:
        """The first segment of a block, or of the next one that runs."""
        return next((first[other] for other in runs if other >= block), None)

    begin, why = start_of(sample.start), ""
    if begin is None:
        return None
    for window in range(sample.windows - 1):
        block = sample.start + window * sample.period
        one, two = start_of(block), start_of(block + sample.period)
        assert one is not None and two is not None
        pair = _Pair(sample, range(one, two), range(two, 2 * two - one), block + 2 * sample.period)
        behind = start_of(pair.after)
        if behind not in (None, pair.second.stop) or pair.second.stop > len(layered.segments):
            why = f"something else runs between block {block} and those that follow"
            continue
        why = _difference(layered, pair, begin)
        if not why:
            return pair
    raise UnlikeLayers(sample, why)


def _difference(layered: LayeredGraph, pair: _Pair, begin: int) -> str:
    """In words, what the second period does otherwise than the first; "" where they are equal.

    `begin` is the first segment of the first period in the trace.
    """
    prints = Fingerprints(layered.traced.graph, layered.traced.micro_batch)
    length = len(pair.first)
    for i, k in zip(pair.first, pair.second, strict=True):
        one, two = layered.segments[i], layered.segments[k]
        if two.label != pair.sample.moved(one.label, pair.sample.period) or one.segment_class != two.segment_class:
            return f"{two.label or 'what follows'} does something else than {one.label or 'what came before'}"
        for mine, other in zip(one.externals, two.externals, strict=True):
            before, now = layered.locations.get(mine), layered.locations.get(other)
            if now is None:
                equal = before is None and prints.outside(mine, one.label) == prints.outside(other, two.label)
            elif now[0] >= pair.second.start or (now[0] >= pair.first.start and begin < pair.first.start):
                equal = before == (now[0] - length, now[1])
            elif now[0] >= pair.first.start:
                equal = before is None or before[0] < pair.first.start
            else:
                equal = mine is other
            if not equal:
                return f"{two.label} reads {info(other).name} of elsewhere than {one.label}"
    owned = {node for i in pair.second for node in own_values(layered.segments[i])}
    labels = {layered.segments[i].label for i in pair.second}
    for node in layered.free:
        if info(node).layer in labels and node not in owned:
            return f"{info(node).layer} makes {info(node).name} for others"
    return _late_reader(layered, pair)


def _late_reader(layered: LayeredGraph, pair: _Pair) -> str:
    """In words, what reads a value of the first period behind the second period; "" where nothing does."""
    for i in pair.first:
        for node in layered.segments[i].nodes:
            for user in node.users:
                location = layered.locations.get(user)
                if user.op == "output" or (location is not None and location[0] >= pair.second.stop):
                    reader = "the model's output" if user.op == "output" else _name(layered.segments[location[0]], user)  # type: ignore[index]
                    return f"{reader} reads {info(node).name} of {layered.segments[i].label}"
    return ""


def _name(segment: Segment, node: fx.Node) -> str:
    return segment.label or info(node).module or info(node).name


def _rename(layered: LayeredGraph, pair: _Pair) -> None:
    """Give the blocks behind the pair the numbers that they have in the whole model, in place."""
    sample, after = pair.sample, pair.after
    rename(layered, lambda name: sample.moved(name, sample.dropped, after))
