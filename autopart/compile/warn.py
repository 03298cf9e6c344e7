"""What a user should know of a program and might not ask: warnings of `autopart.compile`."""

import warnings
from collections.abc import Iterator

from torch import nn

from autopart.errors import few
from autopart.frontend.returned_scalars import SCALARS
from autopart.frontend.torch_private import tree_leaves
from autopart.ir.graph import Traced
from autopart.passes.trace import loss_of
from autopart.plan.data import Plan


def warn(plan: Plan, traced: Traced, model: nn.Module) -> None:
    """Show the plan's notes, and name what the model asks for and the program does not do, as UserWarnings."""
    for text in (*plan.notes, *_not_trained(traced), *_not_followed(model)):
        warnings.warn(f"autopart: {text}", stacklevel=3)


def _not_followed(model: nn.Module) -> Iterator[str]:
    """A sentence on the activation checkpointing of a transformers model."""
    if any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules()):
        yield (
            "gradient_checkpointing_enable() is not followed: the plan says which blocks are recomputed; recompute="
            "'full', 'mincut', 'selective' or 'none' asks for it"
        )


def _not_trained(traced: Traced) -> Iterator[str]:
    """A sentence on scalars with a gradient that the model returns beside the loss and that are no part of it."""
    returned = traced.graph.output_node().meta[SCALARS]
    leaves = tree_leaves(returned)
    loss = loss_of(returned, leaves, lambda leaf: leaf is not None)
    if others := [leaf.source for leaf in leaves if leaf is not None and loss.name in leaf.beside]:
        yield (
            f"the model returns other scalars with gradients ({few(others)}), and only the loss ({loss.source}) is "
            "trained; return their sum as the loss, or detach what is only logged"
        )
