"""Arguments of kernels at the sizes of models: forms whose dims are replaced, filled with random numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from autopart.kernels.forms import FLOAT, HALF, Chosen
from benchmarks.gpu.forms import form_of

Sizes = Mapping[int, int | str]
ROWS: Sizes = {2: "b", 3: "s", 6: "n"}
"""Rows of b samples of s tokens, n = b s."""
HEADS: Sizes = {2: "b", 4: 32, 1: 8, 6: "s", 8: 128}
"""32 heads of queries, 8 of keys and values."""
TABLES: Sizes = {2: "b", 4: 32, 6: "s", 8: 128}
"""32 heads to be turned by angles of tokens."""


class Layer(NamedTuple):
    """A layer of a model.

    sizes   dim of the form -> its size
    wanted  constants by which a form is chosen
    mixed   whether the model has a form of its own in half precision, where there is one
    """

    model: str
    sizes: Sizes
    wanted: tuple[object, ...] = ()
    mixed: bool = True


def _wide(model: str, d: int, *wanted: object) -> Layer:
    return Layer(model, {**ROWS, 8: d}, wanted)


def _head(model: str, vocabulary: int, d: int) -> Layer:
    return Layer(model, {**ROWS, 5: vocabulary, 8: d})


_LLAMA_WIDTH, _GPT2_WIDTH = _wide("Llama-3-8B", 4096), _wide("GPT-2 XL", 1600)
_HEADS_OF_VOCABULARY = (_head("Llama-3-8B", 128256, 4096), _head("GPT-2 XL", 50257, 1600))
_MIXTRAL = Layer("Mixtral-8x7B", {6: "n", 12: "2n", 8: 4096, 16: 28672, 4: 8, 5: 9, 2: 2})
_IMAGE = Layer("Stable Diffusion 1.5", {2: "b", 10: 320, 3: 64, 5: 32})
_SCORES = Layer("GPT-2 XL", {2: "b", 4: 25, 6: 1024, 3: 128})

LAYERS: Mapping[str, tuple[Layer, ...]] = {
    "rms_norm": (_LLAMA_WIDTH,),
    "add_rms_norm": (_LLAMA_WIDTH,),
    "rms_norm_float32": (_wide("Gemma-7B", 3072),),
    "add_rms_norm_float32": (_wide("Gemma-7B", 3072),),
    "layer_norm": (_GPT2_WIDTH,),
    "add_layer_norm": (_GPT2_WIDTH,),
    "layer_norm_float32": (_wide("Command R", 8192),),
    "group_norm": (_IMAGE,),
    "group_norm_silu": (_IMAGE,),
    "rotary": (Layer("Llama-3-8B", TABLES, mixed=False),),
    "rotary_interleaved": (Layer("Command R", {**TABLES, 4: 64}),),
    "rotary_deinterleaved": (Layer("DeepSeek-V3, 32 heads", {**TABLES, 8: 64}),),
    "activation": (_wide("BLOOM-7B1", 16384, "bloom_gelu"),),
    "bias_activation": (_wide("GPT-2 XL", 6400, "gelu_new"),),
    "swiglu": (_wide("Llama-3-8B", 14336),),
    "geglu": (_wide("T5-v1.1-XXL", 10240, "gelu_pytorch_tanh"),),
    "reglu": (_wide("T5 of arXiv 2002.05202", 2048),),
    "gated_halves": (Layer("Mixtral-8x7B", {**ROWS, 16: 28672}, ("silu", True)),),
    "linear_loss": _HEADS_OF_VOCABULARY,
    "linear_cross_entropy": _HEADS_OF_VOCABULARY[:1],
    "cross_entropy": _HEADS_OF_VOCABULARY,
    "vocab_cross_entropy": _HEADS_OF_VOCABULARY[:1],
    "embedding": _HEADS_OF_VOCABULARY,
    "attention": (
        Layer("Llama-3-8B", HEADS),
        Layer("GPT-2 XL", {2: "b", 4: 25, 1: 25, 6: 1024, 8: 64}, (1 / 0.9,)),
        Layer("gpt-oss-20b", {2: "b", 4: 64, 1: 8, 6: "s", 8: 64, 5: 128}, (Chosen(5),)),
        Layer("T5-11B", {2: "b", 4: 128, 1: 128, 6: "s", 8: 128, 11: "2s-1"}, (1.0,)),
    ),
    "topk_softmax": (_SCORES,),
    "residual_dropout": (_GPT2_WIDTH,),
    "stochastic_depth": (Layer("ViT-L/16", {2: 256, 3: 197, 8: 1024}),),
    "adamw": (Layer("Llama-3-8B", {2: 1, 3: 14336, 8: 4096}),),
    "lion": (Layer("Llama-3-8B", {2: 1, 3: 14336, 8: 4096}),),
    **dict.fromkeys(
        ("route", "expert_load", "sort_by_expert", "permute", "unpermute", "grouped_matmul"), (_MIXTRAL,)
    ),
    "route_topk": (Layer("gpt-oss-120b", {6: "n", 4: 128, 2: 4}),),
    "route_dense": (Layer("Llama-4-Scout", {6: "n", 4: 16, 2: 1}),),
    "route_scores": (Layer("DeepSeek-V3", {6: "n", 12: 256, 2: 8, 4: 8, 3: 4}),),
    "clamped_experts": (Layer("16 experts of width 96", {6: "n", 8: 256, 4: 16, 10: 192, 5: 96, 2: 2}),),
    "experts": (Layer("16 experts of width 96", {6: "n", 8: 256, 4: 16, 10: 192, 5: 96, 2: 2}),),
    "scan": (Layer("Mamba2-2.7B", {1: "b", 6: "s", 4: 80, 8: 64, 2: 1, 7: 128, 3: 256}),),
}  # fmt: skip
"""Kernel -> layers of models. The reference of a mixture's experts copies the weights of every pair: they are small."""

