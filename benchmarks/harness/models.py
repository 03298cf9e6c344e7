"""The models of the harness: GPT-2 and Llama of transformers, without dropout."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from autopart.compile.bench.setting import NotExpressibleError

SEED = 0


def make_gpt2(options: argparse.Namespace) -> nn.Module:
    """GPT-2, whose head is its embedding."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=options.vocabulary,
            n_positions=options.sequence,
            n_embd=options.width,
            n_layer=options.layers,
            n_head=options.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
    )


def make_llama(options: argparse.Namespace) -> nn.Module:
    """Llama; its inner width 8/3 of the width, as the paper's, up to a multiple of 64."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocabulary,
            max_position_embeddings=options.sequence,
            hidden_size=options.width,
            intermediate_size=-(-options.width * 8 // (3 * 64)) * 64,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            num_key_value_heads=options.heads,
            attention_dropout=0.0,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )


MODELS: Mapping[str, Callable[[argparse.Namespace], nn.Module]] = {"gpt2": make_gpt2, "llama": make_llama}


def make(options: argparse.Namespace) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The same model and batch on every rank, on the CPU."""
    torch.manual_seed(SEED)
    model = MODELS[options.model](options).train()
    shape = (options.batch, options.sequence)
    tokens = torch.randint(options.vocabulary, shape, generator=torch.Generator().manual_seed(SEED))
    return model, {"input_ids": tokens, "labels": tokens.clone()}


def name_of(model: Any) -> str:
    """The name in MODELS of a model. Raises NotExpressibleError for another, for which nobody wrote a system by
    hand."""
    name = str(getattr(getattr(model, "config", None), "model_type", ""))
    if name not in MODELS:
        written = " and ".join(MODELS)
        raise NotExpressibleError(f"by hand it is written for transformers' {written}, not for {type(model).__name__}")
    return name
