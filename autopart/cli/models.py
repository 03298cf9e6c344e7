"""Models by name: transformers configs with random weights, or a function of the user's."""

import difflib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from autopart.errors import PartitionError
from autopart.frontend.source_lines import user_line
from autopart.ir.gc_pause import paused

LONGEST = 1024
"""Tokens of a sequence where the user gives none: the config's maximum, but at most so many."""


def _gpt(layers: int, hidden: int, heads: int, tokens: int, words: int = 51200) -> tuple[str, Mapping[str, Any]]:
    """A GPT as the config of transformers' GPT-2 has it."""
    return "gpt2", {"n_layer": layers, "n_embd": hidden, "n_head": heads, "n_positions": tokens, "vocab_size": words}


def _llama(
    layers: int, hidden: int, inner: int, heads: int, shared: int, **settings: Any
) -> tuple[str, Mapping[str, Any]]:
    """A Llama, or another model whose config has Llama's names; `shared` is the number of key and value heads."""
    return "llama", {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "max_position_embeddings": 4096,
        **settings,
    }


def _llama_3(layers: int, hidden: int, inner: int, heads: int) -> tuple[str, Mapping[str, Any]]:
    theta = {"rope_type": "default", "rope_theta": 500000.0}
    return _llama(
        layers, hidden, inner, heads, 8, vocab_size=128256, max_position_embeddings=8192, rope_parameters=theta
    )


def _t5(inner: int, each: int, heads: int) -> tuple[str, Mapping[str, Any]]:
    return "t5", {"d_model": 1024, "d_ff": inner, "d_kv": each, "num_heads": heads, "num_layers": 24}


def _encoder(kind: str, layers: int, hidden: int, heads: int, **settings: Any) -> tuple[str, Mapping[str, Any]]:
    return kind, {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_attention_heads": heads,
        **settings,
    }


SIZES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    # Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), table 2.
    "gpt2-medium": _gpt(24, 1024, 16, 1024, 50257),
    "gpt2-large": _gpt(36, 1280, 20, 1024, 50257),
    "gpt2-xl": _gpt(48, 1600, 25, 1024, 50257),
    # Brown et al., GPT-3, arXiv 2005.14165, table 2.1; the vocabulary is GPT-2's.
    "gpt3-175b": _gpt(96, 12288, 96, 2048, 50257),
    # Narayanan et al., arXiv 2104.04473, table 1: sequences of 2,048 tokens of 51,200.
    "gpt-1.7b": _gpt(24, 2304, 24, 2048),
    "gpt-3.6b": _gpt(30, 3072, 32, 2048),
    "gpt-7.5b": _gpt(36, 4096, 32, 2048),
    "gpt-18b": _gpt(40, 6144, 48, 2048),
    "gpt-39b": _gpt(48, 8192, 64, 2048),
    "gpt-76b": _gpt(60, 10240, 80, 2048),
    "gpt-145b": _gpt(80, 12288, 96, 2048),
    "gpt-310b": _gpt(96, 16384, 128, 2048),
    "gpt-530b": _gpt(105, 20480, 128, 2048),
    "gpt-1t": _gpt(128, 25600, 160, 2048),
    # Touvron et al., Llama 2, arXiv 2307.09288, section 2.2 and table 1.
    "llama-2-7b": _llama(32, 4096, 11008, 32, 32),
    "llama-2-13b": _llama(40, 5120, 13824, 40, 40),
    # The Llama 3 Herd of Models, arXiv 2407.21783, table 3; 8,192 tokens of context before it is extended.
    "llama-3-8b": _llama_3(32, 4096, 14336, 32),
    "llama-3-70b": _llama_3(80, 8192, 28672, 64),
    "llama-3-405b": _llama_3(126, 16384, 53248, 128),
    # Jiang et al., Mixtral of Experts, arXiv 2401.04088, table 1.
    "mixtral-8x7b": (
        "mixtral",
        {
            **_llama(32, 4096, 14336, 32, 8)[1],
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "vocab_size": 32000,
            "max_position_embeddings": 32768,
            "sliding_window": None,
        },
    ),
    # Devlin et al., BERT, arXiv 1810.04805, section 3.
    "bert-large": _encoder("bert", 24, 1024, 16),
    # Raffel et al., T5, arXiv 1910.10683, section 3.7.
    "t5-large": _t5(4096, 64, 16),
    "t5-3b": _t5(16384, 128, 32),
    "t5-11b": _t5(65536, 128, 128),
    # Dosovitskiy et al., ViT, arXiv 2010.11929, table 1.
    "vit-large": _encoder("vit", 24, 1024, 16),
    "vit-huge": _encoder("vit", 32, 1280, 16, patch_size=14),
}
"""Name -> transformers model type, and the fields of its config that are not the default."""

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
    batch_size  samples of the batch
    sequence    tokens of a sample (default: the config's maximum, at most LONGEST)
    meta        make the parameters on the meta device, where they take no memory; buffers are made on the CPU
    dropout     keep the config's dropout rates; otherwise they are set to 0, and `say` is called with the old ones

    The batch of a user's function is taken as it is. Raises PartitionError for a spec that names nothing.
    """
    for name, size in (("batch", batch_size), ("sequence", sequence)):
        if size is not None and size < 1:
            raise PartitionError(f"{name}={size} is not positive", try_=f"{name}=8")
    if ":" in spec:
        return _from_function(spec, meta)
    with paused():
        config = _config(spec)
        config.use_cache = False
        if not dropout:
            _drop_dropout(config, say)
        model_class, make_batch = _head(config)
        with _told(f"no model can be made of {spec}"):
            return _build(model_class, config, meta), make_batch(config, batch_size, sequence)


@contextmanager
def _told(what: str, try_: str = "") -> Iterator[None]:
    """Errors of code that is not autopart's are raised as a PartitionError with their line."""
    try:
        yield
    except PartitionError:
        raise
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), "")
        where = user_line(traceback.extract_tb(error.__traceback__))
        raise PartitionError(what, f"{where}  {type(error).__name__}: {line}", try_) from error


