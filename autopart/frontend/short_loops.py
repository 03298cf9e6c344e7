"""Which iterations of a long loop over tokens need be traced: of equal iterations, one stands for the others.

A scan in plain PyTorch is `for t in range(tokens)`. While a model is traced for its plan, `range` of the model's own
files runs the first iterations, and compares the last of these in the trace: the same operators, of the same shapes, on
values that come from the same places, with numbers that grow by the same step. Where they are equal, all others but the
last are skipped. Lists to which each iteration appends get the values that the skipped iterations would append.

A loop runs in full if its body looks at the number of the iteration, or has effects that are not seen here.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from itertools import pairwise
from types import CodeType, FrameType
from typing import Any
from unittest import mock

import torch
from torch import fx, nn

from autopart.frontend.torch_private import get_proxy_mode

FIRST_ITERATIONS = 8
"""How many iterations of a loop are told apart. The last of these stands for the equal ones behind it."""

LAST_ITERATIONS = 2
"""How many iterations are traced at the end of a loop. Of the last, what nobody reads is removed from a trace."""

TIMES = "autopart_times"
"""Key in the `custom` metadata of a node: how many iterations the node stands for."""

UNSEEN = frozenset(
    {"add", "appendleft", "clear", "extend", "insert", "pop", "popleft", "remove", "setdefault", "update"}
)
"""Names of methods that change a collection otherwise than by appending to a list."""

PACKAGES = ("torch.", "builtins")


@contextmanager
def short_loops(model: nn.Module, shortened: list[int]) -> Iterator[None]:
    """Let long loops of the model's files run some of their iterations; the lengths of these loops are appended to
    `shortened`."""
    with in_files_of(model, "range", _Range(shortened)):
        yield


@contextmanager
def in_files_of(model: nn.Module, builtin: str, stand_in: Callable[..., Any]) -> Iterator[None]:
    """Have `stand_in` take the place of a builtin in the files of a model's classes, but for those of torch."""
    names = {type(module).__module__ for module in model.modules()}
    with ExitStack() as stack:
        for name in names:
            if name in sys.modules and not name.startswith(PACKAGES):
                stack.enter_context(mock.patch.object(sys.modules[name], builtin, stand_in, create=True))
        yield


class _Range:
    """Stands for `range`: gives a `_LongRange` where the range is long."""

    def __init__(self, shortened: list[int]) -> None:
        self.shortened = shortened

    def __call__(self, *args: Any) -> Any:
        numbers = range(*args)
        enough = len(numbers) > FIRST_ITERATIONS + LAST_ITERATIONS + 1
        return _LongRange(numbers, self.shortened) if enough else numbers

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, (range, _LongRange))


class _LongRange(Sequence[int]):
    """A range whose iterations a `for` statement may shorten; else as `range`."""

    def __init__(self, numbers: range, shortened: list[int]) -> None:
        self.numbers, self.shortened = numbers, shortened

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        return self.numbers[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.numbers, name)

    def __iter__(self) -> Iterator[int]:
        frame, mode = sys._getframe(1), get_proxy_mode()
        if mode is None or not _is_plain(frame.f_code, frame.f_lasti):
            return iter(self.numbers)
        return self._shortened(frame, mode.tracer.graph)

    def _shortened(self, frame: FrameType, graph: fx.Graph) -> Iterator[int]:
        looked: list[bool] = []
        ends, states = [_end(graph)], [_state(frame)]
        for number in self.numbers[:FIRST_ITERATIONS]:
            yield _Number(number, looked)
            ends.append(_end(graph))
            states.append(_state(frame))
        iterations = [_between(*pair) for pair in pairwise(ends)]
        appended = _appended(states)
        if looked or appended is None or not _alike(iterations[-4:]):
            yield from self.numbers[FIRST_ITERATIONS:]
            return
        skipped = len(self.numbers) - FIRST_ITERATIONS - LAST_ITERATIONS
        for node in iterations[-1]:
            custom = node.meta.get("custom") or {}
            node.meta["custom"] = {**custom, TIMES: custom.get(TIMES, 1) * (1 + skipped)}
        for values, new in appended:
            values += new * skipped
        self.shortened.append(len(self.numbers))
        yield from self.numbers[-LAST_ITERATIONS:]


@lru_cache
def _is_plain(code: CodeType, at: int) -> bool:
    """Whether the instruction is of a `for` statement whose body has no effects but on tensors, variables and lists
    that it appends to."""
    every = list(dis.get_instructions(code))
    index = next(i for i, instruction in enumerate(every) if instruction.offset == at)
    start = next((i for i in range(index + 1, len(every)) if every[i].opname not in ("EXTENDED_ARG", "CACHE")), index)
    if every[index].opname != "GET_ITER" or every[start].opname != "FOR_ITER":
        return False
    body = [i for i in every[start + 1 :] if i.offset < every[start].argval]
    for before, instruction in zip([every[start], *body], body, strict=False):
        leaves = instruction.opname.startswith(("YIELD", "RETURN", "DELETE", "STORE_GLOBAL", "STORE_DEREF"))
        method = instruction.argval if instruction.opname in ("LOAD_METHOD", "LOAD_ATTR") else ""
        if leaves or method in UNSEEN or (method == "append" and not before.opname.startswith("LOAD_FAST")):
            return False
    return True


