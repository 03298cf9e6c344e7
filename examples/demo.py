"""Plan and train two small models on four local processes, and compare every step's loss with one process."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from text import VOCABULARY, batches
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, logging

import autopart
from autopart.cli import write_folder
from autopart.runtime.launch import launch

RANKS = 4
SAMPLES, SEQUENCE, STEPS, LR = 16, 128, 30, 1e-3
TOLERANCE = 1e-3
FOLDER = Path("build/demo")

SETTINGS: dict[str, dict[str, int]] = {
    "gpt2": {"pp": 2, "tp": 2, "micro_batch": 4},
    "llama": {},
}
"""Model -> what the planner is told; nothing: it chooses."""


logging.set_verbosity_error()


def build(name: str) -> nn.Module:
    """A small model with the same random weights on every call."""
    torch.manual_seed(0)
    if name == "gpt2":
        no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        size = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": SEQUENCE, "vocab_size": VOCABULARY}
        return GPT2LMHeadModel(GPT2Config(**size, **no_dropout, use_cache=False))
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=SEQUENCE,
            vocab_size=VOCABULARY,
            use_cache=False,
        )
    )


def data() -> Iterator[dict[str, Tensor]]:
    """The batches of every run."""
    return batches(SAMPLES, SEQUENCE, STEPS, seed=1)


def train_rank(name: str) -> None:
    """One of the processes; rank 0 leaves the losses and the seconds of every step in the model's folder."""
    folder = FOLDER / name
    plan = autopart.Plan.load(folder / "plan.json")
    compiled = autopart.compile(build(name), plan.mesh, next(data()), plan=plan)
    compiled.optimizer(torch.optim.AdamW, lr=LR)
    losses, seconds = [], []
    for batch in data():
        started = time.perf_counter()
        losses.append(float(compiled.step(batch)))
        seconds.append(time.perf_counter() - started)
    if compiled.rank == 0:
        (folder / "result.json").write_text(json.dumps({"losses": losses, "seconds": seconds}))
    dist.destroy_process_group()


def train_alone(name: str) -> dict[str, Any]:
    """The same in this process, in plain PyTorch."""
    model = build(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    losses, seconds = [], []
    for batch in data():
        started = time.perf_counter()
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    return {"losses": losses, "seconds": seconds}


def tokens_per_second(result: dict[str, Any]) -> float:
    """Of the median step."""
    return SAMPLES * SEQUENCE / sorted(result["seconds"])[STEPS // 2]


def show(name: str, alone: dict[str, Any], together: dict[str, Any], console: Console) -> float:
    """Print both loss curves; their largest difference."""
    table = Table("step", "one process", f"{RANKS} processes", "difference", title=f"{name}: loss")
    differences = [abs(a - b) for a, b in zip(alone["losses"], together["losses"], strict=True)]
    for step, (a, b, d) in enumerate(zip(alone["losses"], together["losses"], differences, strict=True), 1):
        table.add_row(str(step), f"{a:.6f}", f"{b:.6f}", f"{d:.1e}")
    console.print(table)
    console.print(f"largest difference {max(differences):.1e}, tolerance {TOLERANCE:.0e}")
    console.print(
        f"{RANKS} processes {tokens_per_second(together):,.0f} tokens/s, "
        f"one process {tokens_per_second(alone):,.0f} tokens/s, all on the same {os.cpu_count()} cores"
    )
    return max(differences)


def demonstrate(name: str, console: Console) -> bool:
    """Plan, emit, train, compare; whether the curves agree."""
    console.rule(name)
    model, batch = build(name), next(data())
    with console.status("planning"):
        plan = autopart.plan(model, f"{RANKS}:cpu", batch, **SETTINGS[name])
    console.print(str(plan), markup=False, highlight=False, soft_wrap=True)
    files = write_folder(model, batch, plan, FOLDER / name)
    console.print(f"\nthe emitted code: {' '.join(map(str, files))}", highlight=False, soft_wrap=True)
    with console.status(f"training on {RANKS} processes"):
        status = launch([sys.executable, __file__, name], RANKS)
    if status:
        sys.exit(status)
    with console.status("training on one process"):
        alone = train_alone(name)
    together = json.loads((FOLDER / name / "result.json").read_text())
    return show(name, alone, together, console) <= TOLERANCE


def main() -> None:
    """Exit with 1 where a curve differs."""
    if "RANK" in os.environ:
        return train_rank(sys.argv[1])
    console = Console()
    agree = [demonstrate(name, console) for name in SETTINGS]
    if not all(agree):
        console.print("[red]the loss curves differ")
        sys.exit(1)


if __name__ == "__main__":
    main()
