"""Call targets of random operators, and of what is returned, in a traced graph. Emitted code calls
`autopart.runtime.random` and `autopart.runtime.outputs` instead.

Each takes the name of a stream of random numbers. A number depends on the seed, the step, the stream and the indices of
the element in the whole batch. So it is the same on every rank and in every order of drawing.
"""

from collections.abc import Callable, Sequence

import torch

from autopart.kernels.attention_reference import reference


class Stream(str):
    """The name of a stream of random numbers: the path of the module that draws, numbered where it draws again."""

    __slots__ = ()


def renamed(value: object, new: Callable[[str], str]) -> object:
    """Arguments in which streams are of other modules; `new` gives a module's path for its path."""
    if isinstance(value, Stream):
        module, mark, number = value.partition("#")
        return Stream(new(module) + mark + number)
    if isinstance(value, (list, tuple)):
        return type(value)(renamed(v, new) for v in value)
    return value


def relative(value: object, label: str) -> object:
    """Arguments in which the names of streams lack the prefix `label`, so that those of equal blocks are equal."""
    return renamed(value, lambda module: module.removeprefix(label))


def dropout(x: torch.Tensor, p: float, stream: Stream) -> torch.Tensor:
    """Set each element to zero with probability `p`, and scale the others by 1 / (1 - p)."""
    return x * 1.0


def residual_dropout(
    x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, p: float, stream: Stream
) -> torch.Tensor:
    """residual + dropout(x + bias)."""
    return residual + dropout(x if bias is None else x + bias, p, stream)


def stochastic_depth(x: torch.Tensor, residual: torch.Tensor, p: float, stream: Stream) -> torch.Tensor:
    """residual + x, of which each sample (dim 0) is set to zero with probability `p`, or scaled by 1 / (1 - p)."""
    return residual + dropout(x, p, stream)


def dropout_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    padding: torch.Tensor | None,
    bias: torch.Tensor | None,
    relative: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    cap: float,
    even: bool,
    p: float,
    stream: Stream,
) -> torch.Tensor:
    """`autopart.kernels.attention.attention` of the arguments before `p`, with dropout of its softmax."""
    return reference(query, key, value, mask, padding, bias, relative, sinks, scale, causal, window, cap, even)


def returned(x: torch.Tensor, name: Stream) -> torch.Tensor:
    """A value that an evaluation returns beside the loss, by the name of the output."""
    return x * 1.0


def uniform(like: torch.Tensor, stream: Stream, dtype: torch.dtype) -> torch.Tensor:
    """Uniform numbers between 0 and 1, neither included, in the shape of `like`."""
    return torch.empty_like(like, dtype=dtype)


def uniform_of(size: Sequence[int], dtype: torch.dtype, stream: Stream) -> torch.Tensor:
    """Uniform numbers between 0 and 1, neither included, in the shape `size`."""
    return torch.empty(size, dtype=dtype, device="meta")
