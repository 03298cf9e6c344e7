"""Contexts for torch.export, in which it traces what a model computes, or the model is refused."""

from __future__ import annotations

import logging
import os
import pickle
import random
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from functools import lru_cache
from io import StringIO
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.utils.checkpoint
from torch import nn

from autopart.errors import OperatorError
from autopart.frontend.autograd_functions import CustomFunction
from autopart.frontend.source_lines import PACKAGES, user_line
from autopart.frontend.torch_private import decompositions, stack_traces


@contextmanager
def silent() -> Iterator[None]:
    """Discard what is printed and logged inside. torch.export prints whole graphs where it fails."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(before)


@contextmanager
def casts_that_change_nothing() -> Iterator[None]:
    """Let `module.to(dtype)` do nothing for a module of this dtype, as it does with real tensors. With fake ones it
    makes new parameters, which torch.export refuses."""
    own: Any = nn.Module.to

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        floats = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
        same = floats and all(t.to(*args, **kwargs) is t for t in floats)
        return module if same else own(module, *args, **kwargs)

    with mock.patch.object(nn.Module, "to", to):
        yield


@contextmanager
def remembered_frames() -> Iterator[None]:
    """Look a line of source up once. torch.export asks for all lines of the stack, about 80, at every operator."""
    frame = lru_cache(maxsize=None)(traceback.FrameSummary)

    def summary(stack: Sequence[Mapping[str, Any]], skip: int) -> traceback.StackSummary:
        frames = reversed(stack[skip:])
        return traceback.StackSummary(frame(f["filename"], f["line"], f["name"]) for f in frames)

    with mock.patch.object(stack_traces, "_extract_symbolized_tb", summary):
        yield


@contextmanager
def lstm_states() -> Iterator[None]:
    """Give the states of an LSTM the shapes that they have. torch before 2.13 leaves a dim of size 1 in front of the
    batch where tensors are fake."""
    own = decompositions.one_layer_lstm

    def layer(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        output, states = own(*args, **kwargs)
        return output, tuple(state.reshape(-1, state.shape[-1]) for state in states)

    with mock.patch.object(decompositions, "one_layer_lstm", layer):
        yield


@contextmanager
def plain_run() -> Iterator[None]:
    """Let models of transformers that ask whether they are exported or compiled hear that they are not.

    They would avoid operators that some exporters lack, at the cost of a loop over the rows of every chunk. Masks of
    transformers still hear that they are exported: else they read values.
    """
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            asked = vars(module) if name.startswith("transformers.models.") else ()
            for question in ("is_torchdynamo_exporting", "is_torchdynamo_compiling"):
                if "is_torchdynamo_exporting" in asked and question in asked:
                    stack.enter_context(mock.patch.object(module, question, lambda: False))
        yield


@contextmanager
def no_validation() -> Iterator[None]:
    """Let torch.distributions accept all arguments. Their checks read values, which a trace does not have."""
    with mock.patch.object(torch.distributions.Distribution, "_validate_args", False):
        yield


@contextmanager
def no_inference_mode() -> Iterator[None]:
    """Let torch.inference_mode act as torch.no_grad, which computes the same and is seen in a trace."""
    own = torch.inference_mode.__enter__, torch.inference_mode.__exit__

    def enter(context: Any) -> None:
        context.before = torch.is_grad_enabled()
        torch.set_grad_enabled(context.before and not context.mode)

    def leave(context: Any, *error: Any) -> None:
        torch.set_grad_enabled(context.before)

    torch.inference_mode.__enter__, torch.inference_mode.__exit__ = enter, leave  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.inference_mode.__enter__, torch.inference_mode.__exit__ = own  # type: ignore[method-assign]


@contextmanager
def open_checkpoints() -> Iterator[None]:
    """Let a reentrant checkpoint call its function alone, with gradients if an argument has one.

    It would call the function without gradients, and again in a backward that a trace does not see.
    """

    def run(function: Any, preserve: bool, *args: Any) -> Any:
        wanted = any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
        with torch.set_grad_enabled(torch.is_grad_enabled() and wanted):
            return function(*args)

    with mock.patch.object(torch.utils.checkpoint.CheckpointFunction, "apply", run):
        yield


@contextmanager
def no_tensor_hooks() -> Iterator[None]:
    """Refuse hooks on gradients, which a trace does not see."""

    def register(tensor: torch.Tensor, hook: Any) -> Any:
        raise OperatorError(
            f"the forward pass puts a hook on a gradient ({user_line(traceback.extract_stack())})",
            "a trace does not see it, and gradients would be others if it changes them",
            "a scale or a clamp of the loss, or of gradients after backward",
        )

    with mock.patch.object(torch.Tensor, "register_hook", register):
        yield


def foreign_random() -> bytes:
    """The state of Python's and numpy's random numbers, which no trace follows."""
    return pickle.dumps((random.getstate(), np.random.get_state()))


@contextmanager
def drawing(value: float) -> Iterator[list[float]]:
    """Let Python's and numpy's uniform numbers between 0 and 1 all be `value`. The list has an item for each drawn."""
    draws: list[float] = []

    def between(low: float = 0.0, high: float = 1.0, size: object = None) -> float:
        draws.append(value)
        return low + (high - low) * value

    with (
        mock.patch.object(random, "random", between),
        mock.patch.object(random, "uniform", between),
        mock.patch.object(np.random, "uniform", between),
    ):
        yield draws


@contextmanager
def custom_functions(found: list[CustomFunction]) -> Iterator[None]:
    """Append every call of an autograd.Function that is not torch's own to `found`."""
    base: Any = torch.autograd.Function.__mro__[1]  # that of torch.autograd.Function alone: some keep its bound `apply`

    def noted(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch."):
            frames = [f for f in traceback.extract_stack()[:-1] if not f.filename.startswith(PACKAGES)]
            found.append(CustomFunction(cls, args, f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}"))
        return super(base, cls).apply(*args, **kwargs)

    base.apply = classmethod(noted)
    try:
        yield
    finally:
        del base.apply
