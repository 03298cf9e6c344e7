"""fx.Graph -> Table: everything there is to decide, for one size of the tensor-parallel axis.

One binary x[v, s] for each node v of a class of equal blocks and each of its strategies s (one along every axis):

    (1)  sum_s x[v, s] = 1
    (2)  e[f, u, p, q] moves the value of flow f from placement p to the placement q that its use u takes; its
         marginals are the x of the source that give p, and the x of the user that take q
    (3)  c[f, w] >= sum of e[f, u, p, q] whose chain of changes begins with w, for every use u: a change is paid once
         however many use it
    (4)  k[m, p] >= x of every strategy that keeps the memory m in placement p: what is kept is held once
    (5)  minimise  sum x * seconds + sum c * change seconds + price of a byte * (sum x * state + sum k * kept)

`dp` splits samples wherever an operator's rule allows it; `tp` any other letter. This file lists nodes, strategies,
flows and kept memory; `weigh` prices them and `solve` writes the equations.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from autopart.cost import again_of, rate_of
from autopart.errors import PartitionError
from autopart.fingerprint import is_own
from autopart.folded import Folded
from autopart.graph import Info, info, is_pick, loss_of, operands, shape_args, updates_of, value_of
from autopart.mesh import Device
from autopart.notation import C, Placement, R, S, splits
from autopart.problem import Flow, Keep, Node, Placements, Table, Value
from autopart.relayout import possible, steps
from autopart.rules import Strategy, is_contraction, strategies

END = "loss"
"""The key of the pseudo-node that takes the loss, whole on every rank."""

Hints = Mapping[tuple[fx.Node, int], set[Placement]]


def formulate(folded: Folded, device: Device, tp: int, forced: bool = False) -> Table:
    """The table for `tp` ranks along the tensor-parallel axis and any number along the data-parallel one. With
    `forced`, every product's weights have to be split over `tp`; PartitionError where none can be."""
    axes = ("dp", "tp") if tp > 1 else ("dp",)
    return _Builder(folded, device, axes, tp, forced).table()


@dataclass(frozen=True)
class _Use:
    """One use of a value at one place: by `node` (its index) as `operand`, at a position. In no run (-1) it is `by` an
    operator that stages run for themselves, or to write a buffer of the module at the position `written`."""

    node: int
    operand: int
    position: int
    by: fx.Node | None = None
    written: int = -1


Used = dict[tuple[fx.Node, int, int, str], list[_Use]]
"""(node, output, position that makes it, what tells its places apart) -> its uses."""


