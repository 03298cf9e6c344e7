"""Random models of every architecture in four of the auto-class mappings of ``transformers``, with batches.

``build`` makes a tiny model and a batch with labels for one architecture, ``drawn`` one of sizes drawn at random, and
``published`` one of the sizes that its configuration has by default, on meta. The tables say what a tiny architecture
needs beside the common sizes. Models of text with images or sound get text alone where they take that, so their other
towers get no gradient. Nothing is downloaded.
"""

import copy
import dataclasses
import inspect
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError
from transformers.models.auto import modeling_auto

from autopart.cli.models import fill_buffers

TASKS: dict[str, str] = {
    "clm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "mlm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "s2s": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "img": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}

VOCABULARY = 128
SEQUENCE = 16
IMAGE = 32
IGNORED = -100
FIRST_TOKEN, LAST_TOKEN = 3, 100
"""Random tokens lie in this half-open range: above the padding, start and end tokens, below the image tokens."""

_NAMES_BY_SIZE: tuple[tuple[int, str], ...] = (
    (64, "hidden_size d_model n_embd dim emb_dim embed_dim hidden_dim encoder_hidden_size lru_width rnn_hidden_size"),
    (64, "embedding_size d_embed encoder_embed_dim decoder_embed_dim attention_hidden_size model_dim mlp_dim"),
    (2, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers"),
    (2, "num_encoder_layers depth encoder_num_hidden_layers num_blocks"),
    (4, "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"),
    (4, "num_encoder_attention_heads num_decoder_attention_heads attention_heads encoder_num_attention_heads"),
    (4, "linear_num_heads swa_num_attention_heads"),
    (2, "num_key_value_heads num_kv_heads n_head_kv num_key_value_heads_global swa_num_key_value_heads"),
    (VOCABULARY, "vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size text_vocab_size org_vocab_size"),
    (VOCABULARY, "vocab_size_per_layer_input unpadded_vocab_size entity_vocab_size"),
    (128, "intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size inner_dim n_inner dff"),
    (128, "intermediate_size_mlp d_inner shared_expert_intermediate_size shared_intermediate_size num_ff dim_ff"),
    (128, "moe_shared_expert_intermediate_size mamba_intermediate dense_intermediate_size"),
    (32, "moe_intermediate_size expert_ffn_hidden_size expert_ffn_dim expert_intermediate_size output_channels"),
    (32, "shared_experts_intermediate_size rel_extent entity_emb_size downsample_hidden_size nemo_conv_channels"),
    (32, "ext_pw_out_channel depthwise_separable_out_channel router_hidden_size adapter_rank conv_dim"),
    (16, "head_dim d_kv attention_head_dim qk_head_dim kv_channels global_head_dim attention_head_size v_head_dim"),
    (16, "qk_nope_head_dim q_lora_rank kv_lora_rank linear_key_head_dim linear_value_head_dim d_head dim_head"),
    (16, "index_head_dim o_lora_rank linear_head_dim swa_head_dim hidden_size_per_layer_input"),
    (8, "qk_rope_head_dim rotary_dim laurel_rank"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_experts_per_tok moe_topk moe_k num_experts_per_token top_k_experts index_n_heads linear_num_key_heads"),
    (2, "linear_num_value_heads num_memory_blocks num_mem_blocks"),
    (1, "n_group topk_group n_shared_experts first_k_dense_replace num_dense_layers num_shared_experts"),
    (1, "num_nextn_predict_layers num_expert_group"),
    (64, "max_position_embeddings n_positions n_ctx max_source_positions max_target_positions max_seq_len"),
    (64, "max_seq_length seq_length block_length max_encoder_position_embeddings max_decoder_position_embeddings"),
    (IMAGE, "image_size img_size"),
    (8, "patch_size"),
    (8, "sliding_window sliding_window_size attention_window_size window_size_left attention_chunk_size"),
    (8, "local_attention_window chunk_size mamba_chunk_size chunk_length index_topk"),
    (16, "mamba_d_state state_size ssm_state_size"),
)
SIZES: dict[str, int] = {name: size for size, names in _NAMES_BY_SIZE for name in names.split()}


def _alike(*firsts: str) -> frozenset[str]:
    """The names of the rows of _NAMES_BY_SIZE that begin with one of these names."""
    rows = (names.split() for _, names in _NAMES_BY_SIZE)
    return frozenset(name for names in rows if names[0] in firsts for name in names)


WIDTHS = _alike(
    *("hidden_size", "embedding_size", "intermediate_size", "intermediate_size_mlp"),
    "moe_shared_expert_intermediate_size",
)
"""Widths of the residual stream and of what lies inside an MLP."""
HEADS = _alike("num_attention_heads", "num_encoder_attention_heads")
HEAD_WIDTHS = _alike("head_dim")
LAYER_COUNTS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers"}
ATTENTION_KINDS = ("full_attention", "sliding_attention")
LAYER_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")
KEEP_IF_SMALLER = {"n_group", "topk_group", "patch_size", "n_shared_experts", "first_k_dense_replace"}
PLACEHOLDER_TOKEN = re.compile(r"(image|video|audio|vision|boi|eoi|boa|eoa).*_token_(id|index)$|^image_token$")
RANDOMNESS = re.compile(r"drop|jitter|mask_time_prob|mask_feature_prob")

LATENT_ATTENTION = {"qk_head_dim": 24, "head_dim": 8, "num_key_value_heads": 4}
"""Multi-head latent attention: heads of 16 + 8 rotary columns, every head with its own key."""
STAGES = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
"""A small convolutional pyramid."""
PYRAMID_HEADS = {"num_attention_heads": [1, 2, 4, 4], "mlp_ratios": [2, 2, 2, 2]}
SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "patch_size": 2, "window_size": 4}

SETTINGS: dict[str, dict[str, Any]] = {
    "axk1": LATENT_ATTENTION,
    "axk2": LATENT_ATTENTION,
    "bailing_hybrid": LATENT_ATTENTION,
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "bit": {**STAGES, "embedding_size": 16, "num_groups": 4},
    "blt": {
        "encoder_hash_byte_group_vocab": 100,
        "patch_in_forward": True,
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ATTENTION_KINDS},
    },
    "convnext": {**STAGES, "layer_scale_init_value": 0.1},
    "convnextv2": STAGES,
    "cpmant": {
        "init_std": 0.1,
        "prompt_length": 4,
        "prompt_types": 4,
        "segment_types": 4,
        "position_bias_num_buckets": 32,
    },
    "cvt": {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {**LATENT_ATTENTION, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v3": LATENT_ATTENTION,
    "deepseek_v32": LATENT_ATTENTION,
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "donut-swin": SWIN,
    "dots1": {"num_key_value_heads": 2, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "dots3_note_text": {
        **LATENT_ATTENTION,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "dots3_note_vision_encoder": {
        "adapter_in_dim": 64,
        "adapter_out_dim": 64,
        "mlp_layer_types": ["dense", "sparse"],
        "num_hidden_layers": 2,
        "per_layer_config": {1: {"num_local_experts": 4, "num_experts_per_tok": 2}},
    },
    "efficientnet": {
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
        "in_channels": [32, 16, 24],
        "out_channels": [16, 24, 32],
        "kernel_sizes": [3, 3, 5],
        "strides": [1, 2, 2],
        "num_block_repeats": [1, 1, 2],
        "expand_ratios": [1, 2, 2],
        "hidden_dim": 1280,
    },
    "encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 32},
    "esmc": {"head_dim": None, "num_key_value_heads": None},
    "flint": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "focalnet": {"embed_dim": 16, "depths": [1, 1, 1, 1]},
    "funnel": {"block_sizes": [1, 1], "initializer_std": 0.1},
    "gemma3n_text": {"num_hidden_layers": 6, "num_kv_shared_layers": 1, "intermediate_size": 128},
    "gemma4_text": {
        "global_head_dim": 32,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "gemma4_unified_text": {"global_head_dim": 32},
    "glm4_moe_lite": LATENT_ATTENTION,
    "glm_moe_dsa": LATENT_ATTENTION,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hgnet_v2": {
        **STAGES,
        "embedding_size": 16,
        "stem_channels": [3, 8, 16],
        "stage_in_channels": [16, 16, 32, 48],
        "stage_mid_channels": [8, 8, 16, 16],
        "stage_out_channels": [16, 32, 48, 64],
        "stage_num_blocks": [1, 1, 2, 1],
        "stage_numb_of_layers": [2, 2, 2, 2],
    },
    "hiera": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 4], "image_size": [64, 64]},
    "hunyuan_v1_dense": {"num_key_value_heads": 2, "head_dim": 16},
    "hunyuan_v1_moe": {"num_key_value_heads": 2, "head_dim": 16},
    "kimi_linear": LATENT_ATTENTION,
    "layoutlm": {"max_2d_position_embeddings": 64},
    "led": {"attention_window": [8, 8]},
    "levit": {
        "image_size": 128,
        "patch_size": 16,
        "hidden_sizes": [32, 48, 64],
        "num_attention_heads": [2, 4, 4],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {**LATENT_ATTENTION, "zero_expert_num": 2},
    "longformer": {"attention_window": [8, 8]},
    "mamba": {"expand": 2},
    "mamba2": {"num_heads": 8, "expand": 2, "n_groups": 2, "time_step_rank": 16},
    "minicpm3": {**LATENT_ATTENTION, "dim_model_base": 64},
    "ministral": {"head_dim": 16},
    "mobilebert": {"intra_bottleneck_size": 32, "true_hidden_size": 32, "embedding_size": 32},
    "mobilenet_v1": {"depth_multiplier": 0.25, "image_size": 64},
    "mobilenet_v2": {"depth_multiplier": 0.25, "image_size": 64},
    "mobilevit": {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64], "image_size": 128},
    "mobilevitv2": {
        "width_multiplier": 0.25,
        "base_attn_unit_dims": [64, 96, 128],
        "n_attn_blocks": [1, 1, 1],
        "image_size": 128,
    },
    "mt5": {"initializer_factor": 0.1},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "nemotron3_diarization": {
        "chunk_length": 8,
        "chunk_right_context": 2,
        "chunk_left_context": 2,
        "fifo_length": 4,
        "speaker_cache_update_period": 8,
        "head_config": {"audio_hidden_size": 64},
    },
    "nemotron3_5_transcribe_word_timestamp": {"blank_token_id": VOCABULARY - 1},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "perceiver": {
        "d_latents": 64,
        "num_latents": 8,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
        "max_position_embeddings": SEQUENCE,
    },
    "poolformer": {**STAGES, "layer_scale_init_value": 0.1},
    "pp_lcnet": {"scale": 0.25, "class_expand": 64},
    "pvt": {**STAGES, **PYRAMID_HEADS, "image_size": 64},
    "pvt_v2": {**STAGES, **PYRAMID_HEADS, "image_size": [64, 64]},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 8,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
    },
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 2,
        "hash_seed": 0,
        "feed_forward_size": 128,
        "axial_pos_shape": [4, SEQUENCE // 4],
        "axial_pos_embds_dim": [32, 32],
    },
    "regnet": {**STAGES, "embedding_size": 16, "groups_width": 8},
    "resnet": {**STAGES, "embedding_size": 16},
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": VOCABULARY,
        "shape_embed_dim": 8,
        "shape_vocab_size": VOCABULARY,
    },
    "sarvam_mla": LATENT_ATTENTION,
    "segformer": {**STAGES, **PYRAMID_HEADS, "decoder_hidden_size": 64},
    "shieldgemma2": {"yes_token_index": 10, "no_token_index": 11},
    "solar_open": {"num_key_value_heads": 2},
    "swiftformer": {"embed_dims": [16, 32, 48, 64], "depths": [1, 1, 1, 2], "layer_scale_init_value": 0.1},
    "swin": SWIN,
    "swinv2": {**SWIN, "pretrained_window_sizes": [0, 0]},
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "textnet": {"hidden_sizes": [16, 16, 32, 48, 64], "stem_out_channels": 16, "image_size": [64, 64]},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2, "depths": [1, 1, 1, 1, 1, 1, 1]},
    "xmod": {"default_language": "en_XX"},
    "youtu": LATENT_ATTENTION,
    "zamba": {
        "num_hidden_layers": 5,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_dt_rank": 16,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_mem_blocks": 1,
        "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What an architecture, or the part of one, needs beside SIZES; None keeps the architecture's own default."""
TASK_SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("img", "perceiver"): {"max_position_embeddings": 64},
}
"""The same for one task of an architecture only."""

