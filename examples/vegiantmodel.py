"""Trains GPT, BERT or T5 with the arguments of veGiantModel's `pretrain_gpt2.py`, in 2-way model x 2-way pipeline
parallelism unless told otherwise.

    python examples/vegiantmodel.py --compare               a small GPT on 4 ranks, and the same in plain PyTorch
    python examples/vegiantmodel.py --model t5 --partition_method uniform
    torchrun --nproc-per-node 8 examples/vegiantmodel.py --num-layers 24 --hidden-size 1024 ...
    python examples/vegiantmodel.py --plan 8:v100-32gb --num-layers 24 --hidden-size 1024 ...     only the plan

`GPT` is a model of a user: it has no line for autopart. Without torchrun the script starts one process for each rank.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from text import batches
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration, logging

import autopart
from autopart.runtime.launch import launch

Batch = dict[str, Tensor]
NO_EFFECT = {
    "distributed-backend": "nccl on GPUs, gloo on CPUs",
    "DDP-impl": "gradients are summed by the emitted program",
    "config_param": "DeepSpeed's settings are arguments of autopart.compile",
    "vocab-file": "text is trained as bytes",
    "merge-file": "text is trained as bytes",
    "data-impl": "text is trained as bytes",
    "split": "all text is trained on",
}
FLAGS_NO_EFFECT = ("deepspeed", "deepspeed-pipeline", "eod-mask-loss", "checkpoint-activations")
MASKED, SEED = 0.15, 1234

logging.set_verbosity_error()


class PositionWiseFeedForward(nn.Module):
    """Linear, activation, dropout, linear: (samples, tokens, width) -> the same."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dropout(F.gelu(self.fc1(x))))


class Attention(nn.Module):
    """Causal attention: (samples, tokens, width) -> the same."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.p = heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        p = self.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class TransformerLayer(nn.Module):
    """A layer of GPT-2: norms before attention and before the feed-forward network."""

    def __init__(self, width: int, heads: int, hidden_dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, attention_dropout)
        self.ffn = PositionWiseFeedForward(width, hidden_dropout)
        self.dropout1, self.dropout2 = nn.Dropout(hidden_dropout), nn.Dropout(hidden_dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout1(self.attention(self.norm1(x)))
        return x + self.dropout2(self.ffn(self.norm2(x)))


class Embedding(nn.Module):
    """Tokens (samples, tokens) -> states (samples, tokens, width), with learned positions."""

    def __init__(self, vocabulary: int, tokens: int, width: int, dropout: float) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(tokens, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.dropout(self.words(input_ids) + self.positions(places))


class GPT(nn.Module):
    """Tokens and labels of shape (samples, tokens) -> the loss. The head's weight is that of the embedding."""

    def __init__(self, a: argparse.Namespace) -> None:
        super().__init__()
        d, dropouts = a.hidden_size, (a.hidden_dropout, a.attention_dropout)
        self.embedding = Embedding(a.vocab_size, a.max_position_embeddings, d, a.hidden_dropout)
        self.layers = nn.ModuleList(TransformerLayer(d, a.num_attention_heads, *dropouts) for _ in range(a.num_layers))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, a.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                last = name.endswith(("out.weight", "fc2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * a.num_layers if last else 1))
        self.head.weight = self.embedding.words.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def bert(a: argparse.Namespace) -> nn.Module:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=a.vocab_size, hidden_size=a.hidden_size, num_hidden_layers=a.num_layers,
            num_attention_heads=a.num_attention_heads, intermediate_size=4 * a.hidden_size,
            max_position_embeddings=a.max_position_embeddings, hidden_dropout_prob=a.hidden_dropout,
            attention_probs_dropout_prob=a.attention_dropout,
        )
    )  # fmt: skip


def t5(a: argparse.Namespace) -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=a.vocab_size, d_model=a.hidden_size, num_layers=a.num_layers, num_heads=a.num_attention_heads,
            d_kv=a.hidden_size // a.num_attention_heads, d_ff=4 * a.hidden_size, dropout_rate=a.hidden_dropout,
            decoder_start_token_id=0, use_cache=False,
        )
    )  # fmt: skip


MODELS = {"gpt": GPT, "bert": bert, "t5": t5}


def arguments(given: list[str]) -> argparse.Namespace:
    """veGiantModel's arguments that mean something here; those of NO_EFFECT are taken and left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=MODELS, default="gpt")
    add("--plan", metavar="MESH", help="print the plan for a mesh, such as 8:v100-32gb, and train nothing")
    add("--mesh", help="the devices, one for each process; default: CPUs")
    add("--compare", action="store_true", help="train in plain PyTorch too; end with 1 where a loss differs")
    numbers = {
        "model-parallel-size": 2, "num-stages": 2, "num-layers": 4, "hidden-size": 64, "num-attention-heads": 4,
        "vocab-size": 256, "seq-length": 32, "max-position-embeddings": 1024, "batch-size": 2, "train-batch-size": 0,
        "gradient_accumulation_steps": 2, "train-iters": 5, "lr-decay-iters": 0, "save-interval": 0, "log-interval": 1,
        "seed": SEED,
    }  # fmt: skip
    for name, number in numbers.items():
        add(f"--{name}", type=int, default=number)
    for name, rate in {"lr": 2.5e-4, "min-lr": 1e-5, "weight-decay": 1e-2, "clip-grad": 1.0, "warmup": 0.02}.items():
        add(f"--{name}", type=float, default=rate)
    for name in ("hidden-dropout", "attention-dropout"):
        add(f"--{name}", type=float, default=0.0)
    add("--lr-decay-style", choices=["constant", "linear", "cosine"], default="cosine")
    add("--partition_method", default="parameters", help="uniform, parameters, type:REGEX, manual:LAYERS:BOUNDARIES")
    add("--fp16", action="store_true", help="parameters in float16 with float32 master copies and loss scaling")
    add("--data-path", type=Path, help="a file, trained as bytes; default: Python's standard library")
    add("--save", type=Path, help="a folder of checkpoints")
    add("--load", type=Path, help="such a folder, or a state dict of the whole model: each rank takes its shares")
    for name in NO_EFFECT:
        add(f"--{name}", help=f"no effect: {NO_EFFECT[name]}")
    for name in FLAGS_NO_EFFECT:
        add(f"--{name}", action="store_true", help="no effect: autopart plans it")
    a = parser.parse_args(given)
    if a.compare and a.fp16:
        parser.error("--compare is of float32")
    return a


def settings(a: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """veGiantModel's arguments as those of `autopart.compile`."""
    data = ranks // (a.num_stages * a.model_parallel_size)
    precision = {"precision": "float16", "master": "float32"} if a.fp16 else {}
    return {
        "pp": a.num_stages, "tp": a.model_parallel_size, "dp": data, "zero": 0, "schedule": "1f1b",
        "micro_batch": a.batch_size * data, "constraints": [f"cuts={a.partition_method}"], **precision,
    }  # fmt: skip


