"""What benchmarks on real ranks share: small models, a profile of this machine, steps timed in turns.

Rows take turns, a step each, round after round, so that whatever else the machine does falls on all alike; a step's
time is that of the slowest rank, and a row's the median over rounds. Beside every round a yardstick is timed, a product
that the profile knows: how much faster or slower the machine is than when it was calibrated.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import autopart
from autopart.compile.programs import programs
from autopart.passes.source import Source
from autopart.planner.make_plan import make_plan, request_of
from autopart.runtime.calibrate import calibrate
from autopart.runtime.compiled import Compiled
from autopart.runtime.groups import make_groups
from autopart.runtime.launch import launch

WORDS = 4096
YARDSTICK = (1024, 256, 1024)
"""m, n and k of a product of the sweep."""


class Mlp(nn.Module):
    """Equal layers with a residual, and a mean squared error."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(layers)
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of samples x, y of (batch, width)."""
        for layer in self.layers:
            x = x + layer(x)
        return nn.functional.mse_loss(x, y)


Made = tuple[nn.Module, dict[str, Tensor]]


def make_gpt2(width: int, layers: int, sequence: int, batch: int) -> Made:
    """GPT-2 without dropout, and a batch."""
    config = GPT2Config(
        vocab_size=WORDS, n_positions=sequence, n_embd=width, n_layer=layers, n_head=width // 64, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config), _tokens(batch, sequence)


def make_llama(width: int, layers: int, sequence: int, batch: int) -> Made:
    """Llama, and a batch."""
    config = LlamaConfig(
        vocab_size=WORDS, max_position_embeddings=sequence, hidden_size=width, num_hidden_layers=layers,
        intermediate_size=-(-width * 8 // (3 * 64)) * 64, num_attention_heads=width // 64,
        num_key_value_heads=width // 64, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config), _tokens(batch, sequence)


def make_mlp(width: int, layers: int, sequence: int, batch: int) -> Made:
    """Plain layers, and a batch of `sequence` times `batch` samples."""
    x = torch.randn(batch * sequence, width, generator=torch.Generator().manual_seed(0))
    return Mlp(width, layers), {"x": x, "y": x.roll(1, 0)}


def _tokens(batch: int, sequence: int) -> dict[str, Tensor]:
    tokens = torch.randint(WORDS, (batch, sequence), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "labels": tokens.clone()}


MODELS: Mapping[str, Callable[[int, int, int, int], Made]] = {"gpt2": make_gpt2, "llama": make_llama, "mlp": make_mlp}


@dataclass(frozen=True)
class Job:
    """A model of `sizes` (width, layers, sequence, batch) and the settings it is planned with."""

    model: str
    sizes: tuple[int, int, int, int]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> Made:
        """The model with the same weights everywhere, and its batch."""
        torch.manual_seed(0)
        model, batch = MODELS[self.model](*self.sizes)
        return model.train(), batch

    @property
    def name(self) -> str:
        """The job in words."""
        width, layers, sequence, batch = self.sizes
        asked = " ".join(f"{key}={value}" for key, value in self.settings.items()) or "planned"
        return f"{self.model} {layers}x{width}, batch {batch}x{sequence}: {asked}"


def profiled(ranks: int, file: Path, rounds: int) -> str:
    """Calibrate so many CPU ranks into a file; the mesh."""
    name = calibrate(f"{ranks}:cpu", file, rounds=rounds)
    return f"{ranks}:{name}"


def on_ranks(module: str, ranks: int, arguments: Sequence[str]) -> None:
    """Run a module as so many ranks; ends this process where they fail."""
    status = launch([sys.executable, "-m", module, *arguments], ranks)
    if status:
        sys.exit(status)


def parsed(parser: argparse.ArgumentParser, known: Sequence[int], steps: int, results: Path) -> argparse.Namespace:
    """The options that such benchmarks share, with what `parser` has already; `known` numbers of ranks."""
    parser.add_argument("--ranks", type=int, nargs="+", choices=known, default=list(known))
    parser.add_argument("--steps", type=int, default=steps, help="that count, of every row")
    parser.add_argument("--rounds", type=int, default=2, help="of the calibration")
    parser.add_argument("--profile", type=Path, help="of an earlier calibration, instead of one now")
    parser.add_argument("--json", type=Path, default=results, help="where results are kept")
    return parser.parse_args()


def on_all_ranks(module: str, options: argparse.Namespace, parts: Sequence[Sequence[str]] = ((),)) -> None:
    """Run a module as every number of ranks asked for, once with the arguments of every part, each time with a profile
    of its own where none is given: machines change."""
    for ranks, arguments in itertools.product(options.ranks, parts):
        with tempfile.TemporaryDirectory() as folder:
            file = options.profile or Path(folder) / "profile.toml"
            if not options.profile:
                profiled(ranks, file, options.rounds)
            given = ["--ranks", str(ranks), "--steps", str(options.steps), "--json", str(options.json)]
            on_ranks(module, ranks, [*given, "--profile", str(file), *arguments])


def begin() -> None:
    """Join the other ranks."""
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo")


def build(job: Job, mesh: autopart.Mesh, source: Source) -> Compiled:
    """`autopart.compile` of a model that may be traced already."""
    request = request_of(source.model, source.batch, optimizer="adamw", **job.settings)
    if request.micro_batch:
        source.full(request.micro_batch, mesh)
    box = [make_plan(source, mesh, request, to_run=True).to_json() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, 0)
    plan = autopart.Plan.from_json(box[0])
    layered = source.full(plan.micro_batch, mesh)
    groups = make_groups(plan.pp, plan.dp, plan.tp, plan.shard_size)
    (program,) = programs(layered, plan, [groups.pp.rank])
    model = copy.deepcopy(source.model)
    return Compiled(model, plan, groups, program, layered.traced.aliases, layered.traced.buffers)


Row = dict[str, Any]
Step = Callable[[], Any]


def time_jobs(jobs: Sequence[Job], mesh: autopart.Mesh, rounds: int) -> list[Row]:
    """Every job's plan, predicted and measured seconds; on every rank."""
    rows, steps = prepared(jobs, mesh)
    time_steps(rows, steps, mesh, rounds)
    return rows


