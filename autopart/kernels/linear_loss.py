"""The mean cross-entropy of the last linear map, as models write it. A stage runs it by `linear_cross_entropy`.

The mean is over the targets that are not ``ignore_index``. A stage divides by their number in the whole batch, which
this function cannot know: `autopart.passes.sharded_calls` puts `linear_cross_entropy` in its place.
"""

from typing import Any

import torch
from torch.nn import functional as F

from autopart.kernels.cross_entropy import SHAPES, compile_ahead, scaled
from autopart.kernels.kernel import Bytes, Kernel
from autopart.kernels.linear_cross_entropy import ROWS, linear_cross_entropy
from autopart.kernels.linear_cross_entropy import bytes_moved as linear_cross_entropy_bytes

COLUMNS = 4096
"""The smallest vocabulary whose head is fused. The logits of a smaller one are about as large as the hidden states."""


def reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    softcap: float = 0.0,
    scale: float = 1.0,
    divisor: float = 1.0,
) -> torch.Tensor:
    """The mean of the losses of hidden (..., d), weight (v, d), targets (n,) and bias (v,)."""
    logits = scaled(F.linear(hidden, weight, bias), compute_dtype, softcap, scale, divisor)
    rows = logits.reshape(-1, len(weight))
    return F.cross_entropy(rows, targets, ignore_index=ignore_index, label_smoothing=label_smoothing)


def linear_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    softcap: float = 0.0,
    scale: float = 1.0,
    divisor: float = 1.0,
) -> torch.Tensor:
    """`reference`, without logits of all rows at once."""
    valid: Any = (targets != ignore_index).sum()
    constants = label_smoothing, compute_dtype, 0.0, softcap, scale, divisor
    return linear_cross_entropy(hidden.flatten(0, -2), weight, targets, bias, valid, ignore_index, *constants)


def bytes_moved(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *rest: object) -> Bytes:
    """As `linear_cross_entropy.bytes_moved`, of hidden (..., d)."""
    return linear_cross_entropy_bytes(hidden.flatten(0, -2), weight, targets, *rest)


def pays(hidden: torch.Tensor, weight: torch.Tensor, *rest: object) -> bool:
    """Whether logits are much larger than hidden states."""
    return weight.shape[0] >= max(COLUMNS, 2 * weight.shape[1])


def workspace(hidden: torch.Tensor, weight: torch.Tensor, *rest: object) -> int:
    """Bytes of a chunk of logits of ``ROWS`` rows. A larger chunk takes fewer bytes than hidden besides."""
    return ROWS * len(weight) * hidden.itemsize


KERNEL = Kernel(
    function=linear_loss,
    reference=reference,
    rule="",
    kept=lambda arguments, outputs: arguments[:1],  # hidden's gradient; the weight's counts with those of its backward
    bytes_moved=bytes_moved,
    ahead=compile_ahead,
    shapes=SHAPES,
    pays=pays,
    workspace=workspace,
    chunked=True,
    everywhere=True,
)
"""Its rule is in `autopart.sharding.rules.losses`: what runs on a shard is another function."""
