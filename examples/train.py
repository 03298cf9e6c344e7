"""Trains a small GPT-2 or Llama on the source of Python's standard library, stops half-way, and goes on elsewhere.

    python examples/train.py [gpt2 [--float64] | llama] [--steps N]

Two ranks train by tensor parallelism and save a checkpoint now and then, until one of them is killed. Two others, as
two stages of a pipeline, go on from the last checkpoint to the end, and write the model as transformers reads it. The
losses of every step must be those of one process in plain PyTorch that nobody stopped. `train` is the script of a user.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from text import VOCABULARY, batches
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, get_cosine_schedule_with_warmup, logging

import autopart
from autopart.runtime.launch import launch

SAMPLES, SEQUENCE, WARM_UP, LR, CLIP = 8, 64, 20, 1e-3, 1.0
FOLDER = Path("build/train")
TOLERANCES = {"float32": 1e-4, "float64": 1e-10}
FIRST, SECOND = {"tp": 2}, {"pp": 2, "micro_batch": 4}
"""Settings before and after the interruption."""
CONFIGS = {
    "gpt2": GPT2Config(
        n_embd=64, n_layer=2, n_head=4, n_positions=SEQUENCE, vocab_size=VOCABULARY, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    ),
    "llama": LlamaConfig(
        hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=SEQUENCE, vocab_size=VOCABULARY, use_cache=False, bos_token_id=None, eos_token_id=None,
    ),
}  # fmt: skip

logging.set_verbosity_error()
logging.disable_progress_bar()


def build(name: str, dtype: str) -> nn.Module:
    """A small model in training mode, with the same random weights on every call."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).to(getattr(torch, dtype)).train()
    if dtype == "float64":
        model.loss_function = next_byte_loss
    return model


def next_byte_loss(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    """The loss in the dtype of the logits: transformers' own is of float32."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def data(steps: int, seed: int) -> list[dict[str, Tensor]]:
    """The batches of every run."""
    return list(batches(SAMPLES, SEQUENCE, steps, seed))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW that decays matrices alone."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        groups[parameter.dim() >= 2].append(parameter)
    return torch.optim.AdamW([{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}], lr=LR)


def train(name: str, dtype: str, steps: int, killed_at: int, settings: dict[str, Any], folder: Path) -> None:
    """One of the ranks: from the last checkpoint in a folder, if there is one, to the last step."""
    model, training, held_out = build(name, dtype), data(steps, seed=1), data(2, seed=2)
    every = max(1, steps // 4)
    compiled = autopart.compile(model, "2:cpu", training[0], **settings)
    optimizer = compiled.optimizer(optimizer_of(model))
    scheduler = get_cosine_schedule_with_warmup(optimizer, min(WARM_UP, steps // 4), steps)
    done = compiled.load(folder / "checkpoints", scheduler=scheduler)["done"] if killed_at < 0 else 0
    for step in range(done, steps):
        if step == killed_at and compiled.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        loss = compiled.step(training[step], clip_grad_norm=CLIP).item()
        scheduler.step()
        evaluated = None
        if (step + 1) % every == 0:
            evaluated = sum(compiled.evaluate(batch).item() for batch in held_out) / len(held_out)
            compiled.save(folder / "checkpoints", scheduler=scheduler, extra={"done": step + 1}, keep=2, wait=False)
        if compiled.rank == 0:
            with (folder / "losses.jsonl").open("a") as log:
                log.write(json.dumps([step, loss, evaluated]) + "\n")
    compiled.wait_saved()
    compiled.save_pretrained(folder / "model")
    dist.destroy_process_group()


def alone(name: str, dtype: str, steps: int) -> list[tuple[int, float, float | None]]:
    """The same in plain PyTorch: every step with its loss, and now and then the loss of what is held out."""
    torch.set_num_threads(1)  # as each rank has
    model, training, held_out = build(name, dtype), data(steps, seed=1), data(2, seed=2)
    optimizer = optimizer_of(model)
    scheduler = get_cosine_schedule_with_warmup(optimizer, min(WARM_UP, steps // 4), steps)
    rows: list[tuple[int, float, float | None]] = []
    for step, batch in enumerate(training):
        optimizer.zero_grad()
        loss: Tensor = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        evaluated = None
        if (step + 1) % max(1, steps // 4) == 0:
            model.eval()
            with torch.no_grad():
                evaluated = sum(model(**batch).loss.item() for batch in held_out) / len(held_out)
            model.train()
        rows.append((step, loss.item(), evaluated))
    return rows


def ranks(name: str, dtype: str, steps: int, killed_at: int, settings: dict[str, Any], folder: Path) -> int:
    """Train on two ranks; the exit status."""
    given = [name, dtype, str(steps), str(killed_at), json.dumps(settings), str(folder)]
    return launch([sys.executable, __file__, *given], 2)


def continuation(folder: Path, prompt: str, length: int) -> str:
    """What the trained model, as transformers reads it, says after a prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = model.generate(
        torch.tensor([list(prompt.encode())]), max_new_tokens=length, do_sample=False, use_cache=True
    )
    return bytes(tokens[0].tolist()).decode(errors="replace")


def main() -> None:
    """Exit with 1 where a loss differs by more than the tolerance."""
    if "RANK" in os.environ:
        name, dtype, steps, killed_at, settings, folder = sys.argv[1:]
        return train(name, dtype, int(steps), int(killed_at), json.loads(settings), Path(folder))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="gpt2", choices=CONFIGS)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--float64", action="store_true", help="GPT-2 in float64, in which losses agree to 1e-10")
    options = parser.parse_args()
    if options.float64 and options.model != "gpt2":
        parser.error("transformers' norms of Llama compute in float32")
    dtype = "float64" if options.float64 else "float32"
    folder, console, killed_at = FOLDER / options.model, Console(highlight=False), options.steps * 3 // 5
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    console.print(f"two ranks, {FIRST}, one of which is killed at step {killed_at} of {options.steps}")
    assert ranks(options.model, dtype, options.steps, killed_at, FIRST, folder) != 0
    console.print(f"two ranks, {SECOND}, from the last checkpoint on")
    if status := ranks(options.model, dtype, options.steps, -1, SECOND, folder):
        sys.exit(status)
    found = {step: (loss, held) for step, loss, held in map(json.loads, (folder / "losses.jsonl").open())}
    wanted = alone(options.model, dtype, options.steps)
    off = max(
        abs(a - b)
        for step, *row in wanted
        for a, b in zip(found[step], row, strict=True)
        if a is not None and b is not None
    )
    for step, loss, held in wanted:
        if held is not None:
            console.print(
                f"step {step + 1:4}  loss {found[step][0]:.5f} ({loss:.5f})  held out {found[step][1]:.5f} ({held:.5f})"
            )
    console.print(f"in brackets: one process in plain PyTorch; the losses differ by at most {off:.1e}")
    console.print(repr(continuation(folder / "model", "def ", 40)), markup=False)
    sys.exit(off > TOLERANCES[dtype])


if __name__ == "__main__":
    main()