Meta = tuple[Any, ...]


def _below(place: int, dim: int) -> Callable[[torch.Tensor, Meta], torch.Tensor]:
    """Whole numbers below a dim of another argument."""
    return lambda like, given: torch.randint(given[place].shape[dim], like.shape)


def _positive(like: torch.Tensor, given: Meta) -> torch.Tensor:
    return torch.rand(like.shape) + 0.5


def _negative(like: torch.Tensor, given: Meta) -> torch.Tensor:
    return -0.1 * torch.rand(like.shape)


def _distinct(like: torch.Tensor, given: Meta) -> torch.Tensor:
    """No two alike in a row, in half precision neither: a choice of the largest is the same in every dtype."""
    return torch.rand(like.shape).argsort(-1) / 4 - 1


def _between(like: torch.Tensor, given: Meta) -> torch.Tensor:
    """No two alike in a row, from -1.9 to 2.1: their sigmoids too differ in float32."""
    return 4 * torch.rand(like.shape).argsort(-1) / like.shape[-1] - 1.9


def _small(like: torch.Tensor, given: Meta) -> torch.Tensor:
    return 0.01 * torch.randn(like.shape)


def _heads_last(like: torch.Tensor, given: Meta) -> torch.Tensor:
    """Heads as models hand them over: a transposed view of what a linear layer has written."""
    return torch.randn(like.transpose(1, 2).shape, dtype=like.dtype).transpose(1, 2)


def _keys(like: torch.Tensor, given: Meta) -> torch.Tensor:
    """The second sample has half of the keys."""
    samples, keys = like.shape
    return torch.arange(keys) < keys // torch.arange(1, 1 + samples)[:, None]


def _ids(pairs: int) -> torch.Tensor:
    """The expert, one of four, of every pair of a token and one of its experts: some have more pairs than others."""
    return (torch.arange(pairs) * 7 % 11) % 4


def _order(like: torch.Tensor, given: Meta) -> torch.Tensor:
    return _ids(len(like)).argsort(stable=True)


def _place(like: torch.Tensor, given: Meta) -> torch.Tensor:
    return _order(like, given).argsort()


