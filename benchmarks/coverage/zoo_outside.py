"""Small models of torchvision, timm, diffusers, x-transformers and peft, and those of `handwritten`, with batches.

`build` makes one by its name, "timm:test_vit". Models return what they return; a module around them gives the loss, as
a user would write it. Nothing is downloaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.coverage.handwritten import MODELS as HANDWRITTEN
from benchmarks.coverage.handwritten import build as by_hand

Tensor = torch.Tensor
Built = tuple[nn.Module, dict[str, Any]]
SAMPLES = 4
CLASSES = 8
MODELS: dict[str, Callable[[], Built]] = {f"hand:{name}": lambda name=name: by_hand(name) for name in HANDWRITTEN}  # type: ignore[misc]


def build(name: str) -> Built:
    """A model of the table and its batch, always the same. Raises ImportError where its package is not there."""
    torch.manual_seed(0)
    return MODELS[name]()


class Wrapped(nn.Module):
    """A model with a loss of what it returns: of the tensor, or of the first of several."""

    def __init__(self, body: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.loss = body, loss

    def forward(self, target: Tensor, **given: Any) -> Tensor:
        out = self.body(**given)
        if not isinstance(out, Tensor):
            out = next(iter(out.values())) if isinstance(out, dict) else out[0]
        return self.loss(out, target)


def wrapped(body: nn.Module, given: dict[str, Any], *target: int) -> Built:
    """With the mean square error to a random target of such a shape; of none, the class's cross-entropy."""
    if target:
        return Wrapped(body, F.mse_loss), {**given, "target": torch.randn(SAMPLES, *target)}
    return Wrapped(body, F.cross_entropy), {**given, "target": torch.randint(CLASSES, (SAMPLES,))}


def image(side: int, channels: int = 3) -> Tensor:
    return torch.randn(SAMPLES, channels, side, side)


# torchvision


def vision(path: str, side: int = 32, **settings: Any) -> Callable[[], Built]:
    """A classifier of torchvision.models."""

    def made() -> Built:
        module, _, name = f"torchvision.models.{path}".rpartition(".")
        body = getattr(importlib.import_module(module), name)(num_classes=CLASSES, **settings)
        return wrapped(body, {"x": image(side)})

    return made


def vision_blocks(path: str, side: int, arguments: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]) -> Any:
    """A classifier of torchvision whose class takes its blocks as arguments."""

    def made() -> Built:
        module, _, name = f"torchvision.models.{path}".rpartition(".")
        package = importlib.import_module(module)
        args, settings = arguments(package)
        return wrapped(getattr(package, name)(*args, num_classes=CLASSES, **settings), {"x": image(side)})

    return made


def segmentation(name: str) -> Callable[[], Built]:
    def made() -> Built:
        models = importlib.import_module("torchvision.models.segmentation")
        body = getattr(models, name)(weights=None, weights_backbone=None, num_classes=CLASSES)
        given = {"input": image(32), "target": torch.randint(CLASSES, (SAMPLES, 32, 32))}
        return Wrapped(body.eval(), F.cross_entropy), given

    return made


def video(**settings: Any) -> Callable[[], Built]:
    def made() -> Built:
        resnet = importlib.import_module("torchvision.models.video.resnet")
        body = resnet.VideoResNet(
            resnet.BasicBlock, [resnet.Conv3DSimple] * 4, [1, 1, 1, 1], resnet.BasicStem, num_classes=CLASSES
        )
        return wrapped(body, {"x": torch.randn(SAMPLES, 3, 4, 16, 16)})

    return made