def samples(a: argparse.Namespace, ranks: int) -> int:
    """Samples of a step: veGiantModel's train-batch-size, or micro-batches x their size x data-parallel ranks."""
    data = ranks // (a.num_stages * a.model_parallel_size)
    return a.train_batch_size or a.batch_size * a.gradient_accumulation_steps * data


def data(a: argparse.Namespace, ranks: int) -> list[Batch]:
    """The batches of every step, the same on all ranks."""
    found = list(batches(samples(a, ranks), a.seq_length, a.train_iters, a.seed, a.data_path))
    if a.model == "bert":
        generator = torch.Generator().manual_seed(a.seed)
        for batch in found:
            hidden = torch.rand(batch["labels"].shape, generator=generator) < MASKED
            batch["labels"] = batch["labels"].masked_fill(~hidden, -100)
            batch["input_ids"] = batch["input_ids"].masked_fill(hidden, 0)
    return found


def build(a: argparse.Namespace) -> nn.Module:
    torch.manual_seed(a.seed)
    return MODELS[a.model](a).train()


def optimizer_of(model: nn.Module, a: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW that decays matrices alone."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=a.lr, weight_decay=a.weight_decay)


def schedule_of(optimizer: torch.optim.Optimizer, a: argparse.Namespace) -> torch.optim.lr_scheduler.LRScheduler:
    """A linear warm-up over `warmup` of the steps, then a decay to `min-lr`."""
    steps = max(1, a.lr_decay_iters or a.train_iters)
    warm, least = a.warmup * steps, a.min_lr / a.lr

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        done = min(1.0, (step - warm) / max(1.0, steps - warm))
        left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[a.lr_decay_style]
        return least + (1 - least) * left

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train(a: argparse.Namespace) -> None:
    """What each rank does."""
    ranks = int(os.environ["WORLD_SIZE"])
    model, found = build(a), data(a, ranks)
    compiled = autopart.compile(model, a.mesh or f"{ranks}:cpu", found[0], **settings(a, ranks))
    optimizer = compiled.optimizer(optimizer_of(model, a))
    scheduler = schedule_of(optimizer, a)
    done = 0
    if a.load and a.load.is_file():
        compiled.load_state_dict(torch.load(a.load, mmap=True, weights_only=True) if compiled.rank == 0 else {})
    elif a.load and any(a.load.glob("step-*")):
        done = compiled.load(a.load, scheduler=scheduler)["done"]
    if compiled.rank == 0:
        print(compiled.plan, compiled.mesh, sep="\n", flush=True)
    losses = []
    for step in range(done, a.train_iters):
        losses.append(float(compiled.step(found[step], clip_grad_norm=a.clip_grad)))
        scheduler.step()
        if compiled.rank == 0 and (step + 1) % a.log_interval == 0:
            print(f"step {step + 1}: loss {losses[-1]:.6f}", flush=True)
        if a.save and (step + 1 == a.train_iters or (a.save_interval and (step + 1) % a.save_interval == 0)):
            compiled.save(a.save, scheduler=scheduler, extra={"done": step + 1})
    off = 0.0
    if a.compare and compiled.rank == 0:
        off = max(abs(x - y) for x, y in zip(losses, alone(model, found, a)[done:], strict=True))
        print(f"the losses differ from those of one process by at most {off:.1e}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(off > 1e-4)


def alone(model: nn.Module, found: list[Batch], a: argparse.Namespace) -> list[float]:
    """The same training in plain PyTorch: the losses. The model that was compiled still has its first weights."""
    if a.load and a.load.is_file():
        model.load_state_dict(torch.load(a.load, weights_only=True))
    optimizer, losses = optimizer_of(model, a), []
    scheduler = schedule_of(optimizer, a)
    for batch in found:
        optimizer.zero_grad()
        output = model(**batch)
        loss = output if isinstance(output, Tensor) else output.loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), a.clip_grad)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def main(given: list[str]) -> None:
    a = arguments(given)
    if a.plan:
        with torch.device("meta"):
            model = build(a)
        ranks = autopart.Mesh.of(a.plan).size
        batch = {name: torch.zeros(2, a.seq_length, dtype=torch.long) for name in ("input_ids", "labels")}
        print(autopart.plan(model, a.plan, batch, global_batch=samples(a, ranks), **settings(a, ranks)))
    elif "RANK" in os.environ:
        train(a)
    else:
        sys.exit(launch([sys.executable, __file__, *given], a.num_stages * a.model_parallel_size))


if __name__ == "__main__":
    main(sys.argv[1:])
