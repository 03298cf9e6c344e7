"""A choice of strategies -> its seconds and bytes at every position of the model, and what a stage pays once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from autopart.cost.collectives import p2p_seconds
from autopart.cost.compute import Array
from autopart.cost.liveness import MODES, SegmentBytes
from autopart.cost.prices import Prices
from autopart.cost.sizes import ReshardPath, as_saved, reshard_paths
from autopart.cost.training_state import Training
from autopart.hardware.rows import Link
from autopart.sharding.notation import G, R
from autopart.sharding.strategy_table import Placements, SavedTensor, StrategyTable, ValueUses


@dataclass(frozen=True)
class PerStageOnce:
    """Costs that a stage pays once if it has any of `positions`; other fields are as in `PositionCosts`.

    block_input_bytes   bytes of a value that several blocks read; saved if one of these blocks is recomputed
    pending_grad_bytes  `Training.pending_grad_bytes` of a parameter that several positions read
    """

    positions: tuple[int, ...]
    forward: float = 0.0
    backward: float = 0.0
    saved_bytes: float = 0.0
    state_bytes: tuple[float, float, float] = (0.0, 0.0, 0.0)
    sync_seconds: float = 0.0
    largest_gradient: float = 0.0
    block_input_bytes: float = 0.0
    optimizer_workspace: float = 0.0
    reduced_bytes: float = 0.0
    pending_grad_bytes: float = 0.0
    host_bytes: float = 0.0


@dataclass(frozen=True)
class Crossings:
    """Values that a stage sends where a cut is between their producer and a consumer.

    producers, consumers  [pairs]: positions that make a value and that use it
    saves     [pairs]: whether the consumer saves the value for its backward in mode "none"
    size                  bytes of one value on a rank, per micro-batch
    seconds               to send one value and its gradient
    one                   whether all pairs are of one value, which is sent to a stage once
    grad                  whether its gradient is sent back
    """

    producers: NDArray[np.int_]
    consumers: NDArray[np.int_]
    saves: NDArray[np.bool_]
    size: float
    seconds: float
    one: bool = False
    grad: bool = True


@dataclass
class PositionCosts(SegmentBytes):
    """Costs of a choice, of a micro-batch on one rank. Arrays are [positions], or [rows, positions] as told.

    forward, backward     seconds, nothing recomputed
    recompute_seconds     [MODES, positions]: seconds that the mode adds to the backward
    state_bytes           [3, positions]: bytes of the parameters that the position alone reads, their gradients, their
                          optimizer states
    sync_seconds          of a step: gradient sync that no backward hides, and the optimizer
    overlappable_seconds  of each of `Training.backwards`, on average: gradient sync that the backward of earlier
                          positions can hide
    crossing_seconds      of a step: the part of that sync that the last backward alone can hide
    gather_seconds        of each forward, and of each backward: gathers of parameters that the forward of the position
                          before, and the backward of the position behind, can hide
    reduced_bytes         rows as in `SegmentBytes`; a third row: the sum over parameters that the position alone reads
    optimizer_workspace   bytes of the optimizer's temporaries: the sum over parameters where it steps them at once
                          (`Training.foreach`), else of the largest
    host_bytes            on the host, of the parameters that the position alone reads
    per_stage             costs that a stage pays once;  crossings: values that stages may send
    """

    forward: Array
    backward: Array
    recompute_seconds: Array
    state_bytes: Array
    sync_seconds: Array
    overlappable_seconds: Array
    crossing_seconds: Array
    gather_seconds: Array
    optimizer_workspace: Array
    host_bytes: Array
    training: Training
    per_stage: list[PerStageOnce] = field(default_factory=list)
    crossings: list[Crossings] = field(default_factory=list)


def no_costs(prices: Prices) -> PositionCosts:
    """Zero at every position."""
    n, modes = len(prices.sizes.table.labels), len(MODES)

    def zeros(*rows: int) -> Array:
        return np.zeros((*rows, n))

    return PositionCosts(
        saved_bytes=zeros(modes),
        reused_bytes=zeros(modes),
        block_input_bytes=zeros(),
        regathered_bytes=zeros(),
        largest_gradient=zeros(),
        backward_bytes=zeros(2),
        reduced_bytes=zeros(3),
        single_parameter=prices.sizes.single_parameter,
        forward=zeros(),
        backward=zeros(),
        recompute_seconds=zeros(modes),
        state_bytes=zeros(3),
        sync_seconds=zeros(),
        overlappable_seconds=zeros(),
        crossing_seconds=zeros(),
        gather_seconds=zeros(),
        optimizer_workspace=zeros(),
        host_bytes=zeros(),
        ahead_bytes=zeros(),
        training=prices.terms.training,
    )


def position_costs(prices: Prices, chosen: Sequence[int], link: Link | None) -> PositionCosts:
    """The costs of a choice: the index of every node's strategy. `link` joins stages; None with one stage."""
    table = prices.sizes.table
    at = prices.sizes.first[:-1] + np.array(chosen)
    found = no_costs(prices)
    _add_nodes(found, prices, at)
    _add_parameters(found, prices, at)
    _gather_ahead(found)
    for index, used in enumerate(table.value_uses):
        _add_value(found, prices, chosen, index, used, link)
    for index, tensor in enumerate(table.saved_tensors):
        _add_saved_tensor(found, prices, chosen, index, tensor)
    for item in found.per_stage:
        np.maximum.at(found.largest_gradient, list(item.positions), item.largest_gradient)
        np.maximum.at(found.backward_bytes.T, list(item.positions), 2 * item.largest_gradient)
    return found