class _Builder:
    """Collects nodes, flows and kept memory; holds who is who."""

    def __init__(self, folded: Folded, device: Device, axes: tuple[str, ...], tp: int, forced: bool) -> None:
        self.folded, self.device, self.axes, self.tp, self.forced = folded, device, axes, tp, forced
        self.reps = folded.representatives()
        self.index = {node: i for i, node in enumerate(self.reps)}
        self.run_of = folded.run_of()
        self.last = {run: position for position, run in enumerate(folded.sequence)}
        self.region = _regions(folded.sequence)
        self.readers: dict[fx.Node, set[int]] = defaultdict(set)
        """Runs that read a value of a node; -1 for what is in none."""
        for node in folded.traced.graph.nodes:
            if node.op == "call_function" and not is_pick(node):
                for source in node.all_input_nodes:
                    self.readers[value_of(source)[0]].add(self.run_of.get(node, -1))
        self.nodes: list[Node] = []
        self.flows: dict[object, Flow] = {}
        self.needed: dict[fx.Node, set[int]] = {}
        self.places: dict[fx.Node, set[int]] = defaultdict(set)
        """Positions for which stages make a value themselves, besides those that read it."""
        self.writes: dict[int, list[int]] = defaultdict(list)
        """Update of a buffer by such a value -> the position of its module, for each of its class."""

    def table(self) -> Table:
        folded, graph = self.folded, self.folded.traced.graph
        hints = _hints(folded, self.reps, self.tp)
        self.nodes = [self._node(node, hints) for node in self.reps]
        if self.forced and self.tp > 1:
            self._check_splits()
        used = self._used()
        updates = self._updates(used)
        self.needed = self._needed(used)
        for (source, output, home, _), uses in used.items():
            self._flow(source, output, home, uses)
        self._end(loss_of(graph))
        tied = [[self.index[n] for n in self.reps if info(n).kind == "input"], *updates]
        for flow in self.flows.values():
            self._chains(flow)
        return Table(
            axes=self.axes,
            tp=self.tp,
            nodes=self.nodes,
            flows=list(self.flows.values()),
            keeps=self._keeps(),
            labels=folded.labels,
            group=tuple(folded.runs[r].kind for r in folded.sequence),
            block=tuple(label.rpartition(".")[2].isdigit() for label in folded.labels),
            state=self._state(),
            shared=self._shared(),
            tied=[group for group in tied if len(group) > 1],
        )

    def _node(self, node: fx.Node, hints: Hints) -> Node:
        record = info(node)
        inputs = [info(n) for n in node.all_input_nodes]
        is_op = record.kind == "op"
        run = self.run_of.get(node)
        return Node(
            key=self.folded.keys[node],
            kind=record.kind,
            options=self._options(node, hints),
            values=[Value(_bytes(record, i), record.batch is not None, record.grad) for i in range(len(record.shapes))],
            operands=[self._operand(n) for n in operands(node)] if is_op else [],
            firsts=_firsts(operands(node)) if is_op else [],
            flops=record.flops,
            batch=record.batch is not None or any(i.batch is not None for i in inputs),
            product=record.product,
            rate=rate_of(record, self.device) if is_op else float("inf"),
            again=again_of(record, inputs),
            runs=int(is_op and not record.view),
            inner=float(record.inner),
            grad=record.grad,
            group=-1 if run is None else self.folded.runs[run].kind,
        )

    def _check_splits(self) -> None:
        """Raise PartitionError where an axis that was asked for would leave every product whole."""
        products = [i for i, n in enumerate(self.reps) if is_contraction(info(n).name)]
        if not products or any(option[1].shards_work for i in products for option in self.nodes[i].options):
            return
        taken = [info(n) for i in products for n in self.reps[i].all_input_nodes]
        sizes = sorted({s for r in taken for dim, s in enumerate(r.shape) if s > 1 and dim != r.batch})
        fits = [d for d in range(2, 65) if sum(s % d == 0 for s in sizes) > 1]
        raise PartitionError(
            f"tp={self.tp} splits nothing",
            f"no matrix product has a dim that {self.tp} divides and that may be split; the sizes are "
            f"{', '.join(map(str, sizes))}",
            f"tp={', '.join(map(str, fits[:6]))}" if fits else "pp or dp",
        )

    def _operand(self, argument: fx.Node | None) -> tuple[int, int] | None:
        if argument is None:
            return None
        source, output = value_of(argument)
        return self.index[self.folded.same[source]], output

    def _options(self, node: fx.Node, hints: Hints) -> list[tuple[Strategy, ...]]:
        """The strategies along every axis that go together: no dim of a tensor is split twice."""
        wanted = tuple(sorted(hints.get((node, 0), ()), key=str))
        along = [_samples(node) if axis == "dp" else _letters(node, self.tp, wanted, self.forced) for axis in self.axes]
        return [pair for pair in itertools.product(*along) if not _collide(pair)]

    def _position(self, source: fx.Node, run: int, position: int) -> int:
        """Where the value that a node of `run` reads at `position` is made; -1 for what stages make for themselves."""
        made = self.run_of.get(source)
        if made is None:
            return -1
        first = self.region.get(run)
        return position - (run - made) if first is not None and made >= first else self.last[made]

    def _name(self, source: fx.Node, position: int) -> str:
        """What tells apart the places of a value that is made in no run: a parameter's name there, or where a block
        alone has it; "" for all others."""
        if position < 0 or source in self.run_of:
            return ""
        if info(source).kind == "parameter":
            return self.folded.parameter_at(position, source)
        run = self.folded.sequence[position]
        own = is_own(source, self.folded.runs[run].label) and self.readers[source] == {run}
        return str(position) if own else ""

    def _used(self) -> Used:
        """Every value at every place, with its uses."""
        used: Used = defaultdict(list)
        places = [(n, run, p) for p, run in enumerate(self.folded.sequence) for n in self.folded.runs[run].nodes]
        for node, run, position in [*places, *((n, -1, -1) for n in self.folded.free)]:
            for operand, argument in enumerate(operands(node)) if not is_pick(node) else ():
                if argument is not None:
                    source, output = value_of(argument)
                    key = source, output, self._position(source, run, position), self._name(source, position)
                    used[key].append(_Use(self.index[self.folded.same[node]], operand, position, node))
        return used

    def _flow(self, source: fx.Node, output: int, home: int, uses: Sequence[_Use]) -> None:
        index = self.index[self.folded.same[source]]
        inside = tuple(u.position == home for u in uses)
        several = len({u.position for u in uses}) > 1
        pairs = tuple((u.node, u.operand) for u in uses)
        flow = self.flows.setdefault((index, output, pairs, inside, several), Flow(index, output, pairs, inside))
        flow.homes.append(home)
        flow.users.append(tuple(u.position for u in uses))
        flow.needs.append(tuple(self._needs(u) for u in uses))

    def _needs(self, use: _Use) -> tuple[int, ...]:
        """The positions that need what a use makes."""
        if use.position >= 0:
            return (use.position,)
        return tuple(sorted(self.needed[use.by])) if use.by is not None else (use.written,)

    def _end(self, loss: fx.Node) -> None:
        """A pseudo-node that takes the loss whole."""
        source, output = value_of(loss)
        home = self.last[self.run_of[source]]
        whole = (Strategy("R", (R,), ()),) * len(self.axes)
        self._flow(source, output, home, [_Use(len(self.nodes), 0, home)])
        self.nodes.append(Node(END, "end", [whole], []))

    def _updates(self, used: Used) -> list[list[int]]:
        """Pseudo-operators that write buffers' new values, one for each class of them, each in the placement of its
        buffer: the nodes that take the same option."""
        buffers = {info(n).name: n for n in self.folded.same if info(n).kind == "buffer"}
        modules = {info(n).module: self.last[run] for n, run in self.run_of.items()}
        known: dict[tuple[int, int, int], int] = {}
        for name, node in updates_of(self.folded.traced).items():
            source, output = value_of(node)
            buffer, run = self.index[self.folded.same[buffers[name]]], self.run_of.get(source)
            taken = self.index[self.folded.same[source]], output
            if (buffer, *taken) not in known:
                known[buffer, *taken] = len(self.nodes)
                self._update(buffer, taken, -1 if run is None else self.folded.runs[run].kind)
            home, module = -1 if run is None else self.last[run], modules.get(name.rpartition(".")[0], 0)
            use = _Use(known[buffer, *taken], 1, home, written=module)
            others = used.get((source, output, home, ""), [])
            alone = home < 0 or any(u.position != home for u in others)
            used[source, output, home, name if alone else ""].append(use)
            if run is None:
                self.places[source].add(module)
                self.writes[use.node].append(module)
        return [[buffer, update] for (buffer, *_), update in known.items()]

    def _update(self, buffer: int, taken: tuple[int, int], group: int) -> None:
        known = self.nodes[buffer]
        options = [tuple(Strategy(s.name, s.outputs * 2, s.outputs) for s in option) for option in known.options]
        reads: list[tuple[int, int] | None] = [(buffer, 0), taken]
        self.nodes.append(Node(f"{known.key}/update", "op", options, known.values, reads, [0, 1], group=group))

    def _chains(self, flow: Flow) -> None:
        source = self.nodes[flow.source]
        grad = source.values[flow.output].grad
        haves = {source.given(o, flow.output): None for o in range(len(source.options))}
        for node, operand in flow.uses:
            target = self.nodes[node]
            for want in {target.taken(o, operand): None for o in range(len(target.options))}:
                for have in haves:
                    if (have, want) not in flow.chains and all(map(possible, have, want)):
                        flow.chains[have, want] = tuple(steps(have, want, grad))
        if len(flow.uses) == 1 and flow.inside == (True,):
            self._let_through(flow)

    def _let_through(self, flow: Flow) -> None:
        """Leave out changes before a view of the same size that can take the value as it is made: the same change
        behind the view costs as much."""
        ((node, operand),) = flow.uses
        view, value = self.nodes[node], self.nodes[flow.source].values[flow.output]
        if view.runs or view.kind != "op" or len(view.values) != 1 or view.values[0].bytes != value.bytes:
            return
        out = {view.taken(o, operand): view.given(o) for o in range(len(view.options))}
        flow.chains = {
            (have, want): chain
            for (have, want), chain in flow.chains.items()
            if have == want or have not in out or not _alike(out[have], out[want], have, want)
        }

    def _keeps(self) -> list[Keep]:
        """Who keeps whose memory, at every place."""
        by_name = {n.name: n for n in self.folded.traced.graph.nodes}
        kept: dict[tuple[str, int], list[_Use]] = defaultdict(list)
        for position, run in enumerate(self.folded.sequence):
            for node in self.folded.runs[run].nodes:
                for root in () if is_pick(node) else info(node).keeps:
                    through = [i for i, n in enumerate(operands(node)) if n is not None and info(n).root == root]
                    operand = -1 if root == node.name else next(iter(through), -2)
                    home = self._position(by_name[root], run, position)
                    kept[root, home].append(_Use(self.index[self.folded.same[node]], operand, position))
        keeps: dict[object, Keep] = {}
        for (root, _), uses in kept.items():
            keepers = tuple((u.node, u.operand) for u in uses)
            several = len({u.position for u in uses}) > 1
            rep = self.index[self.folded.same[value_of(by_name[root])[0]]]
            keep = keeps.setdefault((rep, keepers, several), Keep(rep, keepers))
            keep.places.append(tuple(u.position for u in uses))
        return list(keeps.values())

    def _state(self) -> dict[int, list[tuple[int, ...]]]:
        """Parameters: the positions that hold each, by name."""
        where: dict[tuple[int, str], dict[int, None]] = defaultdict(dict)
        for position, run in enumerate(self.folded.sequence):
            for node in self.folded.runs[run].nodes:
                for parameter in node.all_input_nodes:
                    if info(parameter).kind == "parameter":
                        name = self._name(parameter, position)
                        where[self.index[self.folded.same[parameter]], name][position] = None
        state: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for (index, _), positions in where.items():
            state[index].append(tuple(positions))
        return dict(state)

    def _needed(self, used: Used) -> dict[fx.Node, set[int]]:
        """The positions that need what a stage computes for itself, at second hand too."""
        needed: dict[fx.Node, set[int]] = defaultdict(set)
        for source, positions in self.places.items():
            needed[source] |= positions
        for (source, _, home, _), uses in used.items():
            if home == -1:
                needed[source] |= {u.position for u in uses if u.position >= 0}
        for node in reversed(self.folded.free):
            for source in node.all_input_nodes:
                needed[value_of(source)[0]] |= needed[value_of(node)[0]]
        return needed

    def _shared(self) -> dict[int, list[tuple[int, ...]]]:
        """Nodes that every stage computes for itself, with the positions that need them."""
        shared: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for node in self.folded.free:
            if not is_pick(node):
                shared[self.index[self.folded.same[node]]].append(tuple(sorted(self.needed[node])))
        for update, places in self.writes.items():
            shared[update] += [(p,) for p in places]
        return dict(shared)


