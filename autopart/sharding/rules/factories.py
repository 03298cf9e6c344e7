"""Operators that make a tensor from no values: from sizes, or from the shape and dtype of another tensor."""

from collections.abc import Sequence

from autopart.sharding.notation import Shape
from autopart.sharding.rules.base import Args, Rule, letters, opaque, row


def _full(args: Args, outputs: Sequence[Shape]) -> str:
    return row([], [letters(len(outputs[0]))])


def _new(args: Args, outputs: Sequence[Shape]) -> str:
    """The input gives dtype and device only. A dim in which its size is the output's is split with the output."""
    names = letters(len(outputs[0]))
    same = [i < len(names) and n == outputs[0][i] != 1 for i, n in enumerate(args[0])]
    return row([[names[i] if same[i] else f"x{i}!" for i in range(len(args[0]))]], [names])


def _like(args: Args, outputs: Sequence[Shape]) -> str:
    """(x, other). The other gives the dtype."""
    names = letters(len(args[0]))
    same = [i < len(names) and n == args[0][i] != 1 for i, n in enumerate(args[1])]
    return row([names, [names[i] if same[i] else f"x{i}!" for i in range(len(args[1]))]], [names])


SIZED = {"full": 0, "zeros": 0, "ones": 0}
NEW = "new_zeros new_ones new_full".split()
BY_PLACE = """arange arange.start arange.start_step linspace logspace eye eye.m tril_indices triu_indices
    hann_window hamming_window rand randn randint randint.low randperm rand_like randn_like bernoulli
    bernoulli.p uniform exponential normal_functional multinomial""".split()
"""Factories that are never split: an element depends on its indices, or on the state of a random generator."""

RULES: dict[str, Rule] = {f"aten.{n}": Rule(_full, resize=at) for n, at in SIZED.items()}
RULES |= {f"aten.{n}": Rule(_new, resize=1) for n in NEW}
RULES |= {f"aten.{n}": Rule(opaque) for n in BY_PLACE}
RULES |= {"aten.scalar_tensor": Rule(" -> "), "aten.type_as": Rule(_like, linear=(0,))}
RULES |= {"autopart.uniform": Rule("... -> ..."), "autopart.uniform_of": Rule(_full, resize=0)}