def _end(graph: fx.Graph) -> fx.Node:
    return next(iter(reversed(graph.nodes)), graph._root)


def _between(before: fx.Node, last: fx.Node) -> list[fx.Node]:
    """The nodes behind `before`, to `last`."""
    nodes = []
    while last is not before:
        nodes.append(last)
        last = last.prev
    return nodes[::-1]


def _state(frame: FrameType) -> dict[str, tuple[Any, Any]]:
    """Name of a variable -> its value, and what a collection has in it."""

    def inside(value: Any) -> Any:
        return list(value.items()) if isinstance(value, dict) else list(value) if type(value) in (list, set) else None

    return {name: (value, inside(value)) for name, value in frame.f_locals.items()}


def _appended(states: Sequence[dict[str, tuple[Any, Any]]]) -> list[tuple[list[Any], list[Any]]] | None:
    """The lists that grew in each of the last iterations, with what the last one appended; None where variables
    changed in another way than tensors and lists that grow."""
    *_, old, middle, new = states
    if not old.keys() == middle.keys() == new.keys():
        return None
    found: list[tuple[list[Any], list[Any]]] = []
    for name, (value, now) in new.items():
        (was, before), (_, between) = old[name], middle[name]
        if type(value) is list and value is was:
            more = len(now) - len(between)
            if not _same(now[: len(before)], before) or len(between) - len(before) != more:
                return None
            if more and not any(value is other for other, _ in found):
                found.append((value, now[len(now) - more :]))
        elif isinstance(value, (dict, set)):
            if value is not was or not _same([*_flat(now)], [*_flat(before)]):
                return None
        elif value is not was and not isinstance(value, (torch.Tensor, _Number)):
            return None
    return found


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        yield from value if isinstance(value, tuple) else (value,)


def _same(values: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(values) == len(others) and all(a is b for a, b in zip(values, others, strict=True))


def _alike(iterations: Sequence[Sequence[fx.Node]]) -> bool:
    """Whether iterations, after the first, do the same with values from the same places."""
    if not iterations[0] or len(set(map(len, iterations))) > 1:
        return False
    places = [{node: i for i, node in enumerate(nodes)} for nodes in iterations]
    for index in range(len(iterations[0])):
        calls = [_call(iterations[k][index], places[k - 1], places[k]) for k in range(1, len(iterations))]
        if None in calls or any(call[0] != calls[0][0] for call in calls):  # type: ignore[index]
            return False
        numbers = [call[1] for call in calls]  # type: ignore[index]
        steps = {tuple(b - a for a, b in zip(*pair, strict=True)) for pair in pairwise(numbers)}
        if len(steps) > 1:
            return False
    return True


def _call(
    node: fx.Node, before: dict[fx.Node, int], own: dict[fx.Node, int]
) -> tuple[tuple[Any, ...], tuple[int, ...]] | None:
    """What a node of an iteration does, without whole numbers; and the whole numbers among its arguments. None where it
    draws random numbers or is no operator."""
    if node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return None
    numbers: list[int] = []

    def token(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return "own" if value in own else "before" if value in before else "outside", own.get(
                value, before.get(value, value.name)
            )
        if isinstance(value, (list, tuple)):
            return tuple(map(token, value))
        if type(value) is int:
            numbers.append(value)
            return int
        return value if isinstance(value, (bool, float, str, type(None), torch.dtype)) else repr(value)

    made = node.meta.get("val")
    outputs = made if isinstance(made, (tuple, list)) else (made,)
    about = tuple((tuple(o.shape), o.dtype, o.stride()) if isinstance(o, torch.Tensor) else None for o in outputs)
    args = token(node.args), tuple((k, token(v)) for k, v in node.kwargs.items())
    return (node.target, args, about), tuple(numbers)


def _looking(name: str) -> Callable[..., Any]:
    """A method of int that notes that the number was looked at, unless torch itself did."""
    own = getattr(int, name)

    def method(self: _Number, *args: Any) -> Any:
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
            self.looked.append(True)
        return own(self, *args)

    return method


def _moving(name: str) -> Callable[..., Any]:
    """A method of int that gives a number of the iteration again."""
    own = getattr(int, name)

    def method(self: _Number, *args: Any) -> Any:
        value = own(self, *args)
        return _Number(value, self.looked) if type(value) is int else value

    return method


class _Number(int):
    """The number of an iteration, which notes whether the loop's body looks at it."""

    looked: list[bool]

    def __new__(cls, value: int, looked: list[bool]) -> _Number:
        number = super().__new__(cls, value)
        number.looked = looked
        return number

    def __deepcopy__(self, memo: Any) -> int:
        return int(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)


for _name in "eq ne lt le gt ge bool mod floordiv divmod hash float truediv and or xor rmod rfloordiv pow".split():
    setattr(_Number, f"__{_name}__", _looking(f"__{_name}__"))
for _name in "add sub mul neg radd rsub rmul".split():
    setattr(_Number, f"__{_name}__", _moving(f"__{_name}__"))
