"""The fastest splits of one interval of positions whose peak bytes fit: the ILP with rows for moments of `liveness`.

Peak memory of a stage is `baseline` + max over moments of (alive bytes - baseline), with `baseline` the bytes before
the first backward. Every term is linear in the ILP's variables: the moments are the rows (10), the sum is row (11) of
`passes.ilp`. The gradients that ranks reduce count as one message; the bytes are an upper bound where a stage sends
several. The search solves these ILPs last, for small models (`refinement`).
"""

from collections.abc import Iterable, Mapping

import numpy as np

from autopart.cost.compute import Array
from autopart.cost.liveness import IN_FLIGHT, MODES, Moment, SegmentBytes, StageBytes, gathering_ahead, moments
from autopart.cost.prices import Prices
from autopart.passes.constraint_matrix import Entries
from autopart.passes.solve import Solution
from autopart.passes.split_problem import Capacity, SplitProblem
from autopart.plan.schedules import receive_buffer_bytes
from autopart.planner.allowed_choices import Options
from autopart.planner.ilp_model import Model
from autopart.planner.objective import SyncWindows
from autopart.planner.search_points import SearchPoint
from autopart.planner.search_space import SearchSpace
from autopart.planner.stage_bounds import messages


def fastest_that_fit(
    space: SearchSpace, point: SearchPoint, span: tuple[int, int], limit: float,
    counts: Mapping[int, Mapping[str, int]], in_flight: int, allowed: Options,
) -> Solution | None:  # fmt: skip
    """The fastest splits of the positions `span` whose peak is at most `limit` bytes; None where there are none.

    counts     segment class -> mode -> how many blocks of the class use the mode
    in_flight  micro-batches in flight
    allowed    node -> the options that it may take
    """
    model, prices, link = space.model(point), space.priced(point), space.between_stages(point)
    paid, own, m = model.counts_in(*span), model.counts_alone[slice(*span)], space.micro_batches(point)
    sent, received, unsaved = messages(model, prices, span, link) if link is not None else np.zeros((3, len(paid)))
    seconds, stage = _stage(space, point, span, counts, receive_buffer_bytes(received, in_flight, m), unsaved)
    windows, shared = space.sync_windows(point), paid - own.sum(0)
    late = windows.scatter * shared + windows.gather * (2 * shared + own[0] + own[-1])
    lowest, *in_backward = moments(stage, space.training(point), in_flight, m)
    peaks = _entries(_rows(model, in_backward, lowest.bytes))
    capacity = Capacity(_exposed_sync_rows(own, windows), peaks, lowest.bytes, limit)
    return space.minimise(point, SplitProblem(seconds + sent + late, allowed, capacity))


def _rows(model: Model, in_backward: Iterable[Moment], lowest: Array) -> Array:
    """[rows, variables]: alive bytes of a moment - `lowest`, the bytes alive before any backward. At a moment of a
    position's backward the gradients of one operator are in flight: the moment has a row for each operator."""
    found: dict[tuple[bytes, bytes], Array] = {}
    for moment in in_backward:
        in_flight = moment.alive.get(IN_FLIGHT, 0.0 * lowest)
        rest = moment.bytes - in_flight - lowest
        found.setdefault((in_flight.tobytes(), rest.tobytes()), _one_by_one(model, in_flight) + rest)
    return np.concatenate(list(found.values()))