def prepared(jobs: Sequence[Job], mesh: autopart.Mesh) -> tuple[list[Row], list[Step]]:
    """Every job's plan with predicted seconds, and its step; on every rank."""
    rows: list[Row] = []
    steps: list[Step] = []
    sources = {key: Source(*job.make(), torch.float32) for key, job in {(j.model, j.sizes): j for j in jobs}.items()}
    for job in jobs:
        compiled = build(job, mesh, sources[job.model, job.sizes])
        compiled.optimizer(torch.optim.AdamW, lr=1e-4)
        plan = compiled.plan
        degrees = f"pp={plan.pp} dp={plan.dp} tp={plan.tp} zero={plan.zero} recompute={plan.recompute}"
        told = f"{degrees} {plan.micro_batches}x{plan.micro_batch}"
        rows.append({"job": job.name, "plan": told, "predicted": plan.step_seconds, "ranks": mesh.size})
        steps.append(lambda c=compiled, b=sources[job.model, job.sizes].batch: c.step(b))
        if dist.get_rank() == 0:
            print(f"{job.name}: {told}", file=sys.stderr, flush=True)
    gc.collect()
    gc.freeze()
    return rows, steps


def time_steps(rows: Sequence[Row], steps: Sequence[Step], mesh: autopart.Mesh, rounds: int, warm_up: int = 2) -> None:
    """Put into every row what its step takes, the spread of that, and the machine's drift from the profile."""
    yards: list[float] = []
    times: list[list[float]] = [[] for _ in steps]
    for number in range(warm_up + rounds):
        yards.append(yardstick(mesh))
        for step, mine in zip(steps, times, strict=True):
            dist.barrier()
            started = time.perf_counter()
            step()
            taken = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            if number >= warm_up:
                mine.append(taken.item())
    drift = statistics.median(yards[warm_up:])
    for row, mine in zip(rows, times, strict=True):
        row |= {"measured": statistics.median(mine), "spread": (max(mine) - min(mine)) / statistics.median(mine)}
        row |= {"drift": drift, "seconds": [round(s, 5) for s in mine]}


def yardstick(mesh: autopart.Mesh) -> float:
    """How many times as long as the profile says the yardstick takes now, on all ranks at once."""
    assert mesh.device.measured is not None
    m, n, k = YARDSTICK
    known = next(row[3] for row in mesh.device.measured.products["float32"] if row[:3] == (m, n, k))
    x, w = torch.randn(m, k), torch.randn(k, n)
    dist.barrier()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.1:
        torch.mm(x, w)
        count += 1
    ratio = torch.tensor((time.perf_counter() - started) / count / known, dtype=torch.float64)
    dist.all_reduce(ratio)
    return ratio.item() / dist.get_world_size()


def merge(path: Path, rows: Sequence[Mapping[str, Any]], key: Sequence[str]) -> list[dict[str, Any]]:
    """Put rows into a file in the place of those with the same `key`; all that are there then."""
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    merged = {tuple(row[k] for k in key): row for row in [*known, *rows]}
    return list(merged.values())
