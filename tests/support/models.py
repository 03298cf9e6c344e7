"""Tiny models with random weights: the same for everyone who asks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

from autopart.passes.source import Source

SAMPLES, TOKENS, WORDS, WIDTH, HEADS = 8, 12, 96, 32, 4
Batch = dict[str, torch.Tensor]


class Mlp(nn.Module):
    """Numbered layers, each of which reads the two before it; forward returns the loss alone."""

    def __init__(self, layers: int = 3, width: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, 8)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        before = torch.zeros_like(x)
        for layer in self.layers:
            x, before = x + before + F.gelu(layer(x)), x
        return F.mse_loss(self.head(x + before), target)


class Exact(nn.Module):
    """A causal model whose loss keeps its precision; transformers' own casts the logits to float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=input_ids).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


class RmsNorm(nn.Module):
    """A norm that computes in its own precision; transformers' own casts to float32."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def gpt2(layers: int, **settings: Any) -> nn.Module:
    """A GPT-2 without dropout."""
    names = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    config = {"n_embd": WIDTH, "n_head": HEADS, "vocab_size": WORDS, "n_positions": 32, **dict.fromkeys(names, 0.0)}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**{**config, "n_layer": layers, "use_cache": False, **settings}))


def llama(layers: int, **settings: Any) -> nn.Module:
    """A Llama whose queries share keys and values two by two."""
    config = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": 2, "vocab_size": WORDS,
              "intermediate_size": 64, "max_position_embeddings": 32, "use_cache": False}  # fmt: skip
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**config, "num_hidden_layers": layers, **settings}))


def bert(layers: int) -> nn.Module:
    """A BERT that fills in words."""
    return hf.BertForMaskedLM(
        hf.BertConfig(num_hidden_layers=layers, hidden_size=WIDTH, num_attention_heads=HEADS, vocab_size=WORDS,
                      intermediate_size=64, max_position_embeddings=32, hidden_dropout_prob=0.0,
                      attention_probs_dropout_prob=0.0)
    )  # fmt: skip


def t5(layers: int) -> nn.Module:
    """A T5 with as many layers on either side."""
    return hf.T5ForConditionalGeneration(
        hf.T5Config(num_layers=layers, d_model=WIDTH, num_heads=HEADS, d_kv=8, vocab_size=WORDS, d_ff=64,
                    dropout_rate=0.0, use_cache=False, decoder_start_token_id=0)
    )  # fmt: skip


def vit(layers: int) -> nn.Module:
    """A ViT that tells ten classes apart."""
    return hf.ViTForImageClassification(
        hf.ViTConfig(num_hidden_layers=layers, hidden_size=WIDTH, num_attention_heads=HEADS, intermediate_size=64,
                     image_size=16, patch_size=8, num_labels=10, hidden_dropout_prob=0.0,
                     attention_probs_dropout_prob=0.0)
    )  # fmt: skip


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "gpt2": gpt2, "llama": llama, "bert": bert, "t5": t5, "vit": vit, "mlp": Mlp,
}  # fmt: skip


def batch_for(name: str, dtype: torch.dtype, samples: int = SAMPLES) -> Batch:
    """A batch; the share of labels that do not count differs from sample to sample."""
    random = torch.Generator().manual_seed(1)
    if name == "mlp":
        x, target = (torch.randn(samples, n, generator=random, dtype=dtype) for n in (WIDTH, 8))
        return {"x": x, "target": target}
    if name == "vit":
        pixels = torch.randn(samples, 3, 16, 16, generator=random, dtype=dtype)
        return {"pixel_values": pixels, "labels": torch.randint(0, 10, (samples,), generator=random)}
    ids = torch.randint(3, WORDS, (samples, TOKENS), generator=random)
    labels = torch.randint(3, WORDS, (samples, TOKENS), generator=random)
    share = torch.linspace(0.0, 0.8, samples)[:, None]
    labels[torch.rand(samples, TOKENS, generator=random) < share] = -100
    batch = {"input_ids": ids, "labels": labels[:, : TOKENS - 4 if name == "t5" else TOKENS].clone()}
    if name == "bert":
        batch["attention_mask"] = (torch.arange(TOKENS) < torch.arange(TOKENS, TOKENS - samples, -1)[:, None]).long()
    return batch


def build(name: str, dtype: torch.dtype = torch.float32, layers: int = 2) -> tuple[nn.Module, Batch]:
    """A model and a batch of SAMPLES for it. In float64 nothing is cast to float32 on the way."""
    torch.manual_seed(0)
    model = MODELS[name](layers).to(dtype)
    if dtype == torch.float64 and name in ("llama", "t5"):
        for path, norm in list(model.named_modules()):
            if type(norm).__name__ in ("LlamaRMSNorm", "T5LayerNorm"):
                model.set_submodule(path, RmsNorm(norm.weight, norm.variance_epsilon))
    if dtype == torch.float64 and name in ("gpt2", "llama"):
        model = Exact(model)
    return model.train(), batch_for(name, dtype)


@cache
def source(name: str, dtype: torch.dtype = torch.float32, layers: int = 2) -> Source:
    """A model with its batch, whose traces all tests share: no test changes the model."""
    return Source(*build(name, dtype, layers), dtype)