def _alike(have: Placements, want: Placements, before: Placements, after: Placements) -> bool:
    """Whether a change behind a view is the change before it."""
    kinds = [tuple(p.kind for p in placed) for placed in (have, want, before, after)]
    parted = any(p.parts for placed in (have, want, before, after) for p in placed)
    return kinds[0] == kinds[2] and kinds[1] == kinds[3] and not parted and all(map(possible, have, want))


def _regions(sequence: Sequence[int]) -> dict[int, int]:
    """Run that stands at several positions -> the first run of the traced blocks it continues."""
    regions: dict[int, int] = {}
    for here, following in itertools.pairwise(sequence):
        if following <= here:
            regions |= dict.fromkeys(range(following, here + 1), following - (here + 1 - following))
    return regions


def _firsts(arguments: Sequence[fx.Node | None]) -> list[int]:
    """For every operand the first that is the same value."""
    values = [None if n is None else value_of(n) for n in arguments]
    return [values.index(v) for v in values]


def _bytes(record: Info, output: int) -> float:
    size = float(record.dtypes[output].itemsize)
    for extent in record.shapes[output]:
        size *= extent
    return size


def _hints(folded: Folded, nodes: list[fx.Node], size: int) -> Hints:
    """Placements with parts that consumers would like, walked from the end: a fused q, k, v product learns from
    the split behind it."""
    hints: dict[tuple[fx.Node, int], set[Placement]] = defaultdict(set)
    for node in reversed(nodes) if size > 1 else ():
        if info(node).kind != "op":
            continue
        wanted = tuple(hints[node, 0])
        options = strategies(info(node).name, shape_args(node), info(node).shapes, size, wanted)
        for index, operand in enumerate(operands(node)):
            if operand is not None:
                source, output = value_of(operand)
                hints[folded.same[source], output] |= {
                    p for s in options if (p := s.inputs[index]) is not None and (p.parts or p.kind == "M")
                }
    return hints


