"""LayeredGraph -> StrategyTable: everything there is to decide, for one size of the tensor-parallel axis.

Along `dp` strategies split samples, wherever an operator's rule allows it; along `tp` they split any other letter. The
prices come from `autopart.cost`. `autopart.passes.ilp` states the integer linear program over the table;
`autopart.passes.constraint_matrix` has its equations as arrays.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import fx

from autopart.cost.compute import backward_ratio_of, kind_of, peak_dtype_of
from autopart.cost.liveness import MODES
from autopart.errors import PartitionError
from autopart.hardware.rows import DTYPES, Device
from autopart.ir.graph import info, operands, shape_args, value_of
from autopart.ir.labels import is_block
from autopart.ir.layered_graph import LayeredGraph
from autopart.passes.checkpoint_cut import is_view, mode_cut
from autopart.passes.kernel_bytes import is_kernel, kernel_bytes
from autopart.passes.loop_iterations import first_same_operand
from autopart.passes.sample_splits import counts_samples, known_strategies, sample_splits
from autopart.passes.value_positions import Write, value_positions
from autopart.sharding.notation import AGAIN, C, G, Placement, R, Strategy
from autopart.sharding.resharding import possible, steps
from autopart.sharding.rules import is_contraction, strategies
from autopart.sharding.strategy_table import Node, Placements, StrategyTable, Value, ValueUses

END = "loss"
"""The key of the pseudo-node that takes the loss, which is whole on every rank."""

Hints = Mapping[tuple[fx.Node, int], set[Placement]]


def formulate(layered: LayeredGraph, device: Device, tp: int, forced: bool = False) -> StrategyTable:
    """The table for `tp` ranks along the tensor-parallel axis, and for any number along the data-parallel axis.

    With `forced`, the weights of every product that can be split over `tp` have to be. Raises PartitionError where no
    product can be.
    """
    axes = ("dp", "tp") if tp > 1 else ("dp",)
    return _Builder(layered, device, axes, tp, forced).table()


class _Builder:
    """Writes the nodes with their strategies, and the values with the reshards between them."""

    def __init__(self, layered: LayeredGraph, device: Device, axes: tuple[str, ...], tp: int, forced: bool) -> None:
        self.layered, self.device, self.axes, self.tp, self.forced = layered, device, axes, tp, forced
        self.positions = value_positions(layered)
        self.segment_of = layered.segment_of()
        self.nodes: list[Node] = []

    def table(self) -> StrategyTable:
        layered, positions = self.layered, self.positions
        hints = _hints(layered, positions.nodes, self.tp)
        self.nodes = [self._node(node, hints) for node in positions.nodes]
        if self.forced and self.tp > 1:
            self._check_splits()
        self.nodes += [self._write(write) for write in positions.writes]
        self.nodes.append(Node(END, "end", [(Strategy("R", (R,), ()),) * len(self.axes)], []))
        iterations = [alike for alike in positions.iterations if self._share_options(alike)]
        saved, rerun = self._checkpointing()
        inputs = [i for i, n in enumerate(positions.nodes) if info(n).kind == "input"]
        written = [[write.buffer, len(positions.nodes) + i] for i, write in enumerate(positions.writes)]
        return StrategyTable(
            axes=self.axes,
            tp=self.tp,
            nodes=self.nodes,
            value_uses=[self._chains(replace(used, chains={})) for used in positions.value_uses],
            saved_tensors=positions.saved_tensors,
            labels=layered.labels,
            segment_classes=tuple(layered.segments[r].segment_class for r in layered.sequence),
            block=tuple(map(is_block, layered.labels)),
            state=positions.state,
            shared=positions.shared,
            tied=[tied for tied in (inputs, *written) if len(tied) > 1],
            saved=saved,
            rerun=rerun,
            use_rerun=self._use_rerun(rerun),
            iterations=iterations,
        )

    def _share_options(self, alike: Sequence[int]) -> bool:
        """Leave the nodes of an operator in all iterations of a loop the options that all of them have. False, and
        nothing is left out, where there is none."""
        shared = set(self.nodes[alike[0]].options).intersection(*(self.nodes[n].options for n in alike[1:]))
        for n in alike if shared else ():
            self.nodes[n].options = [option for option in self.nodes[alike[0]].options if option in shared]
        return bool(shared)

    def _checkpointing(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """[MODES, nodes]: `StrategyTable.saved` and `rerun`."""
        found = np.zeros((2, len(MODES), len(self.nodes)), dtype=bool)
        for i, node in enumerate(self.positions.nodes):
            if node in self.segment_of:
                cuts = [mode_cut(self.layered, self.segment_of[node], mode) for mode in MODES]
                found[:, :, i] = [node in cut.saved for cut in cuts], [node in cut.rerun for cut in cuts]
        return found[0], found[1]

    def _use_rerun(self, rerun: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
        """`StrategyTable.use_rerun`. In mode "mincut" a use runs its reshards again if its operator runs again, or if
        backward reads the value, or a view of it, in the placement that the operator takes."""
        saved = {saver for tensor in self.positions.saved_tensors for saver in tensor.savers}
        views = {i for i, node in enumerate(self.positions.nodes) if is_view(node)}
        inside = defaultdict[int, set[tuple[int, int]]](set)
        for used in self.positions.value_uses:
            inside[used.source] |= set(itertools.compress(used.uses, used.inside))

        def is_saved(use: tuple[int, int]) -> bool:
            node, _ = use
            return use in saved or (node in views and any(map(is_saved, inside[node])))

        found = []
        for used in self.positions.value_uses:
            use_rerun = np.ones((len(MODES), len(used.uses)), dtype=bool)
            use_rerun[MODES.index("none")] = False
            mincut = MODES.index("mincut")
            use_rerun[mincut] = [is_saved(use) or rerun[mincut, use[0]] for use in used.uses]
            found.append(use_rerun)
        return found

    def _node(self, node: fx.Node, hints: Hints) -> Node:
        record = info(node)
        inputs = [info(n) for n in node.all_input_nodes]
        is_op = record.kind == "op"
        segment = self.segment_of.get(node)
        options = self._options(node, hints)
        ranks = [self.tp if axis == "tp" else 1 for axis in self.axes]
        return Node(
            key=self.layered.keys[node],
            kind=record.kind,
            options=options,
            values=[Value(float(size), record.batch is not None, record.grad) for size in record.output_bytes],
            operands=[self._operand(n) for n in operands(node)] if is_op else [],
            first_same_operand=first_same_operand(node) if is_op else [],
            flops=record.flops,
            batch=record.batch is not None or any(i.batch is not None for i in inputs),
            product=record.product,
            matrix=record.matrix,
            grads=record.grads,
            peak_dtype=peak_dtype_of(record, self.device) if is_op else len(DTYPES),
            backward_ratio=backward_ratio_of(record, inputs),
            launches=int(is_op and not record.view),
            kind_index=kind_of(record) if is_op else 0,
            inner=float(record.inner),
            fixed=float(record.fixed),
            grad=record.grad,
            view=record.view,
            logits=record.logits,
            weights=record.weights,
            gradient_copies=record.gradient_copies,
            kernel_bytes=[kernel_bytes(node, option, ranks) for option in options] if is_kernel(node) else [],
            segment_class=-1 if segment is None else self.layered.segments[segment].segment_class,
            times=self.positions.times[node] or 1,
        )

    def _check_splits(self) -> None:
        """Raise PartitionError where no product can be split over the tensor-parallel axis that was asked for."""
        products = [i for i, n in enumerate(self.positions.nodes) if is_contraction(info(n).name)]
        if not products or any(option[1].shards_work for i in products for option in self.nodes[i].options):
            return
        taken = [info(n) for i in products for n in self.positions.nodes[i].all_input_nodes]
        sizes = sorted({s for r in taken for dim, s in enumerate(r.shape) if s > 1 and dim != r.batch})
        nodes = [self.positions.nodes[i] for i in products]
        able = (d for d in range(2, 65) if any(o.shards_work for n in nodes for o in _letters(n, d, (), False)))
        fits = list(itertools.islice(able, 6))
        raise PartitionError(
            f"tp={self.tp} splits nothing",
            f"no matrix product has a dim that {self.tp} divides and that may be split; the sizes are "
            f"{', '.join(map(str, sizes))}",
            f"tp={', '.join(map(str, fits))}" if fits else "pp or dp: no tp splits them",
        )

    def _operand(self, argument: fx.Node | None) -> tuple[int, int] | None:
        if argument is None:
            return None
        source, output = value_of(argument)
        return self.positions.index[self.layered.same[source]], output

    def _options(self, node: fx.Node, hints: Hints) -> list[tuple[Strategy, ...]]:
        """The strategies of a node, each one along every axis. No two axes split the same dim of a tensor."""
        wanted = tuple(sorted(hints.get((node, 0), ()), key=str))
        samples = sample_splits(self.positions, self.layered.traced.micro_batch)
        along = [samples[node] if axis == "dp" else _letters(node, self.tp, wanted, self.forced) for axis in self.axes]
        return [pair for pair in itertools.product(*along) if not _collide(pair)]

    def _write(self, write: Write) -> Node:
        """The pseudo-operator that writes the new value of a buffer, in the placement of the buffer."""
        known = self.nodes[write.buffer]
        options = [tuple(Strategy(s.name, s.outputs * 2, s.outputs) for s in option) for option in known.options]
        reads: list[tuple[int, int] | None] = [(write.buffer, 0), write.taken]
        return Node(
            f"{known.key}/update", "op", options, known.values, reads, [0, 1], segment_class=write.segment_class
        )

    def _chains(self, used: ValueUses) -> ValueUses:
        """Add the possible reshards to a value."""
        source = self.nodes[used.source]
        grad = source.values[used.output].grad
        haves = {source.given(o, used.output): None for o in range(len(source.options))}
        for node, operand in used.uses:
            target = self.nodes[node]
            for want in {target.taken(o, operand): None for o in range(len(target.options))}:
                for have in haves:
                    if (have, want) not in used.chains and all(map(possible, have, want)):
                        used.chains[have, want] = steps(have, want, grad)
        if len(used.uses) == 1 and used.inside == (True,):
            self._drop_reshards_before_view(used)
        return used

    def _drop_reshards_before_view(self, used: ValueUses) -> None:
        """Remove reshards before a view that can take the value as it is made and gives as many bytes: the same reshard
        behind the view costs as much."""
        ((node, operand),) = used.uses
        view, value = self.nodes[node], self.nodes[used.source].values[used.output]
        if view.launches or view.kind != "op" or len(view.values) != 1 or view.values[0].bytes != value.bytes:
            return
        out = {view.taken(o, operand): view.given(o) for o in range(len(view.options))}
        used.chains = {
            (have, want): chain
            for (have, want), chain in used.chains.items()
            if have == want or have not in out or not _same_reshard(out[have], out[want], have, want)
        }


def _same_reshard(have: Placements, want: Placements, before: Placements, after: Placements) -> bool:
    """Whether the reshard `have` to `want` behind a view is the same as `before` to `after` in front of it."""
    kinds = [tuple(p.kind for p in placed) for placed in (have, want, before, after)]
    parted = any(p.parts for placed in (have, want, before, after) for p in placed)
    return kinds[0] == kinds[2] and kinds[1] == kinds[3] and not parted and all(map(possible, have, want))


def _hints(layered: LayeredGraph, nodes: list[fx.Node], size: int) -> Hints:
    """(node, output) -> placements with parts, M or G in which users would take the output, found from the end.

    So a fused product for q, k and v is split in three parts, since the split behind it would take them so.
    """
    hints: dict[tuple[fx.Node, int], set[Placement]] = defaultdict(set)
    for node in reversed(nodes) if size > 1 else ():
        if info(node).kind != "op":
            continue
        wanted = tuple(hints[node, 0])
        options = strategies(info(node).name, shape_args(node), info(node).shapes, size, wanted)
        options += [regathered for o in options for regathered in _regathered(node, o, wanted)]
        for index, operand in enumerate(operands(node)):
            if operand is not None:
                source, output = value_of(operand)
                hints[layered.same[source], output] |= {
                    p for s in options if (p := s.inputs[index]) is not None and (p.parts or p.kind in "MG")
                }
    return hints


def _letters(node: fx.Node, size: int, wanted: Sequence[Placement], forced: bool) -> list[Strategy]:
    """The strategies along `tp`: those that split no samples. `forced`: a product's weights, its parameters of the most
    dims, have to be split; biases need not be."""
    options = [o for o in known_strategies(node, size, wanted) if not counts_samples(node, o)]
    options += [regathered for o in options for regathered in _regathered(node, o, wanted)]
    if forced and is_contraction(info(node).name):
        given = [(i, info(n)) for i, n in enumerate(operands(node)) if n is not None]
        most = max((len(record.shape) for _, record in given if record.kind == "parameter"), default=0)
        weights = [i for i, record in given if record.kind == "parameter" and len(record.shape) == most]
        split = [o for o in options if all(_is_split(o.inputs[i]) for i in weights) and o.shards_work]
        return split or options
    return options


def _regathered(node: fx.Node, option: Strategy, wanted: Sequence[Placement]) -> Iterator[Strategy]:
    """The strategies with placement G in place of C, of two kinds of operators: a product that saves the operand, and
    the views in front of such a product."""
    record = info(node)
    if record.view and G in wanted and option.outputs == option.inputs == (C,):
        yield Strategy("G", (G,), (G,))
    for i, operand in enumerate(operands(node) if record.product and option.shards_work else ()):
        is_saved = operand is not None and info(operand).kind != "parameter" and info(operand).root in record.saves
        if is_saved and option.inputs[i] == C:
            inputs = tuple(G if j == i else p for j, p in enumerate(option.inputs))
            yield replace(option, name=option.name + AGAIN, inputs=inputs)


def _is_split(placement: Placement | None) -> bool:
    return placement is not None and placement.kind == "S"


def _collide(pair: Sequence[Strategy]) -> bool:
    """Whether two axes split the same dim of the same tensor."""
    for one, other in itertools.combinations(pair, 2):
        for a, b in zip((*one.inputs, *one.outputs), (*other.inputs, *other.outputs), strict=True):
            if a is not None and b is not None and a.kind == b.kind == "S" and a.dim == b.dim:
                return True
    return False