def _offsets(like: torch.Tensor, given: Meta) -> torch.Tensor:
    """Rows of experts, of which the first has more than the others."""
    rows, experts = len(given[0]), len(like) - 1
    return torch.tensor([0, *(rows - (experts - e) * (rows // (experts + 1)) for e in range(1, experts + 1))])


DRAWN: Mapping[str, Mapping[int, Callable[[torch.Tensor, Meta], torch.Tensor]]] = {
    "linear_loss": {2: _below(1, 0)},
    "linear_cross_entropy": {2: _below(1, 0)},
    "cross_entropy": {1: _below(0, 1)},
    "vocab_cross_entropy": {1: _below(0, 1)},
    "embedding": {0: _below(1, 0)},
    **{name: {0: _heads_last} for name in ("rotary", "rotary_interleaved", "rotary_deinterleaved")},
    "adamw": {3: _positive},
    "attention": {4: _keys},
    "route": {0: _distinct},
    "route_topk": {0: _distinct},
    "route_dense": {0: _distinct},
    "route_scores": {0: _between, 1: _small},
    "expert_load": {0: _distinct},
    "sort_by_expert": {0: lambda like, given: _ids(len(like))},
    "permute": {1: _order, 2: _place},
    "unpermute": {2: _order, 3: _place},
    "grouped_matmul": {2: _offsets},
    "experts": {4: lambda like, given: _ids(like.numel()).view(like.shape)},
    "clamped_experts": {6: lambda like, given: _ids(like.numel()).view(like.shape)},
    "scan": {1: _positive, 2: _negative},
}
"""Kernel -> place of an argument -> what it is filled with. Other tensors are normal, words of 32 bits any."""


def arguments(kernel: str, layer: Layer | None, dtype: torch.dtype, tokens: int, device: str) -> tuple[Any, ...]:
    """The arguments of a kernel in a layer, or as its form has them where there is none.

    dtype   float32, or that of all tensors that the form has in half precision, or of all if it has none
    tokens  n, of b = 2 samples
    """
    torch.manual_seed(0)
    given = shaped(kernel, layer, dtype, tokens)
    drawn = DRAWN.get(kernel, {})
    return tuple(
        _filled(part, given, drawn.get(place), device) if isinstance(part, torch.Tensor) else part
        for place, part in enumerate(given)
    )


def shaped(kernel: str, layer: Layer | None, dtype: torch.dtype, tokens: int) -> Meta:
    """The arguments of a kernel, their tensors on meta."""
    wanted, mixed = (layer.wanted, layer.mixed) if layer else ((), True)
    form = form_of(kernel, dtype if mixed else FLOAT, wanted)
    named = {"b": 2, "s": tokens // 2, "n": tokens, "2n": 2 * tokens, "2s-1": tokens // 2 * 2 - 1}
    sizes = {old: named[new] if isinstance(new, str) else new for old, new in (layer.sizes if layer else {}).items()}
    half = any(isinstance(part, torch.Tensor) and part.dtype == HALF for part in form)
    return tuple(_resized(part, sizes, dtype, HALF if half else FLOAT) for part in form)


def _resized(part: object, sizes: Mapping[int, int], dtype: torch.dtype, replaced: torch.dtype) -> object:
    """A tensor, or a number that a model chooses, of other sizes; a tensor of a dtype that is replaced, in `dtype`."""
    if isinstance(part, Chosen):
        return sizes.get(int(part), int(part))
    if not isinstance(part, torch.Tensor):
        return part
    shape = [sizes.get(n, n) for n in part.shape]
    return torch.empty(shape, dtype=dtype if part.dtype == replaced else part.dtype, device="meta")


def _filled(part: torch.Tensor, given: Meta, draw: Any, device: str) -> torch.Tensor:
    with torch.device(device):
        if draw is not None:
            return draw(part, given).to(part.dtype)
        if part.dtype == torch.int32:
            return torch.randint(-(2**31), 2**31, part.shape, dtype=torch.int32)
        return torch.randn(part.shape, dtype=part.dtype)
