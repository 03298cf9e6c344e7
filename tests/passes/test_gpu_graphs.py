"""Graphs for GPUs, run on a CPU by the references of their kernels: as exact as graphs for CPUs."""

from __future__ import annotations

import os
import re
from collections.abc import Collection

import pytest
import torch
import transformers
from emitted import sources
from torch import nn

import autopart
from autopart.ir.graph import Traced
from autopart.passes import source as passes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("traced_once")]

SIZES = {"vocab_size": 96, "bos_token_id": 0, "eos_token_id": 0}
GPT2 = {**SIZES, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "attn_pdrop": 0.3, "resid_pdrop": 0.2}
BERT = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 16, "attention_probs_dropout_prob": 0.3, "hidden_dropout_prob": 0.0,
}  # fmt: skip
T5 = {
    "vocab_size": 96, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 1, "dropout_rate": 0.2,
    "decoder_start_token_id": 0,
}  # fmt: skip
MIXTRAL = {
    **SIZES, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 16,
}  # fmt: skip
DEEPSEEK = {
    **SIZES, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4,
    "topk_group": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "first_k_dense_replace": 1, "max_position_embeddings": 16, "rope_scaling": None,
}  # fmt: skip
DEEPSEEK_V2 = {k: v for k, v in DEEPSEEK.items() if k != "rope_scaling"} | {"topk_method": "group_limited_greedy"}
ERNIE = {
    **SIZES, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0,
    "max_position_embeddings": 16,
}  # fmt: skip
GRANITE = {
    **SIZES, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 16,
}  # fmt: skip
GPT_OSS = {
    **SIZES, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
    "max_position_embeddings": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
LLAMA = {
    **SIZES, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16, "head_dim": 8, "sliding_window": 5, "pad_token_id": 0,
}  # fmt: skip
BLOOM = {**SIZES, "hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.2, "attention_dropout": 0.3}
MPT = {**SIZES, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 16}
FALCON = {
    **SIZES, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True, "multi_query": False,
}  # fmt: skip
LLAMA4 = {
    **SIZES, "hidden_size": 32, "intermediate_size": 16, "intermediate_size_mlp": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4,
    "num_experts_per_tok": 2, "attention_chunk_size": 16, "max_position_embeddings": 16,
}  # fmt: skip
VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 8,
    "patch_size": 4, "num_labels": 6, "hidden_dropout_prob": 0.2,
}  # fmt: skip
MAMBA2 = {
    **SIZES, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 16,
    "chunk_size": 8, "pad_token_id": 0,
}  # fmt: skip
PATCHES = {"image_size": 8, "patch_size": 4, "num_labels": 6, "drop_path_rate": 0.5}
CONVNEXT = {**PATCHES, "hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "layer_scale_init_value": 0.5}
BEIT = {
    **PATCHES, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
SWIN = {**PATCHES, "patch_size": 2, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 2}
IMAGES = ("vit", "convnext", "beit", "swin")
MODELS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**MIXTRAL)),
    "deepseek": lambda: transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**DEEPSEEK)),
    "deepseek_v2": lambda: transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(**DEEPSEEK_V2)),
    "ernie": lambda: transformers.Ernie4_5_MoeForCausalLM(transformers.Ernie4_5_MoeConfig(**ERNIE)),
    "granite": lambda: transformers.GraniteMoeForCausalLM(transformers.GraniteMoeConfig(**GRANITE)),
    "gpt_oss": lambda: transformers.GptOssForCausalLM(transformers.GptOssConfig(**GPT_OSS)),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "gpt_oss, padded": lambda: transformers.GptOssForCausalLM(transformers.GptOssConfig(**GPT_OSS)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA)),
    "mistral, padded": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**LLAMA)),
    "gemma2, padded": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**LLAMA)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**LLAMA)),
    "bloom, padded": lambda: transformers.BloomForCausalLM(transformers.BloomConfig(**BLOOM)),
    "mpt": lambda: transformers.MptForCausalLM(transformers.MptConfig(**MPT)),
    "falcon": lambda: transformers.FalconForCausalLM(transformers.FalconConfig(**FALCON)),
    "falcon of one head of keys, padded": lambda: transformers.FalconForCausalLM(
        transformers.FalconConfig(**FALCON | {"multi_query": True, "alibi": False})
    ),
    "llama4": lambda: transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**LLAMA4)),
    "t5, padded": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VIT)),
    "convnext": lambda: transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**CONVNEXT)),
    "beit": lambda: transformers.BeitForImageClassification(transformers.BeitConfig(**BEIT)),
    "swin": lambda: transformers.SwinForImageClassification(transformers.SwinConfig(**SWIN)),
    "mamba2": lambda: mamba2(1),
    "mamba2 of four groups": lambda: mamba2(4),
}
CALLS = {
    "gpt2": {"dropout_attention", "bias_activation", "add_layer_norm", "residual_dropout"},
    "bert": {"dropout_attention", "bias_activation", "add_layer_norm"},
    "mixtral": {"experts", "route", "rotary", "add_rms_norm"},
    "deepseek": {"experts", "route_scores", "rotary_deinterleaved"},
    "granite": {"experts", "route_topk", "rotary"},
    "deepseek_v2": {"experts", "route_scores"},
    "ernie": {"experts", "route_scores"},
    "gpt_oss": {"route_topk", "rotary", "attention"},
    "gpt_oss, padded": {"attention"},
    **{name: {"attention"} for name in ("mistral", "mistral, padded", "gemma2", "gemma2, padded", "gemma3", "mpt")},
    **{name: {"dropout_attention"} for name in ("bloom, padded", "t5, padded")},
    "falcon": {"attention"},
    "falcon of one head of keys, padded": {"attention", "rotary"},
    "llama4": {"route_dense", "rms_norm", "swiglu", "gated_halves"},
    "t5": {"dropout_attention", "add_rms_norm", "rms_norm", "residual_dropout"},
    "vit": {"bias_activation", "add_layer_norm", "residual_dropout"},
    **{name: {"stochastic_depth"} for name in ("convnext", "beit", "swin")},
    "mamba2": {"scan", "rms_norm_float32", "swiglu"},
    "mamba2 of four groups": {"scan", "rms_norm_float32", "swiglu"},
}
PLANS = [{}, {"tp": 2, "pp": 2}, {"dp": 2, "tp": 2, "zero": 3, "recompute": "full"}, {"tp": 4, "micro_batch": 2}]
CASES = [
    (name, plan)
    for number, name in enumerate(MODELS)
    for plan in (PLANS if "AUTOPART_EXAMPLES" in os.environ else (PLANS[0], PLANS[1 + number % 3]))
]


