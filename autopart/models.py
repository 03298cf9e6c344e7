"""Models by name, for the shell: transformers configs with random weights, or a function of the user's."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from autopart.errors import PartitionError

LONGEST = 1024
"""Tokens of a sequence where the user names none: the config's maximum, but no more than this."""

SIZES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    # Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), table 2.
    "gpt2-medium": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2-large": ("gpt2", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    # Touvron et al., Llama 2, arXiv 2307.09288, section 2.2 and table 1.
    "llama-2-7b": ("llama", {"max_position_embeddings": 4096}),
    "llama-2-13b": (
        "llama",
        {
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 40,
            "max_position_embeddings": 4096,
        },
    ),
    # The Llama 3 Herd of Models, arXiv 2407.21783, table 3; 8,192 tokens of context before it is extended.
    "llama-3-8b": (
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "llama-3-70b": (
        "llama",
        {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    # Devlin et al., BERT, arXiv 1810.04805, section 3.
    "bert-large": (
        "bert",
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    ),
    # Raffel et al., T5, arXiv 1910.10683, section 3.7.
    "t5-large": ("t5", {"d_model": 1024, "d_ff": 4096, "d_kv": 64, "num_heads": 16, "num_layers": 24}),
    "t5-3b": ("t5", {"d_model": 1024, "d_ff": 16384, "d_kv": 128, "num_heads": 32, "num_layers": 24}),
    "t5-11b": ("t5", {"d_model": 1024, "d_ff": 65536, "d_kv": 128, "num_heads": 128, "num_layers": 24}),
    # Dosovitskiy et al., ViT, arXiv 2010.11929, table 1.
    "vit-large": (
        "vit",
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    ),
    "vit-huge": (
        "vit",
        {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "patch_size": 14,
        },
    ),
}
"""Name -> transformers model type, and what its config says otherwise than by default."""

Batch = dict[str, Any]


def load(
    spec: str,
    batch_size: int,
    sequence: int | None = None,
    meta: bool = False,
    dropout: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[nn.Module, Batch]:
    """The model that `spec` names, with random weights, and a random batch for it.

    spec        a config.json of transformers or its folder; a model type ("gpt2") or one of SIZES ("gpt2-xl");
                "module:function" or "file.py:function", the function returning (model, batch)
    batch_size  samples of the batch;  sequence: tokens of a sample (default: the config's maximum, at most LONGEST)
    meta        make the parameters on the meta device, where they take no memory; buffers are made all the same
    dropout     keep the config's dropout rates; else they are set to 0, of which `say` is told

    A function's own batch is taken as it is. Raises PartitionError for a spec that names nothing.
    """
    if ":" in spec:
        return _from_function(spec, meta)
    config = _config(spec)
    config.use_cache = False
    if not dropout:
        _drop_dropout(config, say)
    model_class, make_batch = _head(config)
    model = _build(model_class, config, meta)
    return model, make_batch(config, batch_size, sequence)


def _config(spec: str) -> Any:
    from transformers import AutoConfig
    from transformers import logging as transformers_logging
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    transformers_logging.set_verbosity_error()
    path = Path(spec)
    try:
        if path.exists():
            return AutoConfig.from_pretrained(spec, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise PartitionError(f"{spec} is no config of transformers", str(error).splitlines()[0]) from error
    kind, changes = SIZES.get(spec, (spec, {}))
    if kind not in CONFIG_MAPPING:
        close = difflib.get_close_matches(spec, [*SIZES, *CONFIG_MAPPING], 3)
        raise PartitionError(
            f"unknown model {spec!r}",
            "it is no file, no size known here and no model type of transformers",
            f"{' or '.join(close) or 'gpt2, llama-3-8b, ...'}, a config.json, or module:function",
        )
    return AutoConfig.for_model(kind, **changes)


def _drop_dropout(config: Any, say: Callable[[str], None]) -> None:
    rates = {k: v for k, v in config.to_dict().items() if ("dropout" in k or "pdrop" in k) and _is_rate(v)}
    for name in rates:
        setattr(config, name, 0.0)
    if rates:
        say(f"dropout is 0 here: {', '.join(f'{k} was {v}' for k, v in rates.items())}")


def _is_rate(value: Any) -> bool:
    return isinstance(value, float) and value > 0


def _head(config: Any) -> tuple[Any, Callable[[Any, int, int | None], Batch]]:
    """The class to train, and what makes its batch.

    Masked before causal: transformers can build encoders as decoders too, but no decoder as an encoder.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    heads: tuple[tuple[Mapping[str, Any], Any, Callable[[Any, int, int | None], Batch]], ...] = (
        (
            auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
            transformers.AutoModelForSeq2SeqLM,
            _text_batch,
        ),
        (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, transformers.AutoModelForMaskedLM, _text_batch),
        (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForCausalLM, _text_batch),
        (
            auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
            transformers.AutoModelForImageClassification,
            _image_batch,
        ),
    )
    for names, head, make_batch in heads:
        if config.model_type in names:
            return head, make_batch
    raise PartitionError(
        f"no way to train a {config.model_type} is known here",
        "it is no language model and no image classifier",
        "module:function, the function returning (model, batch)",
    )


def _build(model_class: Any, config: Any, meta: bool) -> nn.Module:
    if not meta:
        model: nn.Module = model_class.from_config(config)
        return model
    with torch.device("meta"):
        model = model_class.from_config(config)
    for module in model.modules():
        own = {k: v for k, v in module.named_buffers(recurse=False) if v.is_meta}
        for name, value in own.items():
            setattr(module, name, torch.zeros_like(value, device="cpu"))
        if own:
            # transformers' own way to fill buffers of a model made on meta.
            model._init_weights(module)  # type: ignore[operator]
    return model


def _text_batch(config: Any, samples: int, sequence: int | None) -> Batch:
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or LONGEST
    return {
        name: _ids(text.vocab_size, (samples, sequence or min(longest, LONGEST))) for name in ("input_ids", "labels")
    }


def _image_batch(config: Any, samples: int, sequence: int | None) -> Batch:
    size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    pixels = torch.randn(samples, config.num_channels, size, size, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "labels": _ids(config.num_labels, (samples,))}


def _ids(below: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(len(shape)))


def _from_function(spec: str, meta: bool) -> tuple[nn.Module, Batch]:
    where, _, name = spec.rpartition(":")
    function = getattr(_module(where, spec), name, None)
    if not callable(function):
        raise PartitionError(f"{where} has no function {name}", f"asked for by {spec!r}")
    made = function()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise PartitionError(
            f"{spec} returned {type(made).__name__}",
            "the shell trains a model on a batch",
            "return model, batch",
        )
    model, batch = made
    return (model.to("meta") if meta and not any(True for _ in model.buffers()) else model), dict(batch)


def _module(where: str, spec: str) -> ModuleType:
    try:
        if not where.endswith(".py"):
            sys.path.insert(0, "")
            return importlib.import_module(where)
        found = importlib.util.spec_from_file_location(Path(where).stem, where)
        assert found is not None and found.loader is not None
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        return module
    except (ImportError, OSError) as error:
        raise PartitionError(
            f"cannot import {where}",
            f"{type(error).__name__}: {error}",
            f"{spec!r} is read as module:function",
        ) from error