NO_LAYERDROP = {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}, "layerdrop 0: which blocks run is drawn in Python"
EACH_HEAD = {"head_dim": 128}, "head_dim: None by default; hidden_size / num_attention_heads"
PUBLISHED_SETTINGS: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "cohere_compass_text": (
        {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ATTENTION_KINDS}},
        "rope_parameters: none for its kinds of layers by default",
    ),
    "dbrx": (
        {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
        "attn_config.rope_theta, clip_qkv: missing by default, and no trace without; its authors' 8",
    ),
    "deepseek_v2": ({"num_experts_per_tok": 6}, "num_experts_per_tok: None by default; its authors' 6"),
    "dots1": (
        {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
        "n_routed_experts, n_shared_experts, num_experts_per_tok: None by default; its authors' 128, 2, 6",
    ),
    "encoder-decoder": (
        {"pad_token_id": 0, "decoder": {"model_type": "bert", "is_decoder": True, "add_cross_attention": True}},
        "pad_token_id: None by default; a decoder that reads the encoder",
    ),
    "esm": (
        {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
        "vocab_size, pad_token_id, mask_token_id: None by default; its authors' 33, 1, 32",
    ),
    "hunyuan_v1_dense": EACH_HEAD,
    "hunyuan_v1_moe": EACH_HEAD,
    "lfm2_moe": (
        {"layer_types": [("full_attention" if i % 4 == 2 else "conv") for i in range(32)]},
        "layer_types: None by default; attention in one of four layers",
    ),
    "m2m_100": NO_LAYERDROP,
    "ministral": EACH_HEAD,
    "nemotron": ({"num_key_value_heads": 48}, "num_key_value_heads: None by default; num_attention_heads"),
    "nllb-moe": NO_LAYERDROP,
    "seamless_m4t": NO_LAYERDROP,
    "seamless_m4t_v2": NO_LAYERDROP,
    "xmod": ({"default_language": "en_XX"}, "default_language: None by default"),
}
"""What a default configuration lacks for training, or has that no trace can follow: settings, and why."""
PUBLISHED_TOKENS = {"prophetnet": 510, "reformer": 4096}
"""Tokens of a sample where a default configuration takes fewer than its positions, or no other number."""
FLOAT32 = {
    "fnet": "torch has no Fourier transform of bfloat16",
    "mra": "its own forward multiplies float32 with bfloat16",
    "xlstm": "its own forward multiplies float32 with bfloat16",
}
"""Architectures whose forward raises in bfloat16 in one process too, and why."""

CONFIG_NAMES = {"musicgen": "musicgen_decoder", "musicgen_melody": "musicgen_melody_decoder"}
"""Architectures whose configuration goes by another name."""
ENCODERS_AS_DECODERS = set(
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
    "reformer roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod".split()
)
"""Encoders that are causal only where the configuration says so."""
PIXELS = dict.fromkeys(
    "bit convnext convnextv2 cvt efficientnet focalnet hgnet_v2 poolformer pp_lcnet regnet resnet segformer "
    "swiftformer".split(),
    64,
)
"""Height and width of the image where the configuration does not tell, or tells too little for every stage."""
UNBUILDABLE: dict[tuple[str, str], str] = {
    ("clm", "gemma3n"): "needs timm and Pillow for its vision tower",
    ("clm", "gemma4_assistant"): "drafts for another model, from whose keys and values it starts, and has no loss",
    ("clm", "gemma4_unified_assistant"): "drafts for another model, from whose keys and values it starts, no loss",
    ("img", "dinat"): "needs natten for its attention",
    ("img", "timm_wrapper"): "needs timm and Pillow, whose models it wraps",
}
"""Architectures known not to build, and why."""
WITHOUT_LOSS = {"pp_lcnet": "last_hidden_state", "shieldgemma2": "logits"}
"""Image classifiers that compute no loss, and the output that holds their scores of the classes."""
WITH_MASK = {"longt5", "switch_transformers"}
"""Architectures that cannot be traced without an attention mask."""
WITH_DECODER_INPUTS = {"fsmt", "prophetnet"}
"""Encoder-decoders that cannot be traced where they make the inputs of the decoder themselves."""


@dataclass(frozen=True)
class Size:
    """How large a model and its batch are.

    samples, sequence   samples of the batch, tokens of a sample;  image: height and width of an image
    widths              times the widths of SIZES;  heads: times as many heads, where the heads are not wider instead
    layers              layers besides those that a tiny model has
    """

    samples: int = 4
    sequence: int = SEQUENCE
    image: int = IMAGE
    widths: int = 1
    heads: int = 1
    layers: int = 0

    def of(self, name: str) -> int:
        """What a field of a configuration is set to."""
        if name in ("image_size", "img_size"):
            return self.image
        if name in WIDTHS:
            return SIZES[name] * self.widths
        if name in HEADS:
            return SIZES[name] * self.heads
        if name in HEAD_WIDTHS:
            return SIZES[name] * (self.widths // self.heads)
        return SIZES[name]


TINY = Size()


class Unbuildable(Exception):
    """An architecture has no tiny model here; the message is one line that says why."""


class WithLoss(nn.Module):
    """A classifier that computes no loss of its own, with the cross entropy of its scores."""

    def __init__(self, model: nn.Module, scores: str) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.scores = scores

    def forward(self, labels: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and the scores of the classes."""
        scores = getattr(self.model(**inputs), self.scores)
        return nn.functional.cross_entropy(scores, labels), scores


def architectures() -> list[tuple[str, str]]:
    """All (task, model type), in the order of the mappings."""
    return [(task, model_type) for task, mapping in TASKS.items() for model_type in getattr(modeling_auto, mapping)]


def build(task: str, model_type: str, size: Size = TINY, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """A model in training mode without randomness, and the keyword arguments of a training step.

    Every tensor of the batch has ``size.samples`` in dimension 0. Raises ``Unbuildable``.
    """
    if reason := UNBUILDABLE.get((task, model_type)):
        raise Unbuildable(reason)
    model_class = _model_class(task, model_type)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = model_class(_accepted(model_class, configuration(task, model_type, size)))
            _no_randomness(model)
            _no_zeros(model)
        inputs = batch(task, model_type, model, size, seed)
    except Exception as error:
        cause = error.__cause__ or error
        line = " ".join(str(cause).split())
        raise Unbuildable(f"{type(cause).__name__}: {line}"[:200]) from error
    if model_type in WITHOUT_LOSS:
        model = WithLoss(model, WITHOUT_LOSS[model_type])
    return model.train(), inputs


def drawn(task: str, model_type: str, seed: int) -> tuple[nn.Module, dict[str, Any], Size]:
    """``build`` at a size drawn at random: widths, heads, layers, samples and tokens as far as the architecture runs
    with them, else without other widths, else with another batch alone. Raises ``Unbuildable``."""
    draw = random.Random(f"{task}:{model_type}:{seed}")
    widths = draw.choice((2, 3))
    most = Size(
        samples=draw.choice((2, 6, 8)),
        sequence=draw.choice((8, 12, 20, 24)),
        image=draw.choice((48, 64)),
        widths=widths,
        heads=draw.choice((1, widths)),
        layers=draw.choice((1, 2, 3)),
    )
    batch_alone = Size(most.samples, most.sequence)
    for size in (
        most,
        dataclasses.replace(most, image=IMAGE),
        dataclasses.replace(most, widths=1, heads=1),
        dataclasses.replace(batch_alone, layers=most.layers),
        dataclasses.replace(most, layers=0),
        batch_alone,
        Size(most.samples),
    ):
        try:
            model, inputs = build(task, model_type, size, seed)
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                copy.deepcopy(model)(**inputs)
            return model, inputs, size
        except Exception as error:  # whatever a size that does not fit may raise
            last = error
    raise Unbuildable(" ".join(f"{type(last).__name__}: {last}".split())[:200])


def published(
    task: str,
    model_type: str,
    samples: int,
    longest: int,
    settings: Mapping[str, Any] = MappingProxyType({}),
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, dict[str, Any]]:
    """A model on meta of the sizes that its configuration has by default, but for ``PUBLISHED_SETTINGS`` and
    ``settings``, made in ``dtype`` as transformers makes it, and a batch whose samples have as many tokens as it takes,
    at most ``longest``. Raises ``Unbuildable``."""
    if reason := UNBUILDABLE.get((task, model_type)):
        raise Unbuildable(reason)
    model_class = _model_class(task, model_type)
    try:
        own, _ = PUBLISHED_SETTINGS.get(model_type, ({}, ""))
        config_class = _config_class(model_type)
        config = _accepted(model_class, _for_training(task, model_type, config_class(**{**own, **settings})))
        text: Any = config.get_text_config()
        positions = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
        known = [number for number in positions if isinstance(number, int) and number > 2]
        tokens = PUBLISHED_TOKENS.get(model_type) or min([longest, *(number - number % 2 for number in known)])
        with torch.device("meta"):
            model: nn.Module = model_class._from_config(config, dtype=dtype)
        fill_buffers(model)
        inputs = batch(task, model_type, model, Size(samples, tokens), seed=0)
    except Exception as error:
        cause = error.__cause__ or error
        raise Unbuildable(" ".join(f"{type(cause).__name__}: {cause}".split())[:200]) from error
    if model_type in WITHOUT_LOSS:
        model = WithLoss(model, WITHOUT_LOSS[model_type])
    return model.train(), inputs


def with_batched_experts(model: nn.Module) -> bool:
    """Have the experts of a built model computed by batched matrix products; whether this changed anything."""
    changed = False
    for module in model.modules():
        if not hasattr(module, "_is_expert_parallel"):  # set by the decorator that makes the experts switchable
            continue
        config: Any = module.config
        if config._experts_implementation != "batched_mm":
            config._experts_implementation = "batched_mm"
            changed = True
    return changed


def configuration(task: str, model_type: str, size: Size = TINY) -> PreTrainedConfig:
    """The configuration of a tiny model."""
    config_class = _config_class(model_type)
    settings = _settings(config_class(), size)
    _merge(settings, TASK_SETTINGS.get((task, model_type), {}))
    config = _for_training(task, model_type, config_class(**copy.deepcopy(settings)))
    for part in _parts(config):
        _zero_randomness(part)
    return config


def _config_class(model_type: str) -> type[PreTrainedConfig]:
    return CONFIG_MAPPING[CONFIG_NAMES.get(model_type, model_type)]


def _for_training(task: str, model_type: str, config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration, without caches of keys and values, for the head that a task trains."""
    for part in _parts(config):
        if hasattr(part, "use_cache"):
            part.use_cache = False
    if task == "s2s" and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 1
    if task == "clm" and model_type in ENCODERS_AS_DECODERS:
        config.is_decoder = True
    return config


def batch(task: str, model_type: str, model: nn.Module, size: Size, seed: int) -> dict[str, Any]:
    """The keyword arguments of a training step of a model."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    accepted = inspect.signature(model.forward).parameters
    if task == "img":
        inputs = _images(model_type, config, accepted, size, generator)
    else:
        tokens = _tokens((size.samples, size.sequence), generator)
        wanted = tokens if task == "clm" else _tokens((size.samples, size.sequence), generator)
        inputs = {"input_ids" if "input_ids" in accepted else "inputs": tokens, "labels": _labels(wanted, generator)}
    inputs.update(_additional_inputs(model_type, config, size, generator))
    if model_type in WITH_MASK:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if task == "s2s" and model_type in WITH_DECODER_INPUTS:
        inputs["decoder_input_ids"] = _tokens((size.samples, size.sequence), generator)
        inputs["decoder_attention_mask"] = torch.ones(size.samples, size.sequence, dtype=torch.long)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def _additional_inputs(
    model_type: str, config: PreTrainedConfig, size: Size, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """What an architecture takes beside tokens or images and labels, or instead of them."""
    samples, sequence = size.samples, size.sequence
    if model_type.startswith("musicgen"):
        books = config.num_codebooks
        tokens = _tokens((samples, books, sequence), generator)
        return {"input_ids": tokens, "labels": _labels(tokens.transpose(1, 2), generator)}
    if model_type == "git":
        side = config.vision_config.image_size
        return {"pixel_values": torch.rand((samples, 3, side, side), generator=generator)}
    if model_type == "siglip2":
        side = 4
        patch = 3 * config.vision_config.patch_size**2
        return {
            "pixel_values": torch.rand((samples, side * side, patch), generator=generator),
            "pixel_attention_mask": torch.ones(samples, side * side, dtype=torch.long),
            "spatial_shapes": torch.full((samples, 2), side),
        }
    if model_type == "voxtral_realtime":
        shape = (samples, config.audio_config.num_mel_bins, sequence * config.audio_length_per_tok)
        return {"input_features": torch.rand(shape, generator=generator)}
    if model_type == "roc_bert":
        names = "input_shape_ids", "input_pronunciation_ids"
        return {name: _tokens((samples, sequence), generator) for name in names}
    if model_type == "luke":
        entities = _tokens((samples, 4), generator)
        return {
            "entity_ids": entities,
            "entity_position_ids": torch.randint(0, sequence, (samples, 4, 2), generator=generator),
            "entity_labels": _labels(entities, generator),
        }
    return {}


def _tokens(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Random tokens that stand for nothing special."""
    return torch.randint(FIRST_TOKEN, LAST_TOKEN, shape, generator=generator)


def _labels(tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The tokens, with sample i ignoring 1 + i % 4 of the positions, so that samples weigh differently in the loss."""
    labels = tokens.clone(memory_format=torch.contiguous_format)
    for sample, row in enumerate(labels.view(len(labels), -1)):
        row[torch.randperm(len(row), generator=generator)[: 1 + sample % 4]] = IGNORED
    return labels


def _images(model_type: str, config: Any, accepted: Any, size: Size, generator: torch.Generator) -> dict[str, Any]:
    """Images, or the tokens that stand for one, and a class for each."""
    vision, samples = getattr(config, "vision_config", config), size.samples
    pixels: Any = getattr(vision, "image_size", size.image)
    if model_type in PIXELS:
        pixels = PIXELS[model_type] * size.image // IMAGE
    height, width = (pixels, pixels) if isinstance(pixels, int) else pixels
    labels = torch.randint(0, config.num_labels, (samples,), generator=generator)
    if model_type != "shieldgemma2" and ("pixel_values" in accepted or "inputs" in accepted):
        channels = getattr(vision, "num_channels", 3)
        images = torch.rand((samples, channels, height, width), generator=generator)
        return {"pixel_values" if "pixel_values" in accepted else "inputs": images, "labels": labels}
    return {"input_ids": _tokens((samples, size.sequence), generator), "labels": labels}


def _model_class(task: str, model_type: str) -> type[transformers.PreTrainedModel]:
    """The class of a mapping's entry, the first one where it has several."""
    name = getattr(modeling_auto, TASKS[task])[model_type]
    return getattr(transformers, name if isinstance(name, str) else name[0])


def _accepted(model_class: type[transformers.PreTrainedModel], config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration, or the part of it, that a model class takes."""
    wanted = model_class.config_class
    if wanted is None or isinstance(config, wanted):
        return config
    return next((part for part in _parts(config) if isinstance(part, wanted)), config)


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration and every configuration inside it."""
    yield config
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PreTrainedConfig):
            yield from _parts(part)


def _layers(config: PreTrainedConfig) -> int:
    """How many layers it takes for every kind to occur, at least 2 and at most 10."""
    needed = 2
    for name in LAYER_KINDS:
        kinds = getattr(config, name, None)
        if isinstance(kinds, (list, tuple)):
            needed = max(needed, *(kinds.index(kind) + 1 for kind in kinds))
    return min(needed, 10)


def _settings(default: PreTrainedConfig, size: Size) -> dict[str, Any]:
    """The settings that make a configuration tiny, by the names of its fields, parts included."""
    layers = _layers(default) + size.layers
    settings: dict[str, Any] = {}
    placeholders = 0
    for name in sorted(field.name for field in dataclasses.fields(type(default))):
        try:
            value = getattr(default, name, None)
        except AmbiguousGlobalPerLayerAttributeError:
            value = SIZES.get(name)
        if name in default.sub_configs:
            if isinstance(value, PreTrainedConfig):
                settings[name] = {**_settings(value, size), "model_type": value.model_type}
        elif name in SIZES:
            if isinstance(value, int) and not _keeps(name, value):
                settings[name] = layers if name in LAYER_COUNTS else size.of(name)
        elif name == "pad_token_id":
            settings[name] = 0
        elif name == "decoder_start_token_id" or (name == "bos_token_id" and value is not None):
            settings[name] = 1
        elif name in ("eos_token_id", "sep_token_id", "forced_eos_token_id") and value is not None:
            settings[name] = 2
        elif PLACEHOLDER_TOKEN.search(name) and isinstance(value, int):
            placeholders += 1
            settings[name] = VOCABULARY - placeholders
    _merge(settings, SETTINGS.get(default.model_type, {}))
    return settings


def _keeps(name: str, value: int) -> bool:
    """Whether a default is kept since it is off, or small already where a larger value would mean another model."""
    return value <= 0 or (name in KEEP_IF_SMALLER and value < SIZES[name])


def _merge(settings: dict[str, Any], changes: dict[str, Any]) -> None:
    """Apply changes to settings in place, nested ones to what is nested; None takes a setting away."""
    for name, value in changes.items():
        if value is None:
            settings.pop(name, None)
        elif isinstance(value, dict) and isinstance(settings.get(name), dict):
            _merge(settings[name], value)
        else:
            settings[name] = value


def _no_randomness(model: nn.Module) -> None:
    """Set every probability of dropping or of noise to 0, in the modules and in the configurations they hold."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _zero_randomness(module)
        if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
            for part in _parts(config):
                _zero_randomness(part)


def _no_zeros(model: nn.Module) -> None:
    """Draw the parameters that start at zero too: biases would hide errors there, and gates stop every gradient."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.02)


def _zero_randomness(holder: Any) -> None:
    """Set every attribute that is a probability of dropping or of noise, or a list of them, to 0."""
    for name, value in list(vars(holder).items()):
        if isinstance(value, float) and RANDOMNESS.search(name):
            setattr(holder, name, 0.0)
        elif isinstance(value, list) and RANDOMNESS.search(name) and all(isinstance(item, float) for item in value):
            setattr(holder, name, [0.0] * len(value))