def mamba2(groups: int) -> torch.nn.Module:
    """A Mamba-2 whose heads share so many groups of keys and queries. Its sequences fill no whole number of chunks."""
    return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**MAMBA2, n_groups=groups))


class Paths(nn.Module):
    """Blocks whose residual branch is dropped for whole samples, as timm writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x) * x.new_empty(x.shape[0], 1, 1).bernoulli_(0.6).div_(0.6)
        return x.square().mean()


class Sparse(nn.Module):
    """A block of explicit sparse attention, written by hand: every query sees its four greatest scores."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (each(x).unflatten(-1, (4, 8)).transpose(1, 2) for each in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) * 8**-0.5
        least = scores.topk(4, dim=-1).values[..., -1:]
        out = scores.masked_fill(scores < least, float("-inf")).softmax(-1) @ v
        return self.o(out.transpose(1, 2).flatten(2)).square().mean()


RANDOMNESS, FUSE = passes.randomness, passes.fuse


def randomness(traced: Traced, device: str, off: Collection[str] = ()) -> Traced:
    return RANDOMNESS(traced, "cuda", off)


def fuse(traced: Traced, device: str, off: Collection[str] = ()) -> Traced:
    return FUSE(traced, "cuda", off)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes that differ by device take the one that they have for GPUs; a CPU still runs the program."""
    monkeypatch.setattr(passes, "randomness", randomness)
    monkeypatch.setattr(passes, "fuse", fuse)


def batch_of(name: str) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    if name in IMAGES:
        return {"pixel_values": torch.randn(4, 3, 8, 8, generator=random), "labels": torch.arange(4)}
    ids = torch.randint(3, 96, (4, 12), generator=random)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if name == "bert" or "padded" in name:  # on the left too, where queries see no key
        places, first, last = torch.arange(12), torch.tensor([0, 0, 4, 11]), torch.tensor([12, 7, 12, 12])
        batch["attention_mask"] = ((places < last[:, None]) & (places >= first[:, None])).long()
    return batch


@pytest.mark.parametrize(("name", "plan"), CASES, ids=str)
def test_graphs_for_gpus_are_exact(name: str, plan: dict[str, object], as_on_a_gpu: None) -> None:
    torch.manual_seed(0)
    model, batch = MODELS[name]().train(), batch_of(name)
    found = autopart.check(model, "4:cpu", batch, **plan)
    assert found.loss_error < 1e-5 and found.gradient_error < 1e-5, found
    text = "".join(sources(model, batch, found.plan))
    assert CALLS[name] <= set(re.findall(r"(\w+)\(", text)) and "softmax" not in text


@pytest.mark.parametrize("plan", [{"tp": 2}, {"dp": 2}])
def test_sparse_attention_by_hand_is_exact(plan: dict[str, object], as_on_a_gpu: None) -> None:
    torch.manual_seed(0)
    model, batch = Sparse(), {"x": torch.randn(4, 12, 32)}
    found = autopart.check(model, "2:cpu", batch, **plan)
    assert found.loss_error < 1e-5 and found.gradient_error < 1e-5, found
    text = "".join(sources(model, batch, found.plan))
    assert "topk_softmax(" in text and "masked_fill" not in text


def test_dropped_paths_are_exact_and_those_of_graphs_for_cpus(as_on_a_gpu: None) -> None:
    """Samples are dropped by their places in the whole batch, by the operator as by the operators that it replaces."""
    torch.manual_seed(0)
    model, batch = Paths(), {"x": torch.randn(4, 12, 32)}
    found = autopart.check(model, "4:cpu", batch, dp=2, tp=2, micro_batch=2)
    assert found.loss_error < 1e-5 and found.gradient_error < 1e-5, found
    assert "stochastic_depth(" in "".join(sources(model, batch, found.plan))
    fused, plain = (
        autopart.simulate(model, "2:cpu", batch, seed=7, tp=2, no_fuse=off) for off in ((), ("stochastic_depth",))
    )
    torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-6, atol=0)


def test_experts_with_biases_are_split(as_on_a_gpu: None) -> None:
    """Each of two ranks has half of the experts, or half of each."""
    torch.manual_seed(0)
    model, batch = MODELS["gpt_oss"]().train(), batch_of("gpt_oss")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    for letter, group in (("e", "self.tp, None"), ("f", "None, self.tp")):
        force = [f"strategy model.layers.*.experts/autopart.clamped_experts {letter} over tp"]
        found = autopart.check(model, "2:cpu", batch, tp=2, constraints=force)
        assert found.loss_error < 1e-5 and found.gradient_error < 1e-5, found
        text = "".join(sources(model, batch, found.plan))
        assert group in " ".join(text.split())


def test_experts_are_split_and_their_load_is_balanced(as_on_a_gpu: None) -> None:
    """Each of two ranks has half of the experts, or half of each; the loss reads the load of all."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**MIXTRAL, output_router_logits=True, router_aux_loss_coef=0.5)
    model, batch = transformers.MixtralForCausalLM(config), batch_of("mixtral")
    batch["attention_mask"] = (torch.arange(12) < torch.tensor([12, 7, 9, 12])[:, None]).long()
    for letter, function in (("e", "own_experts"), ("f", "experts")):
        force = [f"strategy model.layers.*.experts/autopart.experts {letter} over tp"]
        found = autopart.check(model, "2:cpu", batch, tp=2, constraints=force)
        assert found.loss_error < 1e-5 and found.gradient_error < 1e-5, found
        text = "".join(sources(model, batch, found.plan))
        assert {function, "expert_load"} <= set(re.findall(r"(\w+)\(", text))


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "convnext", "beit", "swin"])
def test_masks_are_those_of_graphs_for_cpus(name: str, as_on_a_gpu: None) -> None:
    """The loss of one step depends on every mask that is drawn."""
    torch.manual_seed(0)
    model, batch = MODELS[name]().train(), batch_of(name)
    fused = autopart.simulate(model, "2:cpu", batch, seed=7, tp=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "randomness", RANDOMNESS)
        patch.setattr(passes, "fuse", FUSE)
        plain = autopart.simulate(model, "2:cpu", batch, seed=7, tp=2)
    torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("groups", "letter"), [(1, "h"), (4, "g")])
def test_a_split_scan_is_exact(groups: int, letter: str, as_on_a_gpu: None) -> None:
    torch.manual_seed(0)
    model, batch = mamba2(groups).train(), batch_of("mamba2")
    force = [f"strategy backbone.layers.*.mixer/autopart.scan {letter} over tp"]
    found = autopart.check(model, "2:cpu", batch, tp=2, constraints=force)
    assert found.loss_error < 1e-5 and found.gradient_error < 1e-5, found
    assert "= scan(  # dim 2 split over tp" in "".join(sources(model, batch, found.plan))