def _add_nodes(found: PositionCosts, prices: Prices, at: NDArray[np.int_]) -> None:
    """Add the operators of every position, by its segment class; those of the prelude to `per_stage`."""
    table = prices.sizes.table
    node_classes, position_classes = np.array([n.segment_class for n in table.nodes]), np.array(table.segment_classes)
    for segment_class in sorted(set(table.segment_classes)):
        mine, positions = at[node_classes == segment_class], position_classes == segment_class
        rerun = prices.sizes.rerun[:, mine]
        found.forward[positions] = prices.forward[mine].sum()
        found.backward[positions] = prices.backward[mine].sum()
        found.recompute_seconds[:, positions] = (rerun @ prices.forward[mine])[:, None]
        found.saved_bytes[:, positions] = prices.saved_results[:, mine].sum(1, keepdims=True)
        found.reused_bytes[:, positions] = ((1.0 - rerun) @ prices.inner[mine])[:, None]
        found.largest_gradient[positions] = prices.largest_gradient[mine].max(initial=0.0)
        found.backward_bytes[:, positions] = prices.backward_bytes[:, mine].max(1, initial=0.0, keepdims=True)
    for index, places in table.shared.items():
        i = at[index]
        seconds = float(prices.forward[i]), float(prices.backward[i])
        for consumers in places:
            found.per_stage.append(
                PerStageOnce(
                    consumers, *seconds, float(prices.inner[i]), largest_gradient=float(prices.backward_bytes[1, i] / 2)
                )
            )


def _add_parameters(found: PositionCosts, prices: Prices, at: NDArray[np.int_]) -> None:
    for index, places in prices.sizes.table.state.items():
        i = at[index]
        own, every = prices.sizes.holders[index]
        np.add.at(found.state_bytes.T, own, prices.state_bytes[i])
        np.add.at(found.sync_seconds, own, prices.sync_seconds[i])
        np.add.at(found.overlappable_seconds, own, prices.overlappable_seconds[i])
        np.add.at(found.crossing_seconds, own, prices.crossing_seconds[i])
        np.add.at(found.host_bytes, own, prices.host_bytes[i])
        np.add.at(found.gather_seconds, own, prices.gather_seconds[i])
        (np.add if found.training.foreach else np.maximum).at(
            found.optimizer_workspace, own, prices.optimizer_workspace[i]
        )
        reduced = float(prices.reduced_bytes[i])
        np.add.at(found.reduced_bytes[0], every, reduced)
        np.maximum.at(found.reduced_bytes[1], every, reduced)
        np.add.at(found.reduced_bytes[2], own, reduced)
        for positions in places if len(own) < len(places) else ():
            if len(positions) > 1:
                found.per_stage.append(
                    PerStageOnce(
                        positions,
                        state_bytes=tuple(prices.state_bytes[i].tolist()),
                        sync_seconds=float(
                            prices.sync_seconds[i]
                            + found.training.backwards * (prices.overlappable_seconds[i] + 2 * prices.gather_seconds[i])
                        ),
                        optimizer_workspace=float(prices.optimizer_workspace[i]),
                        reduced_bytes=reduced,
                        pending_grad_bytes=float(prices.pending_grad_bytes[i]),
                        host_bytes=float(prices.host_bytes[i]),
                    )
                )


