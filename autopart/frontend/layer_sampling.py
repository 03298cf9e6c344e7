"""Which blocks of a deep model need be traced: of equal blocks in a row, the first stand for all.

Blocks are compared before a trace by their structure, tensors, attributes and hooks. What they compute shows only in
the trace, which `autopart.passes.unfold_layers` compares before it takes a few blocks for all.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
import types
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

LONGEST_PERIOD = 8
"""The largest number of blocks after which kinds of blocks may repeat."""
INTERNAL = frozenset(vars(nn.Module())) - {"training"}
HOOKS = tuple(sorted(n for n in INTERNAL if n.endswith("hooks")))
PLAIN = (str, int, float, bool, complex, bytes, type(None), torch.dtype, torch.device, torch.layout)


@dataclass(frozen=True)
class BlockList:
    """A list of blocks of a model.

    path  the path of the list, "model.layers";  blocks: how many blocks it has
    """

    path: str
    blocks: int

    def index(self, name: str) -> int | None:
        """The number of the block that a module or tensor of this name is in; None for other names."""
        found = re.match(rf"{re.escape(self.path)}\.(\d+)(?:\.|$)", name)
        return int(found[1]) if found else None

    def renumbered(self, name: str, index: int) -> str:
        """The name of a module or tensor of a block, as block number `index` has it."""
        return f"{self.path}.{index}{name[len(f'{self.path}.{self.index(name)}') :]}"


@dataclass(frozen=True)
class SampledLayers(BlockList):
    """A list of blocks of which some equal ones are not traced, as kinds of blocks repeat after a period.

    start    the first block from which on kinds repeat;  stop: the first block behind those
    period   the number of blocks after which they repeat;  windows: how many periods are traced
    """

    start: int
    stop: int
    period: int
    windows: int = 2

    @property
    def kept(self) -> int:
        """How many blocks are traced."""
        return self.blocks - self.dropped

    @property
    def dropped(self) -> int:
        """How many blocks are not traced: whole periods, from the block `after` on."""
        return max(0, (self.stop - self.start) // self.period - self.windows) * self.period

    @property
    def after(self) -> int:
        """The number of blocks in front of those that are not traced."""
        return self.start + self.windows * self.period

    @property
    def traced(self) -> tuple[int, ...]:
        """The blocks that are traced. Where kinds repeat up to the last block, these are the first ones: a forward pass
        may tell the kind of a block by its place in the list."""
        if self.stop == self.blocks:
            return tuple(range(self.kept))
        return (*range(self.after), *range(self.after + self.dropped, self.blocks))

    @property
    def more(self) -> SampledLayers | None:
        """The sample to try where this one does not stand for all: of four periods, of which the first and the last may
        differ; None behind it."""
        return replace(self, windows=4) if self.windows < 4 else None

    def moved(self, name: str, by: int, at_least: int = 0) -> str:
        """The name with its block's number increased by `by`, if the number is at least `at_least`."""
        index = self.index(name)
        return name if index is None or index < at_least else self.renumbered(name, index + by)


@dataclass(frozen=True)
class MixedLayers(BlockList):
    """A list of blocks of which some are not traced, as a block of the same kind between the same kinds is.

    Of each kind that stands in the list twice, two blocks are traced at least, and so are the first and the last block.

    kinds   a number for the kind of each block
    traced  the blocks that are traced, in order; each is between blocks of the same kinds in the trace as in the list
    more    the sample to try where this one does not stand for all
    """

    kinds: tuple[int, ...]
    traced: tuple[int, ...]
    more: SampledLayers

    @property
    def kept(self) -> int:
        """How many blocks are traced."""
        return len(self.traced)

    @property
    def dropped(self) -> int:
        """How many blocks are not traced."""
        return self.blocks - self.kept

    def stand_in(self, block: int) -> int:
        """The place, among the traced blocks, of the one that stands for a block: itself, or one of its kind between
        blocks of the same kinds."""
        if block in self.traced:
            return self.traced.index(block)
        wanted = _surrounded(self.kinds, block)
        return next(i for i, other in enumerate(self.traced) if other and _surrounded(self.kinds, other) == wanted)


Sample = SampledLayers | MixedLayers


def sampled_layers(model: nn.Module) -> tuple[Sample, ...]:
    """The lists of blocks of which the first may stand for all, in the model's order."""
    found: list[Sample] = []
    kinds_of = _Kinds(model)
    for path, module in model.named_modules():
        if type(module) not in (nn.ModuleList, nn.Sequential) or len(module) < 4:
            continue
        if not re.fullmatch(r"[^.].*", path) or re.search(r"(^|\.)\d+(\.|$)", path):
            continue
        kinds = kinds_of.blocks(path, list(module.children()))
        best = _best_sample(path, kinds)
        if best is not None and best.kept < best.blocks:
            found.append(best if _computes_list(model, len(kinds)) else _mixed(kinds, best))
    return tuple(found)