def _swin(block: str) -> Any:
    def arguments(package: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        parts = {"block": getattr(package, block)}
        if block.endswith("V2"):
            parts["downsample_layer"] = package.PatchMergingV2
        sizes = {"patch_size": [2, 2], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
        return (), {**sizes, "stochastic_depth_prob": 0.0, **parts}

    return arguments


def _convnext(package: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    config = package.CNBlockConfig
    return ([config(16, 32, 2), config(32, None, 2)],), {"stochastic_depth_prob": 0.0}


MODELS |= {
    f"torchvision:{name}": made
    for name, made in {
        "resnet18": vision("resnet18"),
        "bottleneck": vision_blocks("resnet.ResNet", 32, lambda p: ((p.Bottleneck, [1, 1, 1, 1]), {})),
        "resnext": vision_blocks(
            "resnet.ResNet", 32, lambda p: ((p.Bottleneck, [1, 1, 1, 1]), {"groups": 4, "width_per_group": 16})
        ),
        "densenet": vision("densenet.DenseNet", growth_rate=8, block_config=(2, 2, 2), num_init_features=16),
        "squeezenet1_1": vision("squeezenet1_1", 64),
        "mobilenet_v2": vision("mobilenet_v2", width_mult=0.25),
        "mobilenet_v3_small": vision("mobilenet_v3_small", width_mult=0.5),
        "mnasnet": vision("mnasnet.MNASNet", alpha=0.35),
        "shufflenet_v2_x0_5": vision("shufflenet_v2_x0_5"),
        "efficientnet_b0": vision("efficientnet_b0", stochastic_depth_prob=0.0),
        "regnet_y_400mf": vision("regnet_y_400mf"),
        "googlenet": vision("googlenet", 64, aux_logits=False, init_weights=False),
        "vit": vision(
            "vision_transformer.VisionTransformer", image_size=32, patch_size=8, num_layers=2, num_heads=4,
            hidden_dim=32, mlp_dim=64,
        ),
        "swin": vision_blocks("swin_transformer.SwinTransformer", 32, _swin("SwinTransformerBlock")),
        "swin_v2": vision_blocks("swin_transformer.SwinTransformer", 32, _swin("SwinTransformerBlockV2")),
        "convnext": vision_blocks("convnext.ConvNeXt", 32, _convnext),
        "maxvit": vision(
            "maxvit.MaxVit", 64, input_size=(64, 64), stem_channels=16, partition_size=4, block_channels=[16, 32],
            block_layers=[1, 1], head_dim=8, stochastic_depth_prob=0.0,
        ),
        "lraspp": segmentation("lraspp_mobilenet_v3_large"),
        "video_resnet": video(),
    }.items()
}  # fmt: skip


# timm: models for its own tests, and others made small


def timm(name: str, side: int = 32, **settings: Any) -> Callable[[], Built]:
    def made() -> Built:
        body = importlib.import_module("timm").create_model(name, num_classes=CLASSES, **settings)
        return wrapped(body, {"x": image(side)})

    return made


def timm_class(path: str, parts: Mapping[str, str] | None = None, **settings: Any) -> Callable[[], Built]:
    """A classifier of timm by its class, with classes of the same module as arguments."""

    def made() -> Built:
        module, _, name = path.rpartition(".")
        package = importlib.import_module(f"timm.models.{module}")
        blocks = {argument: getattr(package, part) for argument, part in (parts or {}).items()}
        return wrapped(getattr(package, name)(num_classes=CLASSES, **blocks, **settings), {"x": image(32)})

    return made


THIN = {"embed_dim": 32, "depth": 2, "num_heads": 4}
MIXER = {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 32, "mlp_ratio": 4}
TIMM = """test_byobnet test_convnext test_convnext2 test_convnext3 test_efficientnet test_efficientnet_evos
    test_efficientnet_gn test_efficientnet_ln test_mambaout test_nfnet test_resnet ghostnet_050 lcnet_050
    mobilenetv4_conv_small_035 edgenext_xx_small starnet_s1 fastvit_t8""".split()
MODELS |= {f"timm:{name}": timm(name, 64) for name in TIMM}
MODELS |= {f"timm:{name}": timm(name, 32, img_size=32) for name in ("test_vit", "test_vit2", "test_vit3", "test_vit4")}
MODELS |= {
    "timm:mobilevit_xxs": timm("mobilevit_xxs", 64),
    "timm:efficientvit_m0": timm("efficientvit_m0", 64, img_size=64),
    "timm:vit": timm("vit_tiny_patch16_224", img_size=32, patch_size=8, **THIN),
    "timm:deit3": timm("deit3_small_patch16_224", img_size=32, patch_size=8, **THIN),
    "timm:cait": timm("cait_xxs24_224", img_size=32, patch_size=8, **THIN),
    "timm:xcit": timm("xcit_nano_12_p8_224", img_size=32, **THIN),
    "timm:beit": timm("beit_base_patch16_224", img_size=32, patch_size=8, **THIN),
    "timm:eva02": timm("eva02_tiny_patch14_224", 28, img_size=28, **THIN),
    "timm:convit": timm("convit_tiny", img_size=32, patch_size=8, **THIN),
    "timm:mixer": timm_class("mlp_mixer.MlpMixer", **MIXER | {"mlp_ratio": (0.5, 4.0)}),
    "timm:gmlp": timm_class(
        "mlp_mixer.MlpMixer", {"block_layer": "SpatialGatingBlock", "mlp_layer": "GatedMlp"}, **MIXER
    ),
    "timm:resmlp": timm_class("mlp_mixer.MlpMixer", {"block_layer": "ResBlock"}, **MIXER),
    "timm:convmixer": timm_class("convmixer.ConvMixer", dim=32, depth=2, patch_size=4),
    "timm:pvt_v2": timm("pvt_v2_b0", 64, depths=(1, 1, 1, 1)),
}


# diffusers


def diffusion(name: str, given: Callable[[], dict[str, Any]], *target: int, **settings: Any) -> Callable[[], Built]:
    def made() -> Built:
        body = getattr(importlib.import_module("diffusers"), name)(**settings)
        return wrapped(body, given(), *target)

    return made


def steps() -> Tensor:
    return torch.randint(1000, (SAMPLES,))


UNET = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (16, 32)}
GROUPS = {"norm_num_groups": 4}
LATENT = {
    "in_channels": 3, "out_channels": 3, "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "block_out_channels": (16, 32), "latent_channels": 4,
}  # fmt: skip
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
MODELS |= {
    "diffusers:unet": diffusion(
        "UNet2DModel", lambda: {"sample": image(8, 4), "timestep": steps()}, 4, 8, 8, **UNET, **GROUPS,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    ),
    "diffusers:unet_condition": diffusion(
        "UNet2DConditionModel",
        lambda: {"sample": image(8, 4), "timestep": steps(), "encoder_hidden_states": torch.randn(SAMPLES, 5, 16)},
        4, 8, 8, **UNET, **GROUPS, cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ),
    "diffusers:unet_1d": diffusion(
        "UNet1DModel", lambda: {"sample": torch.randn(SAMPLES, 2, 32), "timestep": steps()}, 2, 32, in_channels=2,
        out_channels=2, block_out_channels=(16, 32), down_block_types=("DownBlock1DNoSkip", "DownBlock1D"),
        up_block_types=("UpBlock1D", "UpBlock1DNoSkip"), extra_in_channels=32,
    ),
    "diffusers:autoencoder": diffusion("AutoencoderKL", lambda: {"sample": image(16)}, 3, 16, 16, **LATENT, **GROUPS),
    "diffusers:autoencoder_tiny": diffusion(
        "AutoencoderTiny", lambda: {"sample": image(16)}, 3, 16, 16, encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    ),
    "diffusers:vq": diffusion(
        "VQModel", lambda: {"sample": image(16)}, 3, 16, 16, **LATENT, **GROUPS, num_vq_embeddings=16
    ),
    "diffusers:dit": diffusion(
        "DiTTransformer2DModel",
        lambda: {"hidden_states": image(8, 4), "timestep": steps(), "class_labels": torch.randint(8, (SAMPLES,))},
        4, 8, 8, **HEADS, in_channels=4, out_channels=4, num_layers=2, sample_size=8, norm_num_groups=4,
        num_embeds_ada_norm=1000, dropout=0.0,
    ),
    "diffusers:sd3": diffusion(
        "SD3Transformer2DModel",
        lambda: {
            "hidden_states": image(8, 4), "timestep": steps(), "encoder_hidden_states": torch.randn(SAMPLES, 5, 16),
            "pooled_projections": torch.randn(SAMPLES, 16),
        },
        4, 8, 8, **HEADS, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=16, pos_embed_max_size=8,
    ),
    "diffusers:prior": diffusion(
        "PriorTransformer",
        lambda: {
            "hidden_states": torch.randn(SAMPLES, 16), "timestep": steps(), "proj_embedding": torch.randn(SAMPLES, 16),
            "encoder_hidden_states": torch.randn(SAMPLES, 5, 16),
        },
        16, **HEADS, num_layers=2, embedding_dim=16, num_embeddings=5, additional_embeddings=4,
    ),
}  # fmt: skip


# x-transformers


WORDS, PLACES = 32, 12


def x_decoder(layers: str = "Decoder", **settings: Any) -> Callable[[], Built]:
    """A language model of x-transformers, and the next token's cross-entropy; of an encoder, each token's own."""

    def made() -> Built:
        package = importlib.import_module("x_transformers")
        body = getattr(package, layers)(dim=32, depth=2, heads=4, attn_dim_head=8, **settings)
        model = package.TransformerWrapper(num_tokens=WORDS, max_seq_len=PLACES, attn_layers=body)
        given = {"x": torch.randint(WORDS, (SAMPLES, PLACES)), "target": torch.randint(WORDS, (SAMPLES, PLACES))}
        return Wrapped(model, lambda out, target: F.cross_entropy(out.transpose(1, 2), target)), given

    return made


MODELS |= {
    f"x-transformers:{name}": made
    for name, made in {
        "decoder": x_decoder(),
        "encoder": x_decoder("Encoder"),
        "rotary_rmsnorm_glu": x_decoder(rotary_pos_emb=True, use_rmsnorm=True, ff_glu=True, ff_swish=True),
        "alibi": x_decoder(alibi_pos_bias=True, alibi_num_heads=2),
        "relative_bias": x_decoder(rel_pos_bias=True),
        "one_kv_head": x_decoder(attn_one_kv_head=True),
        "grouped_heads": x_decoder(attn_kv_heads=2),
        "qk_norm": x_decoder(attn_qk_norm=True),
        "memories": x_decoder(attn_num_mem_kv=4),
        "talking_heads": x_decoder(attn_pre_talking_heads=True),
        "sandwich": x_decoder(sandwich_coef=1),
        "macaron_shift": x_decoder(macaron=True, shift_tokens=1),
    }.items()
}


# peft: adapters on small models of transformers


def adapted(config: str, base: str = "llama", **settings: Any) -> Callable[[], Built]:
    def made() -> Built:
        transformers, peft = importlib.import_module("transformers"), importlib.import_module("peft")
        sizes = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if base == "bert" else {}
        kind = transformers.AutoModelForMaskedLM if base == "bert" else transformers.AutoModelForCausalLM
        model = kind.from_config(transformers.AutoConfig.for_model(base, **sizes, **plain, intermediate_size=64))
        if config.endswith("TuningConfig") or config == "PromptEncoderConfig":
            settings["task_type"] = "CAUSAL_LM"
        model = peft.get_peft_model(model, getattr(peft, config)(**settings))
        ids = torch.randint(WORDS, (SAMPLES, PLACES))
        return model, {"input_ids": ids, "labels": ids}

    return made


TARGETS = {"target_modules": ["q_proj", "v_proj"]}
MODELS |= {
    f"peft:{name}": made
    for name, made in {
        "lora": adapted("LoraConfig", r=4, **TARGETS),
        "lora_bert": adapted("LoraConfig", "bert", r=4, target_modules=["query", "value"]),
        "rslora_bias": adapted("LoraConfig", r=4, use_rslora=True, lora_bias=True, **TARGETS),
        "dora": adapted("LoraConfig", r=4, use_dora=True, **TARGETS),
        "ia3": adapted(
            "IA3Config", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        "loha": adapted("LoHaConfig", r=4, **TARGETS),
        "lokr": adapted("LoKrConfig", r=4, **TARGETS),
        "oft": adapted("OFTConfig", r=0, oft_block_size=4, **TARGETS),
        "boft": adapted("BOFTConfig", boft_block_size=4, **TARGETS),
        "vera": adapted("VeraConfig", r=4, **TARGETS),
        "fourierft": adapted("FourierFTConfig", n_frequency=16, **TARGETS),
        "norms": adapted("LNTuningConfig", target_modules=["input_layernorm", "post_attention_layernorm"]),
        "prompts": adapted("PromptTuningConfig", num_virtual_tokens=4),
        "prompt_encoder": adapted("PromptEncoderConfig", num_virtual_tokens=4, encoder_hidden_size=16),
    }.items()
}