def _gather_ahead(found: PositionCosts) -> None:
    """Add the bytes of the parameters that are gathered ahead. Where those of a position are too many, no computing
    hides their gathers."""
    training = found.training
    ahead = training.ahead_bytes(found.reduced_bytes[0])
    late = np.where(ahead > 0, 0.0, found.gather_seconds)
    found.gather_seconds -= late
    found.sync_seconds += 2 * training.backwards * late
    found.ahead_bytes[1:] = ahead[:-1]


def _add_value(
    found: PositionCosts, prices: Prices, chosen: Sequence[int], index: int, used: ValueUses, link: Link | None
) -> None:
    """Add the reshards of a value, the bytes that recomputed blocks save of it, and the cost of sending it."""
    sizes, table = prices.sizes, prices.sizes.table
    source = table.nodes[used.source]
    value = source.values[used.output]
    have = source.given(chosen[used.source], used.output)
    wants = {use: table.nodes[use[0]].taken(chosen[use[0]], use[1]) for use in dict.fromkeys(used.uses)}
    partial = any(p.kind == "P" for p in have)
    paid: dict[ReshardPath, list[tuple[int, int]]] = {}
    for use, want in wants.items():
        for key in reshard_paths(used.chains[have, want]):
            paid.setdefault(key, []).append(use)
    producers, consumers = used.ends
    at = producers if partial else consumers
    for key, uses in paid.items():
        i = sizes.reshard_index[index, have, key]
        forward, backward, rerun = prices.reshard_seconds[:, i].tolist()
        if at[0] < 0 or (used.several and not partial):
            for producer, needed in zip(used.producers, used.dependents_by_use, strict=True):
                positions = tuple(sorted({p for use in uses for p in needed[use]}))
                found.per_stage.append(
                    PerStageOnce(positions, forward, backward, largest_gradient=float(prices.reshard_bytes[i]))
                )
                own = [use for use in uses if producer in needed[use]]
                if own:  # the block that makes the value reshards it for itself too, and does so again
                    found.recompute_seconds[:, producer] += rerun * sizes.use_rerun(index, have, own).any(1)
            continue
        np.add.at(found.forward, at, forward)
        np.add.at(found.backward, at, backward)
        np.add.at(found.recompute_seconds.T, at, rerun * sizes.use_rerun(index, have, uses).any(1))
        np.maximum.at(found.largest_gradient, at, prices.reshard_bytes[i])
        np.maximum.at(found.backward_bytes.T, at, 2 * prices.reshard_bytes[i])
    outside = (consumers != producers) & (consumers >= 0)
    if source.kind in ("parameter", "buffer") or not (used.several or outside.any()):
        return

    def bytes_in(placed: Placements) -> float:
        return float(sizes.byte_coefficients(value, placed) @ prices.terms.basis)

    if used.several:
        for producer, places in zip(used.producers, used.consumers_by_use, strict=True):
            for placed in dict.fromkeys(wants[use] for use in places):
                taking = {p for use, where in places.items() if wants[use] == placed for p in where}
                enters = tuple(sorted(p for p in taking if p not in (producer, -1) and table.block[p]))
                if enters:
                    found.per_stage.append(PerStageOnce(enters, block_input_bytes=bytes_in(placed)))
    else:
        blocks = outside & np.array(table.block)[consumers]
        np.add.at(found.block_input_bytes, consumers[blocks], bytes_in(wants[used.uses[0]] if partial else have))
    taken = next(wants[use] for use, inside in zip(used.uses, used.inside, strict=True) if not inside)
    found.crossings += _crossings(table, used, bytes_in(taken if partial else have), link)


