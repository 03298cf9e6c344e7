"""torch.compile over the blocks of an emitted stage.

Each block is compiled by itself, and blocks of one class share their compiled code. What blocks call of autopart, such
as collectives, kernels and dropout, runs between the compiled parts, as it does without torch.compile.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autopart.errors import PartitionError

SETTINGS = ("backend", "mode", "options", "dynamic")
"""Arguments of torch.compile that may be given: not `fullgraph`, for collectives are between compiled parts."""

TorchCompile = bool | Mapping[str, Any]
"""Whether blocks are compiled; or the arguments of torch.compile."""


def check(given: TorchCompile) -> None:
    """Raise PartitionError for what is neither a bool nor arguments of torch.compile that blocks can have."""
    if isinstance(given, bool) or (isinstance(given, Mapping) and set(given) <= set(SETTINGS)):
        return
    raise PartitionError(f"compile={given!r}", "a dict may have " + ", ".join(SETTINGS), "compile=True")


def compile_blocks(stage: nn.Module, namespace: dict[str, Any], given: TorchCompile) -> None:
    """Let torch.compile compile every block of a stage, or the stage where it has none, when it is first called.

    namespace  the globals of the emitted module, whose functions of autopart are left out of compiled code

    Raises PartitionError for a backend or a mode that torch.compile does not know.
    """
    if given is False:
        return
    for name, value in namespace.items():
        if not isinstance(value, type) and getattr(value, "__module__", "").startswith("autopart."):
            namespace[name] = torch.compiler.disable(value)
    blocks = [module for module in stage.modules() if module is not stage and not isinstance(module, nn.ModuleList)]
    try:
        for block in blocks or [stage]:
            block.compile(**({} if given is True else given))
    except Exception as error:
        raise PartitionError(f"torch.compile does not take {given!r}", str(error)) from error