def _samples(node: fx.Node) -> list[Strategy]:
    """Strategies along `dp`: those that split samples, or else none. Too few samples are traced to divide, so that
    they are taken to be split into one piece."""
    options = _known(node, 1, ())
    if info(node).kind == "parameter":
        return [o for o in options if o.name in "RC"]
    return [o for o in options if _counts_samples(node, o)] or [o for o in options if o.name in "RCP"]


def _letters(node: fx.Node, size: int, wanted: Sequence[Placement], forced: bool) -> list[Strategy]:
    """Strategies along `tp`: those that do not split samples."""
    options = [o for o in _known(node, size, wanted) if not _counts_samples(node, o)]
    if forced and is_contraction(info(node).name):
        weights = [i for i, n in enumerate(operands(node)) if n is not None and info(n).kind == "parameter"]
        split = [o for o in options if all(_is_split(o.inputs[i]) for i in weights) and o.shards_work]
        return split or options
    return options


def _known(node: fx.Node, size: int, wanted: Sequence[Placement]) -> list[Strategy]:
    """All strategies of a node along one axis."""
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
    return options if record.dtype.is_floating_point else [o for o in options if o.name != "P"]


def _counts_samples(node: fx.Node, option: Strategy) -> bool:
    record = info(node)
    places = [info(n).batch if n is not None else None for n in operands(node)] if record.kind == "op" else []
    pairs = [*zip(option.inputs, places, strict=True), *zip(option.outputs, [record.batch], strict=False)]
    return any(p is not None and p.kind == "S" and p.dim == b for p, b in pairs if b is not None)


def _is_split(placement: Placement | None) -> bool:
    return placement is not None and placement.kind == "S"


def _collide(pair: Sequence[Strategy]) -> bool:
    """Whether two axes split the same dim of the same tensor."""
    for one, other in itertools.combinations(pair, 2):
        for a, b in zip((*one.inputs, *one.outputs), (*other.inputs, *other.outputs), strict=True):
            if a is not None and b is not None and a.kind == b.kind == "S" and a.dim == b.dim:
                return True
    return False