def _stage(
    space: SearchSpace, point: SearchPoint, span: tuple[int, int], counts: Mapping[int, Mapping[str, int]],
    message_bytes: Array, unsaved: Array,
) -> tuple[Array, StageBytes]:  # fmt: skip
    """[variables]: seconds of a micro-batch in the positions `span`; and the stage's `StageBytes`, whose amounts are
    arrays [variables]. `unsaved` are the bytes of received values that no position saves."""
    model, prices, training = space.model(point), space.priced(point), space.training(point)
    table, paid, inside = model.table, model.counts_in(*span), slice(*span)
    classes, block, fraction = table.segment_classes[inside], table.block[inside], paid / np.maximum(model.counts, 1.0)
    used = {segment_class: {mode: n for mode, n in by_mode.items() if n} for segment_class, by_mode in counts.items()}
    every = {mode for segment_class in model.blocks for mode in used.get(segment_class, ())}
    segments = {segment_class: _segment(space, point, segment_class, span) for segment_class in {*classes, -1}}
    seconds, total, differing = (np.zeros(len(paid)) for _ in range(3))
    for segment_class in segments:
        modes = used.get(segment_class) or {"none": 1}
        for mode, n in modes.items():
            costs = space.costs(point, {segment_class: mode} if segment_class >= 0 else {})
            part = np.where(model.segment_classes == segment_class, n / sum(modes.values()), 0.0) * fraction
            inputs = n * segments[segment_class].block_input_bytes * fraction * (mode != "none")
            saved = part * costs.saved + inputs
            seconds, total = seconds + part * costs.seconds, total + saved
            differing += saved * (segment_class in model.blocks)
    uniform = MODES.index(next(iter(every), "none"))
    saved = np.array([segments[g].saved_under(uniform * mine) for g, mine in zip(classes, block, strict=True)])
    if len(every) > 1:
        blocks = np.flatnonzero(block)
        saved[blocks] = 0.0
        saved[blocks[0]] = differing
    own = np.array([_own_gradients(model, prices, p) for p in range(*span)])
    state = _of_nodes(model, prices.state) * paid - own.sum(0)
    workspace = _of_nodes(model, prices.optimizer_workspace) * (paid if training.foreach else paid > 0)
    reduced = _of_nodes(model, prices.reduced_bytes) * (paid > 0)
    return seconds, StageBytes(
        segments=gathering_ahead([segments[segment_class] for segment_class in classes], training),
        modes=[[*map(MODES.index, used.get(segment_class) or {"none": 1})] for segment_class in classes],
        prelude=segments[-1],
        saved=saved,
        shared_saved=total - saved.sum(0) + unsaved,
        gradients=own,
        state=(state, own.sum(0), 0.0 * state),
        pending=_pending(model, prices, span),
        messages=message_bytes,
        end=[
            *([workspace] if training.foreach else _one_by_one(model, workspace)),
            training.end_of_step_workspace(reduced, reduced) * paid,
        ],
    )


def _segment(space: SearchSpace, point: SearchPoint, segment_class: int, span: tuple[int, int]) -> SegmentBytes:
    """Bytes of one position of a segment class, each amount [variables]; class -1: of the prelude."""
    model, prices = space.model(point), space.priced(point)
    sizes, table, paid = model.sizes, model.table, model.counts_in(*span) > 0
    mine = (model.segment_classes == segment_class) * 1.0
    roots = [table.saved_tensors[tensor].root for tensor, _ in sizes.saved_index]
    reused = [
        np.concatenate([once * prices.inner, 0.0 * prices.reshard_forward, saved[roots] * prices.saved_tensor_bytes])
        for once, saved in zip(1.0 - sizes.rerun, table.saved, strict=True)
    ]
    saved = [
        mine
        * space.costs(point, {segment_class: mode} if segment_class >= 0 else {}).saved
        / np.maximum(model.counts, 1.0)
        for mode in MODES
    ]

    def largest(amounts: Array, times: int) -> Array:
        every = np.concatenate([amounts, times * prices.reshard_bytes, 0.0 * prices.saved_tensor_bytes])
        return np.asarray(every * paid * mine)

    reduced = _of_nodes(model, prices.reduced_bytes) * paid * mine
    one = [model.sizes.single_parameter[p] for p in range(*span) if table.segment_classes[p] == segment_class]
    return SegmentBytes(
        saved_bytes=saved,
        reused_bytes=[mine * by_mode for by_mode in reused],
        block_input_bytes=_block_inputs(model, prices, segment_class),
        regathered_bytes=0.0,
        largest_gradient=largest(prices.largest_gradient, 1) * (segment_class >= 0),
        backward_bytes=[
            largest(prices.backward_bytes[int(not first or segment_class < 0)], 2) for first in (True, False)
        ],
        reduced_bytes=(reduced, reduced),
        single_parameter=all(one),
        ahead_bytes=0.0 * reduced,
    )


