"""Trains tiny models by transformers.Trainer on one process, and by autopart.Trainer on the ranks of a mesh.

Every run writes logs, weights and predictions of each rank to a folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from ranks import redirect, run_forked
from torch import Tensor, nn

import autopart
from autopart.hardware.mesh import Mesh
from autopart.passes import source

WORDS, WIDTH, TOKENS = 60, 32, 8
TRAINED, HELD_OUT, BATCH, ACCUMULATED = 22, 7, 4, 2
STOPPED_AT = 4
Row = dict[str, Tensor]
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "gpt2": [{"pp": 2, "tp": 2, "micro_batch": 2}, {"dp": 2, "tp": 2, "zero": 1, "micro_batch": 2}],
    "t5": [{"dp": 2, "tp": 2, "micro_batch": 2}, {"pp": 2, "dp": 2, "micro_batch": 2}],
}
"""Settings of a run, and of the run that goes on from its checkpoint."""
FORMS: dict[str, list[tuple[bool, dict[str, int], tuple[str, ...], int]]] = {
    case: [(True, {}, (), 2), (True, {"num_items_in_batch": 2}, (), 2), (False, {}, outputs, samples)]
    for case, outputs, samples in (("gpt2", ("logits",), 1), ("t5", ("logits", "encoder_last_hidden_state"), 2))
}
"""What ranks trace: in training or not, with what beside the batch, returning what, of so many samples."""


def model_of(case: str) -> nn.Module:
    """A tiny model without dropout, with the same random weights on every call."""
    torch.manual_seed(0)
    if case == "gpt2":
        config = hf.GPT2Config(
            n_embd=WIDTH, n_layer=2, n_head=4, n_positions=TOKENS, vocab_size=WORDS, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        return hf.GPT2LMHeadModel(config)
    config = hf.T5Config(
        d_model=WIDTH, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=WORDS, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


def rows(count: int, seed: int) -> list[Row]:
    """Samples, some of whose labels count for nothing."""
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, WORDS, (count, TOKENS), generator=drawn)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=drawn) < 0.3, -100)
    return [{"input_ids": one, "labels": other} for one, other in zip(ids, labels, strict=True)]


def masked(samples: Sequence[Row]) -> Row:
    """A batch of which more labels count for nothing, by random numbers."""
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    return {**batch, "labels": batch["labels"].masked_fill(torch.rand(batch["labels"].shape) < 0.3, -100)}


def metrics_of(prediction: Any) -> dict[str, float]:
    """The mean logit of what was right."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    labels = np.maximum(prediction.label_ids, 0)
    return {"right": float(np.take_along_axis(logits, labels[..., None], -1).mean())}


def arguments(folder: Path, **changed: Any) -> hf.TrainingArguments:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": BATCH, "per_device_eval_batch_size": HELD_OUT, "num_train_epochs": 2,
        "gradient_accumulation_steps": ACCUMULATED, "learning_rate": 1e-2, "weight_decay": 0.1, "adam_epsilon": 1e-4,
        "warmup_steps": 2, "lr_scheduler_type": "cosine", "max_grad_norm": 0.5, "logging_steps": 1,
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "report_to": "none",
        "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True, "use_cpu": True,
        "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    return hf.TrainingArguments(output_dir=str(folder), **{**settings, **changed})


def run(case: str, folder: Path, settings: dict[str, Any] | None, resume: Path | None = None) -> None:
    """One run of a case; with `settings` on a mesh, otherwise on one process."""
    given = {
        "model": model_of(case), "args": arguments(folder), "data_collator": masked,
        "train_dataset": rows(TRAINED, 1), "eval_dataset": rows(HELD_OUT, 2), "compute_metrics": metrics_of,
    }  # fmt: skip
    trainer = hf.Trainer(**given) if settings is None else autopart.Trainer(**given, mesh="4:cpu", nodes=5, **settings)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    predicted = trainer.predict(rows(HELD_OUT, 3))
    trainer.save_model(str(folder / "model"))
    outputs = predicted.predictions if isinstance(predicted.predictions, tuple) else (predicted.predictions,)
    best = trainer.state.best_model_checkpoint
    told = {"logs": trainer.state.log_history, "predicted": predicted.metrics, "best": best and Path(best).name}
    rank = os.environ.get("RANK", "0")
    (folder / f"{rank}.json").write_text(json.dumps(told))
    tensors = {"weights": trainer.model.state_dict(), "outputs": [torch.tensor(each) for each in outputs]}
    torch.save(tensors, folder / f"{rank}.pt")


def runs(case: str, folder: Path, on_mesh: bool) -> None:
    """A run to the end, and one from one of its checkpoints on."""
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        os.environ["LOCAL_RANK"] = os.environ["RANK"]
    for name, settings in zip(("whole", "resumed"), SETTINGS[case], strict=False):
        resume = folder / "whole" / f"checkpoint-{STOPPED_AT}" if name == "resumed" else None
        run(case, folder / name, settings if on_mesh else None, resume)


def alone(case: str, folder: Path) -> None:
    """The runs that are wanted, by transformers.Trainer on one process."""
    redirect(folder.with_suffix(".txt"))
    runs(case, folder, False)


def on_mesh(case: str, folder: Path) -> None:
    """The same on four ranks, which share what this process traces for them."""
    redirect(folder.with_suffix(".txt"))
    model, batch = model_of(case), masked(rows(2, 1))
    known: dict[Any, Any] = {}

    def prepared(model: nn.Module, batch: Any, *given: Any) -> Any:
        key = model.training, [(name, str(value)) for name, value in batch.items()], given[-1]
        if (text := str(key)) not in known:
            known[text] = prepare(model, batch, *given)
        return known[text]

    prepare, source.prepare = source.prepare, prepared
    for training, given, names, samples in FORMS[case]:
        model.train(training)
        traced = source.Source(model, {**batch, **given}, torch.float32, outputs=names)
        traced.full(samples, Mesh.of("4:cpu"))
    run_forked(partial(runs, case, folder, True), 4)
