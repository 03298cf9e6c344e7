"""Measure this machine, plan two small models for it, train them as planned, and compare every step with one process.

One process in plain PyTorch has all cores as threads; N ranks have 1/N of them each.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from text import VOCABULARY, batches
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, logging

import autopart
from autopart.cli.training import write_folder
from autopart.runtime.launch import cores_here, launch

CORES = cores_here()
RANKS = 4 if CORES >= 4 else 2
SAMPLES, SEQUENCE, STEPS = 16, 128, 30
LR, WARM_UP = 3e-4, 10
TOLERANCE = 1e-5
FOLDER = Path("build/demo")

SETTINGS: dict[str, dict[str, int]] = {"gpt2": {"pp": 2, "micro_batch": 4}, "llama": {}}
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


def train(name: str, how: str) -> None:
    """One process, or one of the ranks; the first leaves every step's loss and seconds in the model's folder."""
    model, folder = build(name), FOLDER / name
    if how == "planned":
        plan = autopart.Plan.load(folder / "plan.json")
        compiled = autopart.compile(model, plan.mesh, next(data()), plan=plan)
        optimizer = compiled.optimizer(torch.optim.AdamW, lr=LR)
        step = compiled.step
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)

        def step(batch: dict[str, Tensor]) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(**batch).loss
            loss.backward()
            optimizer.step()
            return loss

    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARM_UP, total_iters=WARM_UP)
    losses, seconds = [], []
    for batch in data():
        started = time.perf_counter()
        losses.append(step(batch).item())
        seconds.append(time.perf_counter() - started)
        warm_up.step()
    if os.environ["RANK"] == "0":
        (folder / f"{how}.json").write_text(json.dumps({"losses": losses, "seconds": seconds}))
    if dist.is_initialized():
        dist.destroy_process_group()


def run(name: str, how: str, processes: int) -> tuple[list[float], float]:
    """The losses and the tokens per second, of the median step, of so many processes."""
    status = launch([sys.executable, __file__, name, how], processes)
    if status:
        sys.exit(status)
    result: dict[str, Any] = json.loads((FOLDER / name / f"{how}.json").read_text())
    return result["losses"], SAMPLES * SEQUENCE / median(result["seconds"])


def demonstrate(name: str, mesh: str, console: Console) -> tuple[float, str, list[Path]]:
    """Plan, emit, train, compare: the largest difference of a loss, how fast, and the emitted files."""
    console.rule(name)
    model, batch = build(name), next(data())
    with console.status("planning"):
        plan = autopart.plan(model, mesh, batch, **SETTINGS[name])
    console.print(str(plan), markup=False, highlight=False, soft_wrap=True)
    files = write_folder(model, batch, plan, FOLDER / name)
    with console.status(f"training with {RANKS} ranks"):
        losses, together = run(name, "planned", RANKS)
    with console.status("training with one process"):
        expected, alone = run(name, "alone", 1)
    console.print("\nstep     one process   as planned   difference")
    differences = [abs(a - b) for a, b in zip(expected, losses, strict=True)]
    for step in [0, *range(4, STEPS, 5)]:
        console.print(f"{step + 1:4} {expected[step]:15.6f} {losses[step]:12.6f} {differences[step]:12.1e}")
    how = "as asked" if SETTINGS[name] else "the planner's choice"
    fast = f"{name} ({plan.degrees}, {how}) {together:,.0f} to {alone:,.0f}, {together / alone:.2f}x"
    return max(differences), fast, files


def main() -> None:
    """Exit with 1 where a loss differs by more than the tolerance."""
    if "RANK" in os.environ:
        return train(*sys.argv[1:])
    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # threads wait some 30 us before they let others run
    console = Console(highlight=False)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with console.status(f"measuring {RANKS} ranks on {CORES} cores"):
        name = autopart.calibrate(f"{RANKS}:cpu", FOLDER / "hardware.toml", quick=True, rounds=1)
    mesh = f"{RANKS}:{name}"
    console.print(f"measured: the devices and links of {mesh} are in {FOLDER / 'hardware.toml'}", soft_wrap=True)
    os.environ["AUTOPART_HARDWARE"] = str(FOLDER / "hardware.toml")
    off, fast, files = zip(*(demonstrate(name, mesh, console) for name in SETTINGS), strict=True)
    console.rule()
    exact, threads = max(off) <= TOLERANCE, max(1, CORES // RANKS)
    lines = [
        f"{'exact' if exact else 'NOT EXACT'}: the losses of {STEPS} steps are off by at most {max(off):.1e} from one "
        f"process's in plain PyTorch (tolerance {TOLERANCE:.0e})",
        f"speed: tokens/s of {RANKS} ranks x {threads} thread{'s' * (threads > 1)} to those of one process x {CORES}: "
        + "; ".join(fast),
        f"code: {', '.join(str(first) for first, *_ in files)}; it trains by: {sys.executable} {FOLDER}/llama/run.py",
    ]
    console.print("\n".join(lines), soft_wrap=True)
    sys.exit(not exact)


if __name__ == "__main__":
    main()
