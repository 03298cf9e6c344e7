"""Fused kernels in models of transformers, as they are planned for GPUs: how many calls of each."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import autopart
from autopart.frontend.batch import outline
from autopart.ir.graph import calls, info
from autopart.kernels.table import kernel_of
from autopart.passes.source import prepare
from benchmarks.coverage.zoo_models import architectures, build
from benchmarks.kernels.matches import row

pytestmark = pytest.mark.slow

TASKS = {model_type: task for task, model_type in architectures()}
CALLS = {
    "llama": {"rms_norm": 3, "add_rms_norm": 2, "rotary": 4, "swiglu": 2},
    "gpt2": {"add_layer_norm": 2, "bias_activation": 2},
    "bert": {"add_layer_norm": 4, "bias_activation": 3},
    "t5": {"rms_norm": 6, "add_rms_norm": 6, "attention": 4},
    "mistral": {"rms_norm": 3, "add_rms_norm": 2, "rotary": 4, "swiglu": 2, "attention": 2},
    "qwen3": {"rms_norm": 7, "add_rms_norm": 2, "rotary": 4, "swiglu": 2},
    "gemma2": {"rms_norm_float32": 7, "add_rms_norm_float32": 2, "rotary": 4, "geglu": 2, "attention": 2},
    "gemma3_text": {"rms_norm_float32": 31, "add_rms_norm_float32": 6, "rotary": 12, "geglu": 6, "attention": 5},
    "mixtral": {"rms_norm": 3, "add_rms_norm": 2, "rotary": 4, "route": 2, "experts": 2},
    "qwen3_moe": {"rms_norm": 7, "add_rms_norm": 2, "rotary": 4, "route": 2, "experts": 2},
    "deepseek_v3": {
        "rms_norm": 7,
        "add_rms_norm": 2,
        "rotary_deinterleaved": 4,
        "swiglu": 2,
        "route_scores": 1,
        "experts": 1,
    },
    "minimax_m2": {"rms_norm": 7, "add_rms_norm": 2, "rotary": 4, "route_scores": 2, "experts": 2},
    "llama4_text": {
        "rms_norm": 5,
        "add_rms_norm": 4,
        "rms_norm_float32": 6,
        "route_dense": 4,
        "gated_halves": 4,
        "swiglu": 4,
    },
    "granitemoe": {"rms_norm": 3, "add_rms_norm": 2, "rotary": 4, "route_topk": 2, "experts": 2},
    "gpt_oss": {"rms_norm": 5, "rotary": 4, "route_topk": 2, "clamped_experts": 2, "attention": 2},
    "deepseek_v2": {"rms_norm": 7, "add_rms_norm": 2, "route": 2, "experts": 2, "swiglu": 2},
    "falcon": {"rotary": 4},
    "bloom": {"add_layer_norm": 2, "bias_activation": 2, "attention": 2},
    "mpt": {"add_layer_norm": 2, "attention": 2},
    "ernie4_5_moe": {"rms_norm": 3, "add_rms_norm": 2, "swiglu": 2, "route_scores": 1, "experts": 1},
    "opt": {"bias_activation": 2},
    "phi3": {"rms_norm": 3, "add_rms_norm": 2, "rotary": 4, "gated_halves": 2},
    "vit": {"add_layer_norm": 2, "bias_activation": 2},
    "mamba2": {"rms_norm": 3, "rms_norm_float32": 2, "swiglu": 2, "scan": 2},
    "bamba": {"rms_norm": 3, "add_rms_norm": 2, "rms_norm_float32": 1, "rotary": 2, "scan": 1, "swiglu": 3},
    "falcon_h1": {"rms_norm": 3, "add_rms_norm": 2, "rotary": 4, "scan": 2, "swiglu": 4},
    "granitemoehybrid": {
        "rms_norm": 3,
        "add_rms_norm": 2,
        "rms_norm_float32": 1,
        "experts": 2,
        "route_topk": 2,
        "gated_halves": 2,
        "scan": 1,
        "swiglu": 1,
    },
    "nemotron_h": {"rms_norm_float32": 6, "activation": 3, "route_scores": 1, "scan": 1, "swiglu": 1},
    "zamba2": {
        "rms_norm": 7,
        "add_rms_norm": 2,
        "rms_norm_float32": 4,
        "gated_halves": 2,
        "scan": 4,
        "swiglu": 4,
    },
}
"""Tiny models of two layers (Gemma 3: six, Zamba2: four) in bfloat16, whose vocabularies are too small for the fused
head."""


@pytest.mark.parametrize("name", CALLS)
def test_models_get_their_kernels(name: str) -> None:
    model, batch = build(TASKS[name], name)
    half = {k: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in batch.items()}
    mesh = autopart.Mesh.parse("8:h100-80gb")
    graph = prepare(model.bfloat16(), outline(half, 2), mesh, torch.bfloat16).traced.graph
    names = Counter(info(node).name.partition(".")[2] for node in calls(graph) if kernel_of(info(node).name))
    assert dict(names) == CALLS[name]


@pytest.mark.parametrize(("name", "least"), [("gpt2", 0.4), ("llama", 0.3)])
def test_the_bytes_of_a_layer_fall(name: str, least: float) -> None:
    plain, fused = row(TASKS[name], name)["bytes"]
    assert fused <= (1 - least) * plain
