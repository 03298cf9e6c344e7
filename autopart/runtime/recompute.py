"""Activation checkpointing: blocks that save little for backward and are computed again there.

`recomputed` calls a block and saves its inputs. A block may hand parts of its work to `saved`, whose results are saved
too, so that the second run has them without computing them.

The second run gives what the first gave: it has the same inputs and buffers; random numbers depend on the place of an
element and not on a generator's state (`autopart.runtime.random`); saved results are those of the first run.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


def recomputed(layer: nn.Module, *args: Tensor) -> Any:
    """Call a layer and save its inputs, and the results of what it hands to `saved`. Backward runs the layer again,
    from the buffers that the first run had, and leaves the buffers as they were.

    torch's checkpoint hands on values alone, so that weights among the arguments are held here.
    """
    weights = {i: arg for i, arg in enumerate(args) if isinstance(arg, nn.Parameter)}
    values = [arg for i, arg in enumerate(args) if i not in weights]
    buffers, results, around = dict(layer.named_buffers(recurse=False)), list[_Result](), _AROUND.get()

    def runs() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return _run(_First(results)), _second_run(results, layer, buffers, around)

    def run(*values: Tensor) -> Any:
        others = iter(values)
        return layer(*(weights[i] if i in weights else next(others) for i in range(len(args))))

    return checkpoint(run, *values, use_reentrant=False, preserve_rng_state=False, context_fn=runs)


def saved(function: Callable[[], Any], *recomputed: Tensor) -> Any:
    """The result of a function, which a block that is `recomputed` saves: its second run does not call the function.

    recomputed  what the second run computes again of the tensors that the function reads. The function's backward reads
                these tensors of the second run, and saves none of them. Other tensors that autograd saves in the
                function, such as the statistics of a softmax, are saved.
    """
    return _part(function, recomputed, True)


def run_once(function: Callable[[], Any], *recomputed: Tensor) -> Any:
    """`saved` for the end of a block: its result is read by no backward of the block and is not saved."""
    return _part(function, recomputed, False)


def _part(function: Callable[[], Any], recomputed: tuple[Tensor, ...], save: bool) -> Any:
    run = _RUN.get()
    if run is None or not torch.is_grad_enabled():
        return function()
    return run.part(function, recomputed, save)


@dataclass(frozen=True)
class _Result:
    """What is saved of a part: its result, a tensor or several, without the graph behind it, and the result's versions;
    and for each tensor that its backward asks the second run for, the index among `recomputed`."""

    outputs: Any
    versions: tuple[int, ...]
    reads: tuple[int, ...]


@dataclass
class _Read:
    """Stands, until backward, for a view of the memory of a recomputed tensor. The node that made `end` saves the
    recomputed tensor: `end` is held because in torch 2.11 a Function's node lives no longer than its output."""

    index: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    end: Any = None

    def tensor(self) -> Tensor:
        (whole,) = self.end.grad_fn.saved_tensors
        return torch.as_strided(whole, self.size, self.stride, self.offset)


class _First:
    """The run of a block in forward, which fills `results`."""

    def __init__(self, results: list[_Result]) -> None:
        self.results = results

    def part(self, function: Callable[[], Any], recomputed: tuple[Tensor, ...], save: bool) -> Any:
        memory = {(_memory(value), value.dtype): index for index, value in enumerate(recomputed)}
        reads = list[_Read]()

        def pack(tensor: Tensor) -> Tensor | _Read:  # lives as long as what it packs: must hold no tensor
            index = memory.get((_memory(tensor), tensor.dtype))
            if index is None:
                return tensor if tensor.is_leaf else tensor.detach()
            reads.append(_Read(index, tensor.size(), tensor.stride(), int(tensor.storage_offset())))
            return reads[-1]

        with saved_tensors_hooks(pack, lambda packed: packed if isinstance(packed, Tensor) else packed.tensor()):
            outputs = function()
        for read in reads:
            read.end = _save(recomputed[read.index])
        detached = _detached(outputs) if save else None
        self.results.append(_Result(detached, _versions(detached), tuple(read.index for read in reads)))
        return outputs


class _Second:
    """The run of a block in backward, which takes the results of the first run."""

    def __init__(self, results: list[_Result]) -> None:
        self.results = iter(results)

    def part(self, function: Callable[[], Any], recomputed: tuple[Tensor, ...], save: bool) -> Any:
        result = next(self.results)
        if _versions(result.outputs) != result.versions:
            raise RuntimeError("the saved result of a recomputed block was changed in place by a later operator")
        for index in result.reads:
            _save(recomputed[index])
        return _detached(result.outputs) if save else None


_RUN: ContextVar[_First | _Second | None] = ContextVar("run", default=None)
"""The run of the block that is recomputed, while it runs."""


_AROUND: ContextVar[Callable[[], AbstractContextManager[None]]] = ContextVar("around", default=nullcontext)
"""Makes the context in which backward runs a block again, of the blocks that are called now."""


@contextmanager
def around_recompute(make: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """The blocks that are called within this context are run again within one that `make` makes, in whichever thread
    autograd runs backward."""
    token = _AROUND.set(make)
    try:
        yield
    finally:
        _AROUND.reset(token)


@contextmanager
def _run(run: _First | _Second) -> Iterator[None]:
    token = _RUN.set(run)
    try:
        yield
    finally:
        _RUN.reset(token)


@contextmanager
def _second_run(
    results: list[_Result],
    layer: nn.Module,
    buffers: dict[str, Tensor],
    around: Callable[[], AbstractContextManager[None]],
) -> Iterator[None]:
    now = dict(layer.named_buffers(recurse=False))
    try:
        for name, value in buffers.items():
            setattr(layer, name, value)
        with around(), _run(_Second(results)):
            yield
    finally:
        for name, value in now.items():
            setattr(layer, name, value)


class _Save(torch.autograd.Function):
    """Saves a value as any operator of the block does, so that checkpoint's second run finds the value."""

    @staticmethod
    def forward(ctx: Any, switch: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return switch.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


def _save(value: Tensor) -> Tensor:
    """An empty tensor, made by the node of the autograd graph whose `saved_tensors` has the value."""
    switch = torch.empty(0, requires_grad=True)  # with which autograd makes a node, whether or not `value` needs one
    return _Save.apply(switch, value.detach())


def _versions(outputs: Any) -> tuple[int, ...]:
    """How often each of the tensors was changed in place."""
    return tuple(tensor._version for tensor in ([outputs] if isinstance(outputs, Tensor) else outputs or ()))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _detached(outputs: Any) -> Any:
    """A tensor, or each of several, as a leaf that needs a gradient where the tensor does."""
    if isinstance(outputs, Tensor):
        return outputs.detach().requires_grad_(outputs.requires_grad)
    return tuple(map(_detached, outputs))