def _best_sample(path: str, kinds: Sequence[object]) -> SampledLayers | None:
    """The sample of a list whose blocks have these kinds, with the run and the period that trace the fewest blocks."""
    every = []
    for period in range(1, LONGEST_PERIOD + 1):
        unlike = [i for i in range(len(kinds) - period) if kinds[i] != kinds[i + period]]
        starts = [0, *(i + 1 for i in unlike)]
        stops = [*(i + period for i in unlike), len(kinds)]
        every += [SampledLayers(path, len(kinds), *run, period) for run in zip(starts, stops, strict=True)]
    return min(every, key=lambda sample: (sample.kept, -sample.stop), default=None)


def _computes_list(model: nn.Module, blocks: int) -> bool:
    """Whether a property of a configuration is a list of several kinds, an item for each of as many blocks: a forward
    pass may tell a block's kind by its place there, and no item can be taken out."""
    for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
        for name, member in inspect.getmembers_static(type(config)):
            value = getattr(config, name, None) if isinstance(member, property) else None
            if isinstance(value, list) and len(value) == blocks and len(set(map(str, value))) > 1:
                return True
    return False


def _surrounded(kinds: Sequence[int], block: int) -> tuple[int, ...]:
    """The kinds of the block before a block, of the block itself, and of the next one."""
    return tuple(kinds[block - 1 : block + 2])


def _mixed(kinds: Sequence[object], periodic: SampledLayers) -> Sample:
    """The sample with a block of every kind between every two kinds, if it has fewer blocks than the periodic one.

    From a block on, blocks may be left out up to one that has the kind of the next and is behind one of the same kind
    as the block: then every traced block stays between the kinds that it is between in the list.
    """
    numbers = tuple(map(list(dict.fromkeys(kinds)).index, kinds))
    last = len(numbers) - 1
    seen, shown = set[tuple[int, ...]](), Counter((numbers[0], numbers[last]))
    wanted = {kind: min(2, times) for kind, times in Counter(numbers).items()}
    traced = [0]
    for block in range(1, last + 1):
        known = _surrounded(numbers, block) in seen and shown[numbers[block]] >= wanted[numbers[block]]
        while traced[-1] < block and not (known and block < last):
            pair = numbers[traced[-1] : traced[-1] + 2]
            step = next(i for i in range(block, traced[-1], -1) if numbers[i - 1 : i + 1] == pair)
            traced.append(step)
            seen.add(_surrounded(numbers, step))
            shown[numbers[step]] += step < last
    if len(traced) >= periodic.kept:
        return periodic
    return MixedLayers(periodic.path, len(numbers), numbers, tuple(traced), periodic)


def _is_depth(values: Sequence[tuple[int, tuple[Any, ...]]]) -> bool:
    """Whether an attribute of blocks tells their depth: an integer that grows by as much from each block to the next,
    or a float that is another in every block, such as a factor by depth. `values` are (block, trait)."""
    kinds = {value[0] for _, value in values}
    if len(values) < 2 or kinds not in ({int}, {float}):
        return False
    (i, (_, first)), (k, (_, second)) = values[:2]
    if kinds == {float}:
        return len({value for _, (_, value) in values}) == len(values)
    return first != second and all((v - first) * (k - i) == (second - first) * (at - i) for at, (_, v) in values)