def _of_nodes(model: Model, amounts: Array) -> Array:
    """[strategies] -> [variables]: 0 for reshards and saved tensors."""
    return np.concatenate([amounts, np.zeros(len(model.counts) - len(amounts))])


def _entries(rows: Array) -> Entries:
    row, variable = np.nonzero(rows)
    return row, variable, rows[row, variable]


def _exposed_sync_rows(own: Array, windows: SyncWindows) -> Entries:
    """Rows of (9), in seconds: row p is sync of positions up to p - backward of positions before p. The largest row is
    the exposed sync (`interval_seconds.exposed`). Of the exposed gathers, beside those of the first and of the last
    position, there are lower bounds, with which two rows more are: of all messages less the backward that may hide
    them; of these, and of gathers less the forward. `own` [positions, variables] is `Model.counts_alone`."""
    done, every = np.cumsum(own, 0) - own, own.sum(0)
    rows = (windows.scatter * (done + own) - windows.backward * done) * windows.scatter.any()
    if windows.gather.any():
        backward = (windows.scatter + windows.gather) * every - windows.gather * own[-1] - windows.backward * every
        forward = windows.gather * (every - own[0]) - windows.forward * every
        rows = np.vstack([rows, backward, backward + forward])
    return _entries(rows)


def _pending(model: Model, prices: Prices, span: tuple[int, int]) -> tuple[int, Array]:
    """The last position of a span, counted from its first, that reads a parameter which an earlier position of the span
    reads too; [variables]: bytes of the gradients of all such parameters."""
    last, bytes_ = 0, np.zeros(len(model.counts))
    for index, places in model.table.state.items():
        mine = slice(*model.sizes.first[index : index + 2])
        for inside in ([p for p in positions if span[0] <= p < span[1]] for positions in places):
            if len(inside) > 1 and prices.pending_grad_bytes[mine].any():
                bytes_[mine] += prices.pending_grad_bytes[mine]
                last = max(last, *(p - span[0] for p in inside))
    return last, bytes_


def _own_gradients(model: Model, prices: Prices, position: int) -> Array:
    """[variables]: bytes of the gradients of the parameters that the position alone reads."""
    bytes_ = np.zeros(len(model.counts))
    for index, places in model.table.state.items():
        if (position,) in places:
            mine = slice(*model.sizes.first[index : index + 2])
            bytes_[mine] = prices.state_bytes[mine, 1]
    return bytes_


def _block_inputs(model: Model, prices: Prices, segment_class: int) -> Array:
    """[variables]: bytes of the values that one block of a segment class reads from other segments, at the strategies
    of the nodes that make them."""
    sizes, table, bytes_ = model.sizes, model.table, np.zeros(len(model.counts))
    for used in table.value_uses:
        source = table.nodes[used.source]
        inside = used.producers[0] == used.consumers[0][0] or used.consumers[0][0] < 0
        if used.several or inside or source.kind in ("parameter", "buffer"):
            continue
        if segment_class in {table.segment_classes[u[0]] for u in used.consumers}:
            for option in range(len(source.options)):
                coefficients = sizes.byte_coefficients(source.values[used.output], source.given(option, used.output))
                bytes_[sizes.first[used.source] + option] += coefficients @ prices.terms.basis
    return bytes_


def _one_by_one(model: Model, amounts: Array) -> Array:
    """[rows, variables]: a row for the strategies of each node, and one for each reshard. The maximum of the rows is
    the largest amount of one operator or reshard. Rows of zeros are left out."""
    first, rows = model.sizes.first, []
    for node in range(len(model.table.nodes)):
        row = np.zeros(len(amounts))
        row[first[node] : first[node + 1]] = amounts[first[node] : first[node + 1]]
        rows.append(row)
    for change in np.flatnonzero(amounts[first[-1] :]) + first[-1]:
        row = np.zeros(len(amounts))
        row[change] = amounts[change]
        rows.append(row)
    return np.array([row for row in rows if row.any()]).reshape(-1, len(amounts))
