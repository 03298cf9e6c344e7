"""Table -> sizes: bytes and FLOPs of every strategy, every reshard and every saved tensor.

A size is linear in four terms, with d data-parallel ranks and s = samples of a micro-batch / samples traced:

    size(d, s) = a + b / d + c s + e s / d

A size is kept as its coefficients (a, b, c, e), which do not depend on d and s. `prices.Terms.basis` is
(1, 1 / d, s, s / d).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autopart.cost.compute import (
    LOSS,
    NO_SIZES,
    SPLIT_LOSS,
    Array,
    backward_gradient_bytes,
    divides_saved,
    divides_weights,
    largest_gradient_bytes,
)
from autopart.cost.liveness import MODES
from autopart.ir.graph import KernelBytes
from autopart.sharding.notation import saved_as
from autopart.sharding.resharding import Reshard, Step
from autopart.sharding.strategy_table import Chain, Node, Placements, SavedTensor, StrategyTable, Value

ReshardPath = tuple[Placements, ...]
"""The placements that a value passes through on its way to another, the last included."""


class Sizes:
    """A table's sizes as rows of four coefficients: of every strategy, every reshard and every saved tensor.

    first       [nodes + 1]: index of the node's first strategy among all strategies
    times       [strategies]: how many times the operator runs at a position;  reshard_times: [reshards]
    which       [strategies]: index of the row of work; strategies with equal work have one row
    flops, moved, peak_dtype, rest, factors
                rows of work: FLOPs and bytes moved, the dtype of the peak (`compute.peak_dtype_of`), then the other
                columns of `compute.Work`, and which of the four terms the batch, m, n and k of a matrix product grow
                with
    parameters  rows of a parameter: bytes, whether it has a gradient, whether the gradient is a partial sum over dp,
                whether over tp, and bytes of all trained parameters that travel with it (`_together`)
    parameter_of  [strategies]: index of the row of `parameters`
    saved       [MODES, strategies]: 1 where the mode saves the operator's results
    rerun       [MODES, strategies]: 1 where the mode runs the operator again
    reshards    (index in `StrategyTable.value_uses`, placement made, path) of every reshard -> its last step, its value
    reshards_rerun  [MODES, reshards]: 1 where the mode runs the reshard again for each of its uses
    saved_placements  of every saved tensor, for each of its distinct savers: the placement of the saved memory under
                each strategy of the saver (of the root, where the tensor is saved as made)
    saved_index  (index in `StrategyTable.saved_tensors`, placement) -> index among all saved tensors
    """

    def __init__(self, table: StrategyTable) -> None:
        self.table = table
        self.first = np.cumsum([0, *(len(n.options) for n in table.nodes)])
        options = [(n, o) for n in table.nodes for o in range(len(n.options))]
        rows, self.which = np.unique([self._work(n, o) for n, o in options], axis=0, return_inverse=True)
        self.flops, self.moved, self.peak_dtype, self.rest, factors = np.split(rows, [4, 8, 9, -4], axis=1)
        self.factors = factors.astype(int)
        self.output_bytes = np.array([self._output_bytes(n, o) for n, o in options])
        self.largest_gradient, self.backward, self.weights = np.array(
            [self._backward(n, o) for n, o in options]
        ).swapaxes(0, 1)
        self.inner = np.array([self._inner(n, o) for n, o in options])
        self.streamed = np.array([self._kernel_bytes(n, o)[2:] for n, o in options])
        self.means = np.array([[self._mean(n, o, axis) for axis in ("dp", "tp")] for n, o in options])
        self.grad = np.array([float(n.grad) for n, _ in options])
        self.times = np.array([float(n.times) for n, _ in options])
        self.saved, self.rerun = (
            np.repeat(by_mode, np.diff(self.first), axis=1).astype(float) for by_mode in (table.saved, table.rerun)
        )
        weight = [self._weight(n, o) for n, o in options]
        sums = np.array([[self._sums(n, o, axis) for axis in ("dp", "tp")] for n, o in options])
        together = np.repeat(self._together(), np.diff(self.first))
        rows = np.column_stack([weight, self.grad, sums, together])
        self.parameters, self.parameter_of = np.unique(rows, axis=0, return_inverse=True)
        self.reshards: dict[tuple[int, Placements, ReshardPath], tuple[Step, Value]] = {}
        for index, used in enumerate(table.value_uses):
            value = table.nodes[used.source].values[used.output]
            for (have, _), chain in used.chains.items():
                for key, step in zip(reshard_paths(chain), chain, strict=True):
                    self.reshards[index, have, key] = step, value
        relevant = [self.use_rerun(index, have) for index, have, _ in self.reshards]
        self.reshards_rerun = np.array([rerun.all(1) for rerun in relevant], dtype=float)
        self.reshards_rerun = self.reshards_rerun.reshape(-1, len(table.saved)).T
        self.reshard_groups: dict[tuple[str, Reshard, bool], list[int]] = {}
        for i, (step, value) in enumerate(self.reshards.values()):
            self.reshard_groups.setdefault((table.axes[step.axis], step.row, value.grad), []).append(i)
        self.reshard_times = np.array([float(table.value_uses[index].times) for index, *_ in self.reshards])
        reshards = self.reshards.values()
        self.collective_bytes = _rows(self._collective_bytes(step, value) for step, value in reshards)
        self.reshard_bytes = _rows(self.byte_coefficients(value, step.after) for step, value in reshards)
        self.saved_placements = [
            [self._saved_placements(tensor, *saver) for saver in dict.fromkeys(tensor.savers)]
            for tensor in table.saved_tensors
        ]
        self.saved_index: dict[tuple[int, Placements], int] = {}
        for index, savers in enumerate(self.saved_placements):
            for placed in dict.fromkeys(p for options in savers for p in options):
                self.saved_index[index, placed] = len(self.saved_index)
        self.saved_tensor_bytes = _rows(self.root(table.saved_tensors[k], placed) for k, placed in self.saved_index)

    def use_rerun(
        self, index: int, have: Placements, uses: Collection[tuple[int, int]] | None = None
    ) -> NDArray[np.bool_]:
        """[MODES, uses]: whether backward runs the reshards of a value again for each of `uses` (None: all uses).
        `have` is the placement in which the value is made.

        Reshards of a partial sum are part of the segment that makes the sum. In mode "mincut" they run again only for
        uses in that segment."""
        used = self.table.value_uses[index]
        rerun = self.table.use_rerun[index].copy()
        if any(p.kind == "P" for p in have):
            rerun[MODES.index("mincut")] &= used.inside
        return rerun if uses is None else rerun[:, [use in uses for use in used.uses]]

    def separable_bound(self, costs: Array, allowed: Mapping[int, Iterable[int]]) -> float:
        """Lower bound on the cost of every choice, each variable minimised on its own:

            sum over nodes of min cost of a strategy  +  sum over saved tensors of min cost of a placement

        `costs` are those of strategies, or of strategies, reshards and saved tensors. `allowed`: node -> the strategies
        that it may take; nodes that are not named may take all."""
        each = costs[: self.first[-1]]
        if allowed:
            each = each.copy()
            for node, left in allowed.items():
                start, end = self.first[node : node + 2]
                each[list(set(range(start, end)).difference(start + o for o in left))] = np.inf
        bound = np.minimum.reduceat(each, self.first[:-1]).sum()
        saved = costs[len(each) + len(self.reshards) :]
        if len(saved):
            bound += np.minimum.reduceat(saved, self.first_saved).sum()
        return float(bound)

    @cached_property
    def first_saved(self) -> NDArray[np.int_]:
        """Of every saved tensor of the table, the first index in `saved_index`."""
        return np.unique([tensor for tensor, _ in self.saved_index], return_index=True)[1]

    @cached_property
    def single_parameter(self) -> NDArray[np.bool_]:
        """[positions]: whether the position reads exactly one parameter."""
        read = np.zeros(len(self.table.labels), dtype=int)
        for _, every in self.holders.values():
            np.add.at(read, every, 1)
        return read == 1

    @cached_property
    def holders(self) -> dict[int, tuple[NDArray[np.int_], NDArray[np.int_]]]:
        """Node of a parameter -> (positions that are the only reader of their copy of it, all positions that read a
        copy)."""
        return {
            index: (
                np.array([p for p, *more in places if not more], dtype=int),
                np.array([p for at in places for p in at]),
            )
            for index, places in self.table.state.items()
        }

    @cached_property
    def reshard_index(self) -> dict[tuple[int, Placements, ReshardPath], int]:
        """The keys of `reshards`, numbered."""
        return {key: i for i, key in enumerate(self.reshards)}

    @cached_property
    def chain_reshards(self) -> list[dict[tuple[Placements, Placements], list[int]]]:
        """Of every value of `StrategyTable.value_uses`: the keys of its `chains` -> the numbers of their reshards."""
        return [
            {
                (have, want): [self.reshard_index[index, have, path] for path in reshard_paths(chain)]
                for (have, want), chain in used.chains.items()
            }
            for index, used in enumerate(self.table.value_uses)
        ]

    def byte_coefficients(self, value: Value, placed: Placements) -> Array:
        """A value's bytes on a rank, as coefficients of `prices.Terms.basis`."""
        return self._coefficients(value.bytes, value.batch, [p.kind == "S" for p in placed])

    def _saved_placements(self, tensor: SavedTensor, node: int, operand: int) -> list[Placements]:
        user, root = self.table.nodes[node], self.table.nodes[tensor.root]
        if operand == -2:
            return [as_saved(root.given(o, tensor.output)) for o in range(len(root.options))]
        if operand == -1:
            return [as_saved(user.given(o, tensor.output)) for o in range(len(user.options))]
        return [as_saved(user.taken(o, operand)) for o in range(len(user.options))]

    def _coefficients(self, amount: float, batch: bool, sharded: Iterable[bool]) -> Array:
        """An amount on a rank, as coefficients of `prices.Terms.basis`. `batch`: it grows with the samples. `sharded`,
        by axis: the ranks of the axis share it equally."""
        coefficients, term = np.zeros(4), 2 * batch
        for axis, over_axis in zip(self.table.axes, sharded, strict=True):
            if over_axis and axis == "dp":
                term += 1
            elif over_axis:
                amount /= self.table.tp
        coefficients[term] = amount
        return coefficients

    def _work(self, node: Node, option: int) -> Array:
        """A row of work: FLOPs, bytes moved, and the other columns of `compute.Work`."""
        flops = self._coefficients(node.flops, node.batch, [s.shards_work for s in node.options[option]])
        sizes, factors = self._matrix(node, option)
        rest = [node.peak_dtype, node.backward_ratio, node.launches, node.kind_index, *sizes, *node.grads, *factors]
        return np.concatenate([flops, self._moved(node, option), rest])

    def _matrix(self, node: Node, option: int) -> tuple[tuple[float, ...], list[int]]:
        if node.matrix is None:
            return NO_SIZES, [0] * 4
        dims, factors = list(node.matrix.sizes[:4]), [2 * grows for grows in node.matrix.grows]
        for axis, strategy in zip(self.table.axes, node.options[option], strict=True):
            role = node.matrix.role(strategy)
            if role is not None and axis == "dp":
                factors[role] += 1
            elif role is not None:
                dims[role] /= self.table.tp
        return (*dims, *node.matrix.sizes[4:]), factors

    def _inner(self, node: Node, option: int) -> Array:
        chosen = node.options[option]
        fixed = self._coefficients(node.fixed, False, [divides_weights(s, node.weights) for s in chosen])
        return fixed + self._coefficients(node.inner - node.fixed, node.batch, map(divides_saved, chosen))

    def _kernel_bytes(self, node: Node, option: int) -> list[Array]:
        """The fields of `Node.kernel_bytes`, each as coefficients. What grows with the samples is divided over dp."""
        if not node.kernel_bytes:
            return [np.zeros(4)] * len(KernelBytes._fields)
        pairs = zip(self.table.axes, node.options[option], strict=True)
        over_dp = [axis == "dp" and strategy.shards_work for axis, strategy in pairs]
        each = KernelBytes(*node.kernel_bytes[option])
        grown = {name: self._coefficients(size, node.batch, over_dp) for name, size in each._asdict().items()}
        return [*(grown | {"chunk": np.array([each.chunk, 0.0, 0.0, 0.0])}).values()]

    def _output_bytes(self, node: Node, option: int) -> Array:
        made = np.zeros(4)
        for i, value in enumerate(node.values if node.kind == "op" else ()):
            made += self.byte_coefficients(value, node.given(option, i))
        return made

    def _backward(self, node: Node, option: int) -> tuple[Array, Array, Array]:
        """(`largest_gradient_bytes`, `backward_gradient_bytes` without the gradients of parameters, bytes of the
        parameters with gradients)."""
        made, taken, weights = self._output_bytes(node, option), np.zeros(4), np.zeros(4)
        for i, operand in enumerate(node.operands if node.product else node.operands[:1]):
            if operand is not None:
                source, output = operand
                value = self.table.nodes[source].values[output]
                into = weights if i in node.weights else taken
                into += self.byte_coefficients(value, node.taken(option, i)) * value.grad
        split = any(strategy.local == SPLIT_LOSS for strategy in node.options[option])
        loss = node.kind_index == LOSS
        backward = backward_gradient_bytes(made, taken, 0.0 * weights, node, loss, split)
        workspace, chunk, *_ = self._kernel_bytes(node, option)
        backward += workspace + chunk
        return largest_gradient_bytes(made, taken, node, loss, split), backward, weights

    def _moved(self, node: Node, option: int) -> Array:
        moved = self._output_bytes(node, option)
        read = {
            (first, node.taken(option, i)): None for i, first in enumerate(node.first_same_operand) if node.operands[i]
        }
        for first, placed in read:
            source, output = node.operands[first]  # type: ignore[misc]
            moved += self.byte_coefficients(self.table.nodes[source].values[output], placed)
        return moved

    def _together(self) -> Array:
        """[nodes]: of a parameter that one position reads, the bytes of all trained parameters of the position, split
        over tp; of one that several read, its own. The splits that are chosen do not change them."""
        table, found = self.table, np.zeros(len(self.table.nodes))
        total = np.zeros(len(table.labels))
        for index, places in table.state.items():
            found[index] = table.nodes[index].values[0].bytes * table.nodes[index].grad / table.tp
            total[[p for place in places for p in place]] += found[index]
        for index, (own, every) in self.holders.items():
            found[index] = total[own[0]] if len(own) == len(every) else found[index]
        return found

    def _weight(self, node: Node, option: int) -> float:
        return float(self.byte_coefficients(node.values[0], node.given(option))[0]) if node.kind == "parameter" else 0.0

    def _sums(self, node: Node, option: int, axis: str) -> bool:
        """Whether a parameter's gradient is a partial sum over an axis."""
        if node.kind != "parameter" or not node.grad or axis not in self.table.axes:
            return False
        return node.given(option)[self.table.axes.index(axis)].kind == "C"

    def _mean(self, node: Node, option: int, axis: str) -> bool:
        """Whether each rank of an axis takes the mean of its shard, so that the result is divided by the number of
        ranks."""
        return axis in self.table.axes and node.options[option][self.table.axes.index(axis)].local == "mean"

    def _collective_bytes(self, step: Step, value: Value) -> Array:
        """The bytes by which a reshard is priced: of the value, whole along the axis of the step; for an all-to-all, of
        the shard on a rank."""
        of_shard = step.row.forward == "all_to_all"
        sharded = [p.kind == "S" and (of_shard or i != step.axis) for i, p in enumerate(step.before)]
        return self._coefficients(value.bytes, value.batch, sharded)

    def root(self, tensor: SavedTensor, placed: Placements) -> Array:
        """Bytes that are saved of a tensor in a placement, in all iterations of a loop."""
        return tensor.times * self.byte_coefficients(self.table.nodes[tensor.root].values[tensor.output], placed)


def _rows(sizes: Iterable[Array]) -> Array:
    """[sizes, 4]: an array of coefficients; [0, 4] where there are none."""
    return np.array(list(sizes)).reshape(-1, 4)


def as_saved(placed: Placements) -> Placements:
    """The placement of the memory that autograd saves of a value: G is saved as the shard it was gathered from."""
    return tuple(map(saved_as, placed))


def reshard_paths(chain: Chain) -> list[ReshardPath]:
    """The `ReshardPath` to each step of a chain."""
    after = tuple(step.after for step in chain)
    return [after[: i + 1] for i in range(len(after))]
