"""Trains BLOOM in 3D parallelism with ZeRO 1 and recompute, as PipeGoose's example does in two dims.

    python examples/pipegoose.py --compare                   a small BLOOM on 8 ranks: tp=2, pp=2, dp=2; and on one
    torchrun --nproc-per-node 8 examples/pipegoose.py --mesh 8:a100-80gb --weights bloom-560m --precision bfloat16
    python examples/pipegoose.py --plan 8:a100-80gb          the plan of BLOOM-560m

`--weights` is a folder as transformers writes it: config, weights in safetensors, and tokenizer. Each rank reads its
own shares of the weights. The model has no line for autopart.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from text import VOCABULARY, batches
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BloomConfig, logging

import autopart
from autopart.runtime.launch import launch

SIZES = {
    "560m": BloomConfig(hidden_size=1024, n_layer=24, n_head=16, vocab_size=250880, use_cache=False),
    "small": BloomConfig(hidden_size=64, n_layer=4, n_head=4, vocab_size=VOCABULARY, use_cache=False),
}
PARALLEL = {"tp": 2, "pp": 2, "dp": 2, "zero": 1}

logging.set_verbosity_error()


class Seconds(autopart.Callback):
    """Counts forward, backward and recompute by micro-batch, as this rank's stage runs them, and adds up seconds."""

    def __init__(self) -> None:
        self.begun: Counter[tuple[str, int]] = Counter()
        self.seconds: Counter[str] = Counter()

    def before(self, event: autopart.Event) -> None:
        self.begun[event.op, event.micro_batch] += 1

    def after(self, event: autopart.Event, seconds: float) -> None:
        self.seconds[event.op] += seconds  # type: ignore[assignment]

    def __str__(self) -> str:
        shown = ("forward", "recompute", "backward")
        times = {op: sum(n for (name, _), n in self.begun.items() if name == op) for op in shown}
        return ", ".join(f"{op} {times[op]} x in {self.seconds[op]:.2f} s" for op in shown)


def build(a: argparse.Namespace) -> nn.Module:
    """The model in training mode: on meta where its weights lie in a folder."""
    if not a.weights:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(SIZES[a.size]).train()
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(a.weights)).train()


def data(a: argparse.Namespace) -> list[dict[str, Tensor]]:
    """The batches of every step, the same on all ranks: bytes, or the tokens of a folder's tokenizer."""
    found = list(batches(a.batch_size, a.sequence, a.steps, seed=42))
    if not a.weights:
        return found
    tokenizer = AutoTokenizer.from_pretrained(a.weights)
    texts = [[bytes(row.tolist()).decode(errors="replace") for row in batch["input_ids"]] for batch in found]
    settings = {"padding": "max_length", "truncation": True, "max_length": a.sequence, "return_tensors": "pt"}
    tokens = [dict(tokenizer(text, **settings)) for text in texts]
    return [{**t, "labels": t["input_ids"].masked_fill(t["attention_mask"] == 0, -100)} for t in tokens]


def settings(a: argparse.Namespace) -> dict[str, Any]:
    master = {} if a.precision == "float32" else {"master": "float32"}
    return {
        **PARALLEL, "micro_batch": a.batch_size // 2, "recompute": a.recompute, "precision": a.precision, **master,
        "optimizer": "sgd", "constraints": [f"cuts={a.partition}"],
    }  # fmt: skip


def train(a: argparse.Namespace) -> None:
    """What each rank does."""
    ranks = int(os.environ["WORLD_SIZE"])
    model, found = build(a), data(a)
    weights = {"weights": str(a.weights)} if a.weights else {}
    compiled = autopart.compile(model, a.mesh or f"{ranks}:cpu", found[0], **settings(a), **weights)
    compiled.optimizer(torch.optim.SGD(model.parameters(), lr=a.lr))
    seconds = Seconds()
    compiled.callbacks.append(seconds)
    losses = []
    for step, batch in enumerate(found):
        losses.append(float(compiled.step(batch)))
        if compiled.rank == 0:
            print(f"step {step + 1}: loss {losses[-1]:.6f}", flush=True)
    off = 0.0
    for told in compiled.groups.host.gather(f"{compiled.mesh}: {seconds}"):
        if compiled.rank == 0:
            print(told)
    if a.compare and compiled.rank == 0:
        off = max(abs(x - y) for x, y in zip(losses, alone(model, found, a.lr), strict=True))
        print(f"the losses differ from those of one process by at most {off:.1e}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(off > 1e-4)


def alone(model: nn.Module, found: list[dict[str, Tensor]], lr: float) -> list[float]:
    """The same training in plain PyTorch: the losses. The model that was compiled still has its first weights."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=lr), []
    for batch in found:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def arguments(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--plan", metavar="MESH", help="print the plan of BLOOM-560m for a mesh of 8, and train nothing")
    add("--mesh", help="the devices, one for each process; default: CPUs")
    add("--size", choices=SIZES, default="small")
    add("--weights", type=Path, help="a folder of a model that transformers wrote, in place of --size")
    add("--compare", action="store_true", help="train in plain PyTorch too; end with 1 where a loss differs")
    add("--partition", choices=["time", "memory", "parameters", "uniform"], default="time", help="how stages are cut")
    add("--recompute", choices=["none", "selective", "mincut", "full"], default="full")
    add("--precision", choices=["float32", "bfloat16", "float16"], default="float32")
    add("--batch-size", type=int, default=8)
    add("--sequence", type=int, default=32)
    add("--steps", type=int, default=3)
    add("--lr", type=float, default=1e-1)
    a = parser.parse_args(given)
    if a.compare and (a.weights or a.precision != "float32"):
        parser.error("--compare is of float32 and of random weights")
    return a


def main(given: list[str]) -> None:
    a = arguments(given)
    if a.plan:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(SIZES["560m"]).train()
        tokens = torch.zeros(2, 1024, dtype=torch.long)
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
        print(autopart.plan(model, a.plan, batch, global_batch=a.batch_size, **settings(a)))
    elif "RANK" in os.environ:
        train(a)
    else:
        sys.exit(launch([sys.executable, __file__, *given], 8))


if __name__ == "__main__":
    main(sys.argv[1:])
