"""The row of a list whose kinds of blocks mix, from a trace of some blocks of each kind.

A block stands for the blocks of its kind between blocks of the same kinds, if traced blocks of one kind compute the
same, if each hands one value on, to the next block alone, and if they read nothing else of each other. What is before
and behind a block counts too: values are resharded from the placement in which one kind gives them to that in which
another takes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from autopart.frontend.layer_sampling import MixedLayers, UnlikeLayers
from autopart.ir.fingerprint import Fingerprints
from autopart.ir.graph import info, made_by
from autopart.ir.layered_graph import LayeredGraph, own_values
from autopart.passes.block_segments import first_segments, rename


@dataclass(frozen=True)
class Walk:
    """The traced blocks of a list, a segment each.

    base    the segment of the first
    handed  of each block but the last, the index in its segment of the node whose value the next block reads
    read    of each block, which of the externals of its segment are the value that the block before hands on, or that
            the list begins with
    """

    sample: MixedLayers
    base: int
    handed: tuple[int, ...]
    read: tuple[frozenset[int], ...]

    @property
    def segments(self) -> range:
        """The segments of the traced blocks."""
        return range(self.base, self.base + self.sample.kept)

    def row(self) -> list[tuple[int, str]]:
        """(segment, label) of every block of the list."""
        sample = self.sample
        return [(self.base + sample.stand_in(i), f"{sample.path}.{i}") for i in range(sample.blocks)]

    def handed_on(self, position: int) -> Iterator[tuple[int, tuple[frozenset[int], tuple[int, int]]]]:
        """`LayeredGraph.handed_on` for a list whose first block is at `position`."""
        places = [self.sample.stand_in(i) for i in range(self.sample.blocks)]
        for i in range(1, len(places)):
            yield position + i, (self.read[places[i]], (position + i - 1, self.handed[places[i - 1]]))

    def repeats(self, layered: LayeredGraph) -> Iterator[fx.Node]:
        """The nodes that were left out of the trace, by those that stand for them. What a block makes for others too,
        such as a dim of a table of positions, is made once."""
        for block in set(range(self.sample.blocks)).difference(self.sample.traced):
            index = self.base + self.sample.stand_in(block)
            segment = layered.segments[index]
            yield from segment.nodes
            yield from (n for n in own_values(segment) if _readers(layered, n) == {index})

    def rename(self, layered: LayeredGraph) -> None:
        """Give the traced blocks the numbers that they have in the whole model, in place."""
        sample = self.sample

        def moved(name: str) -> str:
            place = sample.index(name)
            return name if place is None else sample.renumbered(name, sample.traced[place])

        rename(layered, moved)


def walk_of(layered: LayeredGraph, sample: MixedLayers) -> Walk | None:
    """The traced blocks of a list; None where the model runs none of them. Raises UnlikeLayers where they do not stand
    for the others."""
    first = first_segments(layered, sample)
    if not first:
        return None
    base, kept = min(first.values()), sample.kept
    labels = [segment.label for segment in layered.segments[base : base + kept]]
    if labels != [f"{sample.path}.{i}" for i in range(kept)] or len(first) < sum(
        sample.index(segment.label) is not None for segment in layered.segments
    ):
        raise UnlikeLayers(sample, "its blocks are not one segment each, one after the other")
    handed = tuple(_handed(layered, sample, base + i) for i in range(kept - 1))
    read = [
        frozenset(
            k for k, node in enumerate(layered.segments[base + i].externals) if _home(layered, node) == base + i - 1
        )
        for i in range(1, kept)
    ]
    same_as_first = (i for i in range(1, kept) if sample.kinds[sample.traced[i]] == sample.kinds[0])
    begin = next(same_as_first, None)
    walk = Walk(sample, base, handed, (frozenset() if begin is None else read[begin - 1], *read))
    for i in range(kept):
        _check_kind(layered, walk, i)
    return walk


def _home(layered: LayeredGraph, node: fx.Node) -> int | None:
    """The segment that makes a value."""
    location = layered.locations.get(node)
    return None if location is None else location[0]


def _readers(layered: LayeredGraph, node: fx.Node) -> set[int]:
    """The segments that read a value, or what is made of it in no segment."""
    homes = {user: _home(layered, user) for user in node.users}
    direct = {home for home in homes.values() if home is not None}
    return direct.union(*(_readers(layered, user) for user, home in homes.items() if home is None))


def _handed(layered: LayeredGraph, sample: MixedLayers, index: int) -> int:
    """The index, in its segment, of the one node that the next segment reads."""
    nodes = layered.segments[index].nodes
    found = {k: {_home(layered, user) for user in node.users} - {index} for k, node in enumerate(nodes)}
    read = {k: users for k, users in found.items() if users}
    names = {node.name for node in nodes}
    if list(read.values()) != [{index + 1}] or made_by(info(nodes[min(read)]).root)[0] not in names:
        raise UnlikeLayers(sample, f"{layered.segments[index].label} does not make one value for the next block alone")
    return min(read)


def _check_kind(layered: LayeredGraph, walk: Walk, place: int) -> None:
    """Raise UnlikeLayers where a traced block differs from another of its kind: the first behind the list's first."""
    sample, segments = walk.sample, layered.segments[walk.base : walk.base + walk.sample.kept]
    kinds = [sample.kinds[block] for block in sample.traced]
    segment, twin = segments[place], segments[kinds.index(kinds[place], min(place, 1))]
    owned = set(own_values(segment))
    shared = next((n for n in layered.free if info(n).layer == segment.label and n not in owned), None)
    if shared is not None:
        raise UnlikeLayers(sample, f"{segment.label} makes {info(shared).name} for others")
    if segment.segment_class != twin.segment_class:
        raise UnlikeLayers(sample, f"{segment.label} does something else than {twin.label}")
    prints = Fingerprints(layered.traced.graph, layered.traced.micro_batch)
    begins = {segment.externals[k] for k in walk.read[place]}
    for k, (mine, other) in enumerate(zip(segment.externals, twin.externals, strict=True)):
        if k in walk.read[place]:
            equal = len(begins) == 1 and walk.read[place] == walk.read[segments.index(twin)]
        elif _home(layered, mine) is None:
            outside = prints.outside(mine, segment.label) == prints.outside(other, twin.label)
            equal = _home(layered, other) is None and outside
        else:
            equal = mine is other
        if not equal:
            raise UnlikeLayers(sample, f"{segment.label} reads {info(mine).name} of elsewhere than {twin.label}")