def _config(spec: str) -> Any:
    from transformers import AutoConfig
    from transformers import logging as transformers_logging
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    transformers_logging.set_verbosity_error()
    path = Path(spec)
    if path.exists():
        with _told(f"{spec} is no config of transformers"):
            return AutoConfig.from_pretrained(spec, local_files_only=True)
    kind, changes = SIZES.get(spec, (spec, {}))
    if kind not in CONFIG_MAPPING:
        close = difflib.get_close_matches(spec, [*SIZES, *CONFIG_MAPPING], 3)
        raise PartitionError(
            f"unknown model {spec!r}",
            "it is no file, no size known here and no model type of transformers",
            f"{' or '.join(close) or 'gpt2, llama-3-8b, ...'}, a config.json, or module:function",
        )
    config = AutoConfig.for_model(kind, **changes)
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id
    return config


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

    heads = (
        ("SEQ_TO_SEQ_CAUSAL_LM", "Seq2SeqLM", _text_batch),
        ("MASKED_LM", "MaskedLM", _text_batch),
        ("CAUSAL_LM", "CausalLM", _text_batch),
        ("IMAGE_CLASSIFICATION", "ImageClassification", _image_batch),
    )
    for task, name, make_batch in heads:
        if config.model_type in getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES"):
            return getattr(transformers, f"AutoModelFor{name}"), make_batch
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
    fill_buffers(model)
    return model


def fill_buffers(module: nn.Module, within: Any = None) -> None:
    """Give a transformers model that was made on meta its buffers, on the CPU; parameters stay on meta.

    `within` is the innermost model of transformers that the module is in: that one initialises the module.
    """
    within = module if hasattr(module, "_init_weights") else within
    own = {k: v for k, v in module.named_buffers(recurse=False) if v.is_meta}
    for name, value in own.items():
        setattr(module, name, torch.zeros_like(value, device="cpu"))
    if own:
        within._init_weights(module)
    for child in module.children():
        fill_buffers(child, within)


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
    with _told(f"{spec} cannot be called", "a function without arguments that returns model, batch"):
        made = function()
    pair = isinstance(made, tuple) and len(made) == 2
    if not (pair and isinstance(made[0], nn.Module) and isinstance(made[1], Mapping)):
        given = f"({type(made[0]).__name__}, {type(made[1]).__name__})" if pair else type(made).__name__
        raise PartitionError(
            f"{spec} returned {given}",
            "the shell trains a model on a batch",
            "return model, batch",
        )
    model, batch = made
    return (model.to("meta") if meta and not any(True for _ in model.buffers()) else model), dict(batch)


def _module(where: str, spec: str) -> ModuleType:
    with _told(f"cannot import {where}", f"{spec!r} is read as module:function"):
        if not where.endswith(".py"):
            sys.path.insert(0, "")
            return importlib.import_module(where)
        found = importlib.util.spec_from_file_location(Path(where).stem, where)
        assert found is not None and found.loader is not None
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        return module
