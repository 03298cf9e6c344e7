"""Recurrent layers and their cells: only samples are split."""

import math
from collections.abc import Sequence

from autopart.sharding.notation import Shape
from autopart.sharding.rules.base import Args, Rule, is_tensor, opaque, row, spelled


def _recurrent(args: Args, outputs: Sequence[Shape]) -> str:
    """(input, states, parameters, has biases, layers, dropout, training, bidirectional, batch first) -> output,
    states."""
    if len(args[0]) != 3 or not isinstance(args[8], bool) or (args[5] and args[6]):
        return opaque(args, outputs)
    order = (1, 0, 2) if args[8] else (0, 1, 2)
    x, y = ([("t!", "b", last)[i] for i in order] for last in ("i!", "o!"))
    states = [["l!", "b", f"h{k}!"] for k in range(1 if is_tensor(args[1]) else len(args[1]))]
    parameters = [spelled(p, range(len(p)), f"p{k}_") for k, p in enumerate(args[2])]
    return row([x, *states, *parameters], [y, *states])


def _recurrent_flops(args: Args, outputs: Sequence[Shape]) -> float:
    return 2.0 * math.prod(args[0][:2]) * sum(math.prod(p) for p in args[2] if len(p) > 1)


def _cell(args: Args, outputs: Sequence[Shape]) -> str:
    """(input, state or states, parameters): one step. Every new state has the shape of the state before."""
    states = args[1] if isinstance(args[1], (list, tuple)) and not is_tensor(args[1]) else [args[1]]
    parameters = [spelled(p, range(len(p)), f"p{k}_") if is_tensor(p) else None for k, p in enumerate(args[2:])]
    return row([["b", "i!"], *(["b", f"h{k}!"] for k in range(len(states))), *parameters], [["b", "z!"]] * len(outputs))


def _cell_flops(args: Args, outputs: Sequence[Shape]) -> float:
    return 2.0 * args[0][0] * sum(math.prod(p) for p in args[2:] if is_tensor(p) and len(p) > 1)


RULES: dict[str, Rule] = {
    f"aten.{name}.input": Rule(_recurrent, flops=_recurrent_flops, contraction=True)
    for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")
}
RULES |= {
    f"aten.{name}_cell": Rule(_cell, flops=_cell_flops, contraction=True)
    for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")
}
