"""nn.Module + batch -> the program of torch.export, without side effects; or PartitionError with the reason why not.

Where torch.export would silently give another function, the model is refused or the trace put right: regions without
gradients, backward functions of the user's own, `weight.data`, Python's own random numbers.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import fx, nn

from autopart.errors import OperatorError, PartitionError
from autopart.frontend.autograd_functions import CustomFunction
from autopart.frontend.block_counts import no_block_counts
from autopart.frontend.fake_model import fake_model, fake_tensor, gather_experts, without_caches
from autopart.frontend.functionalize import functional, one_name_each
from autopart.frontend.layer_sampling import Sample, UnlikeLayers
from autopart.frontend.no_gradient import detach_no_grad_values, refuse_hidden_tensors
from autopart.frontend.returned_scalars import note_scalars
from autopart.frontend.short_loops import short_loops
from autopart.frontend.source_lines import user_line
from autopart.frontend.torch_private import FakeTensorMode, lazy_graph_modules
from autopart.frontend.tracing_contexts import (
    casts_that_change_nothing,
    custom_functions,
    drawing,
    foreign_random,
    lstm_states,
    no_inference_mode,
    no_tensor_hooks,
    no_validation,
    open_checkpoints,
    plain_run,
    remembered_frames,
    silent,
)
from autopart.ir.ctc import ctc_loss

LARGEST_DRAWN = 1.0 - 2.0**-53
"""The largest number that Python's uniform random numbers between 0 and 1 can be."""


def export(
    model: nn.Module,
    inputs: Mapping[str, Any],
    dtype: torch.dtype | None,
    sampled: Sequence[Sample] = (),
    short: bool = False,
) -> torch.export.ExportedProgram:
    """Export the forward pass of a copy of the model with fake tensors and with the first blocks alone of the lists in
    `sampled`. `short`: with some iterations of long loops, or with all of them where it cannot be traced so.

    Raises PartitionError with the user's line. If the model can be traced with another attention function of
    transformers, the error names it.
    """
    shortened: list[int] = []
    try:
        found = shortened if short else None
        exported, drew = _export(model, inputs, dtype, sampled, shortened=found)
        if drew and str(_export(model, inputs, dtype, sampled, drawn=0.0, shortened=found)[0].graph) != str(
            exported.graph
        ):
            raise OperatorError(
                "the forward pass draws from Python's or numpy's random",
                "a trace would keep the one outcome it saw",
                "layerdrop=0 in the config, or torch.rand",
            )
        return exported
    except (PartitionError, UnlikeLayers):
        raise
    except Exception as error:  # whatever a forward pass may raise
        if shortened:
            return export(model, inputs, dtype, sampled)
        own = [*model._modules, *model._parameters, *model._buffers]
        if taken := [name for name in own if hasattr(fx.GraphModule, name) and not hasattr(nn.Module, name)]:
            raise PartitionError(
                f"torch.export cannot trace an attribute of the model that is called {taken[0]!r}",
                "torch.fx's graph modules have another of that name",
                "another name for it, or this model inside of another module",
            ) from error
        final = not sampled or _depends_on_data(error)
        names = ("sdpa", "eager") if final else ()
        other = next((name for name in names if _traces_with(model, inputs, dtype, name, sampled)), "")
        raise _untraceable(error, other) from error


def _export(
    model: nn.Module,
    inputs: Mapping[str, Any],
    dtype: torch.dtype | None,
    sampled: Sequence[Sample] = (),
    attention: str = "",
    drawn: float = LARGEST_DRAWN,
    shortened: list[int] | None = None,
) -> tuple[torch.export.ExportedProgram, bool]:
    """The program where all that Python and numpy draw is `drawn`, and whether anything was drawn. Where the program is
    the same for the least and the largest number, as with layerdrop=0, draws do not matter."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    skeleton: Any = fake_model(model, mode, dtype, sampled)
    kwargs = {k: fake_tensor(v, mode) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    gather_experts(skeleton)
    without_caches(skeleton)
    if attention:
        skeleton.set_attn_implementation(attention)
    custom: list[CustomFunction] = []
    before = foreign_random()
    with (
        mode,
        lazy_graph_modules(True),
        warnings.catch_warnings(),
        custom_functions(custom),
        no_inference_mode(),
        open_checkpoints(),
        plain_run(),
        no_tensor_hooks(),
        casts_that_change_nothing(),
        lstm_states(),
        no_validation(),
        remembered_frames(),
        torch.enable_grad(),
        silent(),
        mock.patch.object(torch, "ctc_loss", ctc_loss),
        drawing(drawn) as draws,
        no_block_counts(skeleton, sampled),
        nullcontext() if shortened is None else short_loops(model, shortened),
    ):
        warnings.simplefilter("ignore", FutureWarning)
        exported = torch.export.export(skeleton, (), kwargs, strict=False)
        refuse_hidden_tensors(exported)
        detach_no_grad_values(exported)
        one_name_each(exported)
        exported = functional(exported)
        note_scalars(exported, {n for n, p in model.named_parameters() if p.requires_grad})
    for function in {function.key: function for function in reversed(custom)}.values():
        function.check()
    return exported, bool(draws) or foreign_random() != before


def _traces_with(
    model: nn.Module,
    inputs: Mapping[str, Any],
    dtype: torch.dtype | None,
    attention: str,
    sampled: Sequence[Sample],
) -> bool:
    """Whether the model can be traced with the attention function `attention` of transformers, if that is another."""
    current = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if current in (None, attention) or not hasattr(model, "set_attn_implementation"):
        return False
    try:
        _export(model, inputs, dtype, sampled, attention)
    except Exception:
        return False
    return True


def _untraceable(error: Exception, attention: str) -> PartitionError:
    where = user_line(traceback.extract_tb(error.__traceback__))
    reason = _reason(error)
    advice = "see whether model(**batch) runs by itself; if it does, other operators in that line"
    kind = OperatorError if _depends_on_data(error) else PartitionError
    if kind is OperatorError:
        reason = "what it does depends on the values of tensors"
        advice = "take values that depend on data (.item(), if x.sum() > 0, nonzero) out of the forward pass"
    if attention:
        advice = f'model.set_attn_implementation("{attention}"): the same function, and it can be traced'
    return kind("torch.export cannot trace the model", f"{where}  {reason}", advice)


def _depends_on_data(error: Exception) -> bool:
    """Whether the forward pass asks for the value of a tensor."""
    return "DataDependent" in _reason(error)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