class _Kinds:
    """Tells the kinds of blocks apart. Modules and tensors of the model are known by all their names."""

    def __init__(self, model: nn.Module) -> None:
        self.names: dict[int, list[str]] = {}
        for name, tensor in _tensors(model):
            self.names.setdefault(id(tensor), []).append(name)
        self.modules: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.modules.setdefault(id(module), []).append(name)
        self.values: list[Any] = []
        self.digests: dict[int, str] = {}

    def blocks(self, path: str, blocks: Sequence[nn.Module]) -> list[object]:
        """A value for each block, equal for blocks of the same structure, tensors, attributes and hooks."""
        traits = [dict(self._traits(f"{path}.{i}", block)) for i, block in enumerate(blocks)]
        values: dict[object, list[tuple[int, tuple[Any, ...]]]] = {}
        for i, own in enumerate(traits):
            for key, value in own.items():
                values.setdefault(key, []).append((i, value))
        counting = {key for key, told in values.items() if _is_depth(told)}
        kinds: dict[tuple[object, ...], int] = {}
        return [
            kinds.setdefault(tuple((k, v) for k, v in own.items() if k not in counting), len(kinds)) for own in traits
        ]

    def _traits(self, path: str, block: nn.Module) -> Iterator[tuple[object, tuple[Any, ...]]]:
        """(where in the block, value) for every module, hook, attribute and tensor; numbers as (type, value)."""
        for name, module in block.named_modules(remove_duplicate=False):
            here = f"{path}.{name}" if name else path
            others = self._aliases(self.modules[id(module)], here, path)
            yield (name, "is"), (type(module), module.training, others)
            for kind in HOOKS:
                hooks = getattr(module, kind)
                if hooks:
                    yield (name, kind), ("hooks", *(self._token(h, path) for h in hooks.values()))
            for key, value in vars(module).items():
                if key not in INTERNAL and key != "training":
                    plain = type(value) in (int, float)
                    yield (name, "." + key), (type(value), value) if plain else ("value", self._token(value, path))
            for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
                yield (name, key), self._tensor(tensor, f"{here}.{key}", path)

    def _tensor(self, tensor: torch.Tensor | None, name: str, path: str) -> tuple[Any, ...]:
        if tensor is None:
            return ("none",)
        others = self._aliases(self.names[id(tensor)], name, path)
        value = "" if isinstance(tensor, nn.Parameter) or tensor.is_meta else self._digest(tensor)
        about = (tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad, tensor.device)
        return ("tensor", type(tensor), *about, others, value)

    def _digest(self, buffer: torch.Tensor) -> str:
        """A hash of a buffer's values, on which the trace may depend."""
        if id(buffer) not in self.digests:
            self.digests[id(buffer)] = digest(buffer)
        return self.digests[id(buffer)]

    def _aliases(self, names: Sequence[str], name: str, path: str) -> tuple[str, ...]:
        """The other names of a module or tensor: all of them in the block that has it first, else the first of them."""
        told = [self._relative(n, path) for n in names if n != name]
        return tuple(told if self._relative(names[0], path)[:1] != "/" else told[:1])

    def _relative(self, name: str, path: str) -> str:
        """A name relative to the block, if it is inside; else "/" and the name."""
        return name.removeprefix(path) if name == path or name.startswith(path + ".") else f"/{name}"

    def _token(self, value: Any, path: str, depth: int = 0) -> object:
        """A value that is equal for attributes that act alike; an attribute of unknown type is equal only to itself."""
        if isinstance(value, PLAIN):
            return (type(value), value)
        if isinstance(value, nn.Module) and id(value) in self.modules:
            return ("module", *(self._relative(n, path) for n in self.modules[id(value)]))
        if isinstance(value, torch.Tensor):
            names = self.names.get(id(value))
            return ("tensor", *(self._relative(n, path) for n in names)) if names else ("object", id(value))
        if depth > 5:
            return ("object", id(value))
        if isinstance(value, (list, tuple)):
            return (type(value), *(self._token(v, path, depth + 1) for v in value))
        if isinstance(value, dict):
            return (type(value), *((str(k), self._token(v, path, depth + 1)) for k, v in value.items()))
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            return ("partial", *(self._token(v, path, depth + 1) for v in parts))
        if isinstance(value, types.MethodType):
            return ("method", value.__func__.__qualname__, self._token(value.__self__, path, depth + 1))
        return ("equal", self._interned(value))

    def _interned(self, value: Any) -> int:
        """A number for each value, the same for values that compare equal."""
        for i, other in enumerate(self.values):
            if other is value:
                return i
        for i, other in enumerate(self.values):
            try:
                if type(other) is type(value) and bool(other == value):
                    return i
            except Exception:  # what a comparison may raise
                continue
        self.values.append(value)
        return len(self.values) - 1


def digest(tensor: torch.Tensor, *about: object) -> str:
    """A hash of a tensor's values and of `about`."""
    plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(repr(about).encode() + plain.numpy().tobytes()).hexdigest()


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


class UnlikeLayers(Exception):
    """Raised for a list of blocks whose first blocks do not stand for all; the text says why. `whole`: more of the
    blocks would not stand for all either. `others`: the same of further lists, none of which more blocks would help."""

    def __init__(self, sample: Sample, why: str, whole: bool = False) -> None:
        super().__init__(f"{sample.path}: {why}")
        self.sample, self.whole = sample, whole
        self.others: tuple[UnlikeLayers, ...] = ()


def longer(sampled: Sequence[Sample], unlike: UnlikeLayers) -> tuple[Sample, ...]:
    """The samples to try next where the traced blocks of one list do not stand for all: more of them, then every block;
    every block at once where more would not help."""
    again = None if unlike.whole else unlike.sample.more
    rest = [again if sample == unlike.sample else sample for sample in sampled]
    return tuple(sample for sample in rest if sample is not None and sample.dropped > 0)


class Dropped(nn.Module):
    """Stands in place of a block that is not traced. Its list of blocks cannot be sampled if the model runs it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("a block that was left out of the trace runs")
