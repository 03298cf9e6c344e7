"""A training step of whole models, or of their first layers: autopart's against eager PyTorch, torch.compile and Liger.

A step is a forward and a backward pass in bfloat16. Every system has the same random weights and batch. Its loss is
held against eager PyTorch's before it is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import autopart
from autopart.cli.models import SIZES
from benchmarks.gpu import liger
from benchmarks.gpu.speed import BACKEND

TOLERANCE = 2e-2
"""By how much a loss may differ, relatively, from eager PyTorch's."""
WARM_UP, STEPS = 3, 10
Step = Callable[[], Any]


@dataclass(frozen=True)
class Model:
    """A model type of transformers, changes of its config, those of a dry run, samples of a batch and tokens of one."""

    kind: str
    config: Mapping[str, Any]
    tiny: Mapping[str, Any]
    samples: int
    tokens: int


NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"), 0.0)
TINY = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 96}  # fmt: skip

MODELS: Mapping[str, Model] = {
    "GPT-2 XL": Model(
        "gpt2", SIZES["gpt2-xl"][1], {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 96}, 8, 1024
    ),
    "Llama-3-8B, 4 layers": Model("llama", {**SIZES["llama-3-8b"][1], "num_hidden_layers": 4}, TINY, 4, 4096),
    "Mixtral-8x7B, 2 layers": Model(
        "mixtral", {**SIZES["mixtral-8x7b"][1], "num_hidden_layers": 2}, {**TINY, "num_local_experts": 4}, 4, 2048
    ),
}


def measure(name: str, system: str, eager_loss: float | None, device: str, mesh: str) -> dict[str, Any]:
    """The loss, median seconds and most allocated bytes of a step; seconds and bytes only on a GPU."""
    made = build(MODELS[name], device)
    step = SYSTEM_STEPS[system](*made, mesh)
    del made
    if step is None:
        return {"status": "left out: Liger is not here, or knows no such model"}
    started = time.perf_counter()
    loss = float(step())
    found: dict[str, Any] = {"loss": loss, "first_seconds": time.perf_counter() - started}
    if eager_loss is not None:
        found["loss_error"] = abs(loss - eager_loss) / abs(eager_loss)
        if not found["loss_error"] <= TOLERANCE:
            return {"status": f"the loss is {loss:.6g}, eager PyTorch's {eager_loss:.6g}", **found}
    if device == "cuda":
        found |= timed(step)
    return {"status": "ok", **found}


def warm(name: str, device: str) -> dict[str, Any]:
    """Run a compiled step once, so that its kernels are in the cache on disk."""
    return {"status": "ok", "loss": float(compiled_step(*build(MODELS[name], device))())}


def build(model: Model, device: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model in bfloat16 with random weights, and a batch, both on the device."""
    torch.manual_seed(0)
    dry = device == "cpu"
    changes = {"n_positions": model.tokens} if model.kind == "gpt2" else {}
    config = transformers.AutoConfig.for_model(
        model.kind, **{**NO_DROPOUT, **changes}, **(model.tiny if dry else model.config)
    )
    config.use_cache = False
    with torch.device(device):
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
        shape = (2, 16) if dry else (model.samples, model.tokens)
        ids = torch.randint(config.vocab_size, shape)
    return made, {"input_ids": ids, "labels": ids.clone()}


def plain_step(model: nn.Module, batch: dict[str, Tensor], mesh: str = "") -> Step:
    """A step as one writes it."""

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss: Tensor = model(**batch).loss
        loss.backward()
        return loss.detach()

    return step


def autopart_step(model: nn.Module, batch: dict[str, Tensor], mesh: str) -> Step:
    """The step of autopart's emitted code, of one micro-batch."""
    samples = len(batch["input_ids"])
    settings: dict[str, Any] = {"micro_batch": samples, "recompute": "none", "precision": "bfloat16"}
    settings["optimizer"] = "sgd"  # which has no states that would have to fit
    compiled = autopart.compile(model.cpu(), mesh, batch, check_batches=False, seed=0, **settings)
    return lambda: compiled.step(batch)


def compiled_step(model: nn.Module, batch: dict[str, Tensor], mesh: str = "") -> Step:
    """The step of what torch.compile makes of the model."""
    torch.compiler.reset()
    return plain_step(torch.compile(model, backend=BACKEND[batch["input_ids"].device.type], dynamic=False), batch)


def liger_step(model: nn.Module, batch: dict[str, Tensor], mesh: str) -> Step | None:
    """The step of the model with Liger's kernels."""
    patched = liger.patched(model) if batch["input_ids"].is_cuda else None
    return None if patched is None else plain_step(patched, batch)


SYSTEM_STEPS: Mapping[str, Callable[[nn.Module, dict[str, Tensor], str], Step | None]] = {
    "eager": plain_step,
    "autopart": autopart_step,
    "liger": liger_step,
    "compile": compiled_step,
}


def timed(step: Step) -> dict[str, Any]:
    """Median seconds of a step, all seconds, and most allocated bytes."""
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for number in range(WARM_UP + STEPS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - started)
    return {
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "bytes": torch.cuda.max_memory_allocated(),
    }
