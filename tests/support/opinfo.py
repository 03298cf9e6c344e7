"""Calls of aten operators that nobody here wrote: those that PyTorch's own operator tests make.

Every sample of every entry of PyTorch's `op_db` runs under two recorders, one that sees operators as a user calls them
(linear, softmax.int) and one that sees what autograd makes of them (mm, _softmax). The database and the recorders' key
are private parts of PyTorch, tried on 2.13.
"""

from __future__ import annotations

import itertools
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from proof import COUNTS, Kwargs, Op, Sample, exact, resolve, settled, swapped, tensors_of
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.schema_check_mode import SchemaCheckMode
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_utils import set_rng_seed
from torch.utils._python_dispatch import TorchDispatchMode

from autopart.passes.simplify import _positional
from autopart.sharding.rules import RULES, op_name
from autopart.sharding.rules.base import Args

DTYPES = (torch.float64, torch.int64, torch.bool)
SMALL = 2**14
"""Elements: calls with larger tensors are left out."""

Recorded = dict[str, dict[str, Sample]]


class _Recorder:
    """Keeps each call of an operator that has a row, once for equal shapes and literals."""

    recorded: Recorded

    def __torch_dispatch__(self, func: Op, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        name = op_name(func).replace("_.", ".").removesuffix("_")
        if name in RULES and (sample := normalised(name, args, kwargs or {})) is not None:
            self.recorded[name].setdefault(described(sample), sample)
        return func(*args, **(kwargs or {}))


class Lower(_Recorder, TorchDispatchMode):
    """Below autograd."""

    def __init__(self, recorded: Recorded) -> None:
        super().__init__()
        self.recorded = recorded


class Upper(_Recorder, SchemaCheckMode):
    """Above autograd; a SchemaCheckMode because of user classes PyTorch lets only that one there."""

    def __init__(self, recorded: Recorded) -> None:
        super().__init__()
        self.recorded = recorded
        self._dispatch_key = torch._C.DispatchKey.PreDispatch


def normalised(name: str, args: Args, kwargs: Kwargs) -> Sample | None:
    """The call as autopart's graphs spell it, or None where its tensors are not for proofs."""
    node = SimpleNamespace(target=resolve(name), args=args, kwargs=kwargs)
    _positional(node)  # type: ignore[arg-type]
    node.kwargs.pop("device", None)
    sample = Sample(name, node.args, {k: v for k, v in node.kwargs.items() if v is not None})
    tensors = tensors_of(sample)
    if any(isinstance(v, torch.Tensor) for v in sample.kwargs.values()) or any(
        not exact(t) or t.numel() > SMALL for t in tensors
    ):
        return None
    return sample._replace(args=swapped(sample.args, iter([t.detach().clone() for t in tensors])))


def described(sample: Sample) -> str:
    """What tells two calls apart: shapes, dtypes and literals."""
    shapes = swapped(sample.args, iter([(t.dtype, t.shape) for t in tensors_of(sample)]))
    return f"{shapes} {sample.kwargs}"


def runs(info: Any, limit: int) -> Iterator[Callable[[], object]]:
    """An entry's sample calls."""
    dtype = next((d for d in DTYPES if d in info.supported_dtypes("cpu")), None)
    if dtype is not None:
        torch.default_generator.manual_seed(0)
        for sample in itertools.islice(info.sample_inputs_func(info, "cpu", dtype, False), limit):
            yield lambda s=sample: info.op(s.input, *s.args, **s.kwargs)  # type: ignore[misc]


@cache
def recorded(limit: int) -> dict[str, list[Sample]]:
    """Every row's calls, from the first `limit` samples of every entry."""
    found: Recorded = {name: {} for name in RULES}
    recorders: list[AbstractContextManager[object]] = [Upper(found), Lower(found)]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        set_rng_seed(0)
        for info in op_db:
            calls = list(runs(info, limit))
            for recorder in recorders:
                with enable_python_dispatcher(), recorder:
                    for call in calls:
                        with suppress(Exception):
                            call()
    return {name: list(samples.values()) for name, samples in found.items()}


def larger(sample: Sample) -> Sample:
    """The call with tensors twice as long in every dim: the same values, twice or more, in another order."""

    def grown(tensor: torch.Tensor) -> torch.Tensor:
        twice = tensor.repeat([1 if size == 1 else 2 for size in tensor.shape])
        return twice.flatten()[torch.randperm(twice.numel())].reshape(twice.shape)

    return sample._replace(args=swapped(sample.args, iter([grown(t) for t in tensors_of(sample)])))


def divisible(sample: Sample) -> int:
    """In how many ways its tensors' dims split."""
    sizes = (size for tensor in tensors_of(sample) for size in tensor.shape)
    return sum(size > 0 and size % shards == 0 for size in sizes for shards in COUNTS)


def chosen(name: str, count: int | None, limit: int) -> list[Sample]:
    """Up to `count` of a row's recorded calls, as they are and larger, that can be proven: first of all kinds, then
    those that split best."""
    kinds: dict[str, list[Sample]] = defaultdict(list)
    for recorded_call in recorded(limit)[name]:
        for sample in (recorded_call, larger(recorded_call)):
            ranks = swapped(sample.args, iter([(t.dtype, t.dim()) for t in tensors_of(sample)]))
            kinds[f"{ranks} {sample.kwargs}"].append(sample)
    ordered = [sorted(samples, key=divisible, reverse=True) for samples in kinds.values()]
    ordered.sort(key=lambda samples: divisible(samples[0]), reverse=True)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*map(provable, ordered)))
    return list(itertools.islice((s for s in turns if s is not None), count))


def provable(samples: Sequence[Sample]) -> Iterator[Sample]:
    """Those that can be proven, found one by one: to try a call takes longer than to prove it."""
    return (found for sample in samples if (found := settled(sample)) is not None)
