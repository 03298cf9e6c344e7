"""Folded -> Folded: the row of a whole model, from a trace of its first blocks.

Where two periods of blocks next to each other compute the same, read the same of each other and of what came before,
and nothing else reads the first, all periods that were left out do as the second.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from autopart.frontend.layer_sampling import SampledLayers, UnlikeLayers
from autopart.ir.fingerprint import Fingerprints
from autopart.ir.graph import annotate, info
from autopart.ir.layered_graph import LayeredGraph, Segment, node_keys, own_values, used_parameters


@dataclass(frozen=True)
class _Pair:
    """Two equal periods of a list of blocks.

    first, second  their runs
    after          the number of the first block behind them, as the trace has it
    """

    short: SampledLayers
    first: range
    second: range
    after: int

    @property
    def times(self) -> int:
        """How many periods were left out."""
        return self.short.dropped // self.short.period


def repeat(folded: LayeredGraph, shortened: Sequence[SampledLayers]) -> LayeredGraph:
    """Have the second of two equal periods stand for those that were left out. Raises Unlike where there are none."""
    if not shortened:
        return folded
    found = [_pair(folded, short) for short in shortened]
    pairs = sorted((pair for pair in found if pair is not None), key=lambda pair: pair.first.start)
    for pair, other in itertools.pairwise(pairs):
        if other.first.start < pair.second.stop:
            raise UnlikeLayers(other.short, f"its blocks run in between those of {pair.short.path}")
    count = Counter(folded.count)
    for pair in pairs:
        _rename(folded, pair)
        for i in pair.second:
            run = folded.runs[i]
            for node in [*run.nodes, *own_values(run)]:
                count[folded.same[node]] += pair.times
    repeated: dict[int, range] = {}
    row: list[tuple[int, str]] = []
    for index, run in enumerate(folded.runs):
        row.append((index, run.label))
        for pair in (p for p in pairs if p.second.stop == index + 1):
            for turn in range(1, pair.times + 1):
                for i in pair.second:
                    repeated[len(row)] = pair.first
                    row.append((i, pair.short.moved(folded.runs[i].label, turn * pair.short.period)))
    return replace(
        folded,
        count=count,
        keys=node_keys(folded.keys),
        sequence=tuple(index for index, _ in row),
        labels=tuple(label for _, label in row),
        repeated=repeated,
    )


def _pair(folded: LayeredGraph, short: SampledLayers) -> _Pair | None:
    """The first two periods that are alike; None where the model runs none of the blocks. Raises Unlike."""
    first: dict[int, int] = {}
    for i, run in enumerate(folded.runs):
        block = short.index(run.label)
        if block is not None:
            first.setdefault(block, i)
    if not first:
        return None
    away = next((run for run in folded.runs if _works_for(run, short)), None)
    if away is not None:
        raise UnlikeLayers(short, f"{away.label or 'what runs outside'} does part of the work of other blocks")
    starts = [first.get(block, -1) for block in range(short.kept)]
    if -1 in starts or starts != sorted(starts):
        raise UnlikeLayers(short, "its blocks do not run one after the other")
    begin = starts[short.start]
    why = ""
    for window in range(short.windows - 1):
        block = short.start + window * short.period
        one, two = starts[block], starts[block + short.period]
        pair = _Pair(short, range(one, two), range(two, 2 * two - one), block + 2 * short.period)
        behind = starts[pair.after] if pair.after < short.kept else pair.second.stop
        if behind != pair.second.stop or behind > len(folded.runs):
            why = f"something else runs between block {block} and those that follow"
            continue
        why = _difference(folded, pair, begin)
        if not why:
            return pair
    raise UnlikeLayers(short, why)


def _works_for(run: Segment, short: SampledLayers) -> bool:
    """Whether a run has nodes or reads parameters of a repeated block that is another: one that runs again."""
    names = [*(info(n).layer for n in run.nodes), *(info(p).name for p in used_parameters(run))]
    blocks = {short.index(name) for name in names} - {None, short.index(run.label)}
    return any(block is not None and block >= short.start for block in blocks)


def _difference(folded: LayeredGraph, pair: _Pair, begin: int) -> str:
    """What keeps the second period from doing as the first, in words; `begin` is the first run of all periods."""
    prints = Fingerprints(folded.traced.graph, folded.traced.micro_batch)
    length = len(pair.first)
    for i, k in zip(pair.first, pair.second, strict=True):
        one, two = folded.runs[i], folded.runs[k]
        if two.label != pair.short.moved(one.label, pair.short.period) or one.kind != two.kind:
            return f"{two.label or 'what follows'} does something else than {one.label or 'what came before'}"
        for mine, other in zip(one.externals, two.externals, strict=True):
            before, now = folded.places.get(mine), folded.places.get(other)
            if now is None:
                alike = before is None and prints.outside(mine, one.label) == prints.outside(other, two.label)
            elif now[0] >= pair.second.start or (now[0] >= pair.first.start and begin < pair.first.start):
                alike = before == (now[0] - length, now[1])
            elif now[0] >= pair.first.start:
                alike = before is None or before[0] < pair.first.start
            else:
                alike = mine is other
            if not alike:
                return f"{two.label} reads {info(other).name} of elsewhere than {one.label}"
    owned = {node for i in pair.second for node in own_values(folded.runs[i])}
    labels = {folded.runs[i].label for i in pair.second}
    for node in folded.free:
        if info(node).layer in labels and node not in owned:
            return f"{info(node).layer} makes {info(node).name} for others"
    return _late_reader(folded, pair)


def _late_reader(folded: LayeredGraph, pair: _Pair) -> str:
    """What reads a value of the first period behind the second, in words."""
    for i in pair.first:
        for node in folded.runs[i].nodes:
            for user in node.users:
                place = folded.places.get(user)
                if user.op == "output" or (place is not None and place[0] >= pair.second.stop):
                    reader = "the model's output" if user.op == "output" else _name(folded.runs[place[0]], user)  # type: ignore[index]
                    return f"{reader} reads {info(node).name} of {folded.runs[i].label}"
    return ""


def _name(run: Segment, node: fx.Node) -> str:
    return run.label or info(node).module or info(node).name


def _rename(folded: LayeredGraph, pair: _Pair) -> None:
    """Give the blocks behind the pair, in place, the numbers they have in the whole model."""
    short, after = pair.short, pair.after

    def moved(name: str) -> str:
        return short.moved(name, short.dropped, after)

    for node in folded.traced.graph.nodes:
        if node.op == "output":
            continue
        record = info(node)
        new = {"module": moved(record.module), "layer": moved(record.layer)}
        if record.kind != "op":
            new["name"] = moved(record.name)
        if any(getattr(record, key) != value for key, value in new.items()):
            annotate(node, **new)
    for run in folded.runs:
        run.label = moved(run.label)
    traced = folded.traced
    traced.buffers = {moved(name): value for name, value in traced.buffers.items()}
    traced.updated = tuple(map(moved, traced.updated))