def _crossings(table: StrategyTable, used: ValueUses, size: float, link: Link | None) -> Iterator[Crossings]:
    """The `Crossings` of a value of `size` bytes."""
    grad, saving = table.nodes[used.source].values[used.output].grad, table.saving_positions.get(used.source, [])
    seconds = float(p2p_seconds(size, link)) * (1 + grad) if link is not None else 0.0
    if not used.several:
        producers, consumers = used.ends
        away = (consumers != producers) & (consumers >= 0) & (producers >= 0)
        yield Crossings(producers[away], consumers[away], np.isin(consumers[away], saving), size, seconds, grad=grad)
        return
    for producer, at in zip(used.producers, used.consumers, strict=True):
        taking = np.array(sorted(set(at) - {producer, -1}), dtype=int)
        if len(taking) and producer >= 0:
            producing, saves = np.full(len(taking), producer), np.isin(taking, saving)
            yield Crossings(producing, taking, saves, size, seconds, True, grad)


def least_crossings(prices: Prices, link: Link | None) -> list[Crossings]:
    """The `Crossings` of all values, each in the placement of fewest bytes."""
    table, found = prices.sizes.table, list[Crossings]()
    for used in table.value_uses:
        source = table.nodes[used.source]
        if source.kind in ("parameter", "buffer") or all(used.inside):
            continue
        value = source.values[used.output]
        placements = {placed for chain in used.chains for placed in chain}
        least = min(float(prices.sizes.byte_coefficients(value, p) @ prices.terms.basis) for p in placements)
        found += _crossings(table, used, least, link)
    return found


def _add_saved_tensor(
    found: PositionCosts, prices: Prices, chosen: Sequence[int], index: int, tensor: SavedTensor
) -> None:
    placed = {
        saver: options[chosen[tensor.root if saver[1] == -2 else saver[0]]]
        for saver, options in zip(dict.fromkeys(tensor.savers), prices.sizes.saved_placements[index], strict=True)
    }
    _add_regathered(found, prices, chosen, tensor)
    for placement in dict.fromkeys(placed.values()):
        nbytes = float(prices.saved_tensor_bytes[prices.sizes.saved_index[index, placement]])
        if not tensor.several:
            np.add.at(found.saved_bytes[0], tensor.first, nbytes)
            np.add.at(found.reused_bytes.T, tensor.first, nbytes * prices.sizes.table.saved[:, tensor.root])
            continue
        for places in tensor.positions_by_saver:
            positions = tuple(
                sorted({p for saver, where in places.items() if placed[saver] == placement for p in where})
            )
            found.per_stage.append(PerStageOnce(positions, saved_bytes=nbytes))


def _add_regathered(found: PositionCosts, prices: Prices, chosen: Sequence[int], tensor: SavedTensor) -> None:
    """Add the bytes of G operands that a position gathers again in backward, less the shard that it saved."""
    nodes, regathered = prices.sizes.table.nodes, dict[int, Placements]()
    for i, (node, operand) in enumerate(tensor.savers):
        taken = nodes[node].taken(chosen[node], operand) if operand >= 0 else ()
        if G in taken:
            regathered[i] = taken
    for places in tensor.places if regathered else ():
        for position, taken in {places[i]: taken for i, taken in regathered.items()}.items():
            whole = tuple(R if p == G else p for p in taken)
            found.regathered_bytes[position] += (
                prices.sizes.root(tensor, whole) - prices.sizes.root(tensor, as_saved(taken))
            ) @ (prices.terms.basis)
