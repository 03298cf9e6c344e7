"""CTC loss as an operator that can be traced where lengths are tensors: torch's own operator reads their values."""

from typing import Any

import torch

aten = torch.ops.aten
own = torch.ctc_loss


@torch.library.custom_op("autopart::ctc_losses", mutates_args=())
def ctc_losses(
    log_probs: torch.Tensor,
    targets: torch.Tensor,
    input_lengths: torch.Tensor,
    target_lengths: torch.Tensor,
    blank: int,
    zero_infinity: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of every sample (b,), and its gradient to log_probs (t, b, c), for targets (b, s)."""
    given = log_probs, targets, input_lengths, target_lengths
    losses, alpha = aten._ctc_loss.Tensor(*given, blank, zero_infinity)
    ones = torch.ones_like(losses)
    gradients = aten._ctc_loss_backward.Tensor(ones, *given, losses, alpha, blank, zero_infinity)
    return torch.where(losses.isinf(), 0.0, losses) if zero_infinity else losses, gradients


@ctc_losses.register_fake
def _(log_probs: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return log_probs.new_empty(log_probs.shape[1]), torch.empty_like(log_probs)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, of_losses: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    (gradients,) = ctx.saved_tensors
    return gradients * of_losses[:, None], None, None, None, None, None


ctc_losses.register_autograd(_backward, setup_context=_keep)


def ctc_loss(
    log_probs: torch.Tensor,
    targets: torch.Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: int = 1,
    zero_infinity: bool = False,
) -> torch.Tensor:
    """torch.ctc_loss, by `ctc_losses` where targets are (b, s) and lengths are tensors; else by torch's operator."""
    tensors = isinstance(input_lengths, torch.Tensor) and isinstance(target_lengths, torch.Tensor)
    if not tensors or log_probs.dim() != 3 or targets.dim() != 2:
        return own(log_probs, targets, input_lengths, target_lengths, blank, reduction, zero_infinity)
    losses: torch.Tensor
    losses, _ = ctc_losses(log_probs, targets, input_lengths, target_lengths, blank, zero_infinity)
    if reduction == 1:
        return (losses / target_lengths.clamp(min=1)).mean()
    return losses.sum() if reduction == 2 else losses
