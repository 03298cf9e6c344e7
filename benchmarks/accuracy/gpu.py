"""The cost model against this machine's GPUs: predicted and measured seconds and bytes of many configurations.

Every configuration is planned for the GPUs that are here, run as the plan's own emitted code in processes of its own,
and held against the plan: the median seconds of a step (forward, backward and gradient sync, which is what a plan
prices: the optimizer's are shown beside it), and torch.cuda.max_memory_allocated over steps with AdamW, the states
being there. An error is predicted / measured - 1; bytes are those of the fullest rank. Its first loss is held against
the unmodified model's in one process. Configurations that need more GPUs than there are, are named and left out.

`--dry` runs tiny versions of the same configurations on the CPU, from planning to an optimizer step, to see that all of
them work. Nothing is timed then, and nothing is said about the cost model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import autopart
from autopart import PartitionError, Plan
from autopart.cli import models as models
from autopart.frontend.batch import DTYPES
from autopart.hardware.cuda import of_cuda
from autopart.runtime.launch import launch
from benchmarks.support.command import command_line

WARM_UP, STEPS = 3, 10
"""Steps before those that are timed, and these."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}
"""By how much the first loss may differ, relatively, from the unmodified model's."""

NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
TINY_BERT = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}


@dataclass(frozen=True)
class Model:
    """What `models.load` calls it, or the config that it is; and the config of its tiny version."""

    spec: str | Mapping[str, Any]
    tiny: Mapping[str, Any]


MODELS: Mapping[str, Model] = {
    "gpt2": Model("gpt2", {"model_type": "gpt2", "n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": 96}),
    "gpt2-large": Model(
        "gpt2-large", {"model_type": "gpt2", "n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 96}
    ),
    "llama-1b": Model(
        # The sizes of Llama 3.2 1B, with a head of its own.
        {
            "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
        },
        {
            "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 64,
            "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 96, "max_position_embeddings": 64,
        },
    ),
    "bert-large": Model("bert-large", {"model_type": "bert", "vocab_size": 96, **TINY_BERT}),
    "t5-large": Model(
        "t5-large",
        {"model_type": "t5", "d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 96,
         "decoder_start_token_id": 0},
    ),
    "vit-large": Model("vit-large", {"model_type": "vit", "image_size": 32, "patch_size": 8, **TINY_BERT}),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One configuration: `samples` of a step of `sequence` tokens (None: images), and settings of `autopart.plan`."""

    model: str
    samples: int
    sequence: int | None
    precision: str = "bfloat16"
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """All of it in one line."""
        size = f"{self.samples}x{self.sequence}" if self.sequence else str(self.samples)
        return " ".join([self.model, size, self.precision, *(f"{k}={v}" for k, v in self.settings.items())])

    @property
    def devices(self) -> int:
        """How many it needs."""
        return math.prod(self.settings.get(axis, 1) for axis in ("pp", "dp", "tp"))

    @property
    def given(self) -> dict[str, Any]:
        """The settings, with what the planner would else choose fixed: what is measured is the model of costs."""
        usual = {"pp": 1, "dp": 1, "tp": 1, "zero": 0, "recompute": "none", "micro_batch": self.samples}
        return {**usual, "precision": self.precision, "optimizer": "adamw", **self.settings}


def rows() -> Iterator[Row]:
    """Everything that is measured."""
    for precision in ("bfloat16", "float32"):
        for recompute in ("none", "selective", "full"):
            yield Row("gpt2", 8, 1024, precision, {"recompute": recompute})
    yield Row("gpt2", 8, 1024, "float16")
    for samples in (1, 4, 16, 32):
        yield Row("gpt2", samples, 1024)
    for samples, sequence in ((64, 128), (32, 256), (16, 512)):
        yield Row("gpt2", samples, sequence)
    for samples, micro_batch in ((8, 2), (16, 4)):
        yield Row("gpt2", samples, 1024, settings={"micro_batch": micro_batch})
    for recompute in ("none", "selective", "full"):
        yield Row("gpt2-large", 8, 1024, settings={"recompute": recompute})
        yield Row("llama-1b", 4, 2048, settings={"recompute": recompute})
    yield Row("llama-1b", 1, 8192)
    yield Row("llama-1b", 2, 4096)
    yield Row("llama-1b", 8, 1024)
    yield Row("llama-1b", 2, 2048, "float32")
    yield Row("llama-1b", 8, 2048, settings={"micro_batch": 2, "recompute": "selective"})
    for recompute in ("none", "full"):
        yield Row("bert-large", 16, 512, settings={"recompute": recompute})
        yield Row("vit-large", 32, None, settings={"recompute": recompute})
    yield Row("t5-large", 8, 512)
    for degrees in MESHES:
        yield Row("gpt2-large", 16, 1024, settings={"micro_batch": 4 if "pp" in degrees else 16, **degrees})
    for zero in (1, 2, 3):
        yield Row("llama-1b", 8, 2048, settings={"dp": 2, "zero": zero})
        yield Row("llama-1b", 8, 2048, settings={"dp": 4, "zero": zero, "recompute": "full"})


MESHES: Sequence[Mapping[str, Any]] = (
    {"dp": 2}, {"dp": 2, "zero": 1}, {"dp": 2, "zero": 3}, {"tp": 2}, {"pp": 2}, {"pp": 2, "schedule": "gpipe"},
    {"dp": 4}, {"tp": 4}, {"pp": 4}, {"dp": 2, "tp": 2}, {"dp": 2, "pp": 2},
    {"dp": 8, "zero": 1}, {"tp": 8}, {"pp": 2, "dp": 2, "tp": 2},
)  # fmt: skip


def build(row: Row, dry: bool, meta: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The model and its batch on the CPU, or on meta."""
    model, sequence = MODELS[row.model], row.sequence
    spec = model.tiny if dry else model.spec
    if dry and sequence:
        sequence = 16
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        if not isinstance(spec, str):
            (Path(folder) / "config.json").write_text(json.dumps({**NO_DROPOUT, **spec}))
            spec = folder
        made, batch = models.load(spec, row.samples, sequence, meta, dropout=False)
    dtype = DTYPES[row.precision]
    return made, {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def plan_of(row: Row, dry: bool, device: str) -> Plan:
    """The plan of a row on so many such devices, whether it fits or not."""
    model, batch = build(row, dry, meta=True)
    return autopart.estimate(model, f"{row.devices}:{device}", batch, **row.given).plan


def measure(row: Row, plan: Plan, dry: bool) -> dict[str, Any]:
    """What this rank of a plan takes: bytes, and seconds unless `dry`; and the first loss with the model's own."""
    device = torch.device("cpu") if dry else torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    model, batch = build(row, dry, meta=False)
    model.train()
    reference = reference_loss(model, batch, plan, device)
    batch = {k: v.to(device) for k, v in batch.items()}
    compiled = autopart.compile(model, plan.mesh, batch, plan=plan)
    found: dict[str, Any] = {"reference_loss": reference, "loss": float(compiled.step(batch))}
    seconds = [] if dry else timed(compiled, batch)
    compiled.optimizer(torch.optim.AdamW, lr=1e-3)
    compiled.step(batch)
    found["trained_loss"] = float(compiled.step(batch))
    if dry:
        return found
    torch.cuda.reset_peak_memory_stats()
    updated = timed(compiled, batch)
    return {
        **found,
        "stage": compiled.executor.index,
        "seconds": seconds,
        "seconds_with_optimizer": updated,
        "bytes": torch.cuda.max_memory_allocated(),
    }


def reference_loss(model: nn.Module, batch: Mapping[str, Tensor], plan: Plan, device: torch.device) -> float:
    """The unmodified model's loss of the whole batch, by micro-batches, its parameters in the plan's precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[plan.precision])
    alone, losses = model.to(device), []
    with torch.no_grad():
        for start in range(0, plan.global_batch, plan.micro_batch):
            share = {k: v[start : start + plan.micro_batch].to(device) for k, v in batch.items()}
            losses.append(float(alone(**share).loss))
    model.to("cpu")
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return statistics.fmean(losses)


def timed(compiled: autopart.Compiled, batch: Mapping[str, Tensor]) -> list[float]:
    """Seconds of every step, after some that do not count, all ranks starting together."""
    seconds = []
    for number in range(WARM_UP + STEPS):
        if dist.is_initialized():
            dist.barrier()
        torch.cuda.synchronize()
        started = time.perf_counter()
        compiled.step(batch)
        torch.cuda.synchronize()
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - started)
    return seconds


def be_a_rank(row: Row, plan: Plan, dry: bool, into: Path) -> None:
    """Measure, and write what every rank found, or that one had too little memory."""
    try:
        found = measure(row, plan, dry)
    except torch.cuda.OutOfMemoryError as error:
        into.write_text(json.dumps({"status": "out of memory", "why": str(error).splitlines()[0]}))
        sys.exit(1)
    everyone: list[Any] = [found]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
    if int(os.environ.get("RANK", "0")) == 0:
        into.write_text(json.dumps({"status": "ok", "ranks": everyone}))
    if dist.is_initialized():
        dist.destroy_process_group()


def run(row: Row, dry: bool, device: str) -> dict[str, Any]:
    """Plan a row, run it in processes of its own, and compare."""
    record: dict[str, Any] = {"name": row.name, "devices": row.devices, **row.given}
    try:
        plan = plan_of(row, dry, device)
    except PartitionError as error:
        return {**record, "status": f"no plan: {error.what} ({error.why})"}
    with TemporaryDirectory() as folder:
        file, into = Path(folder) / "plan.json", Path(folder) / "found.json"
        plan.save(file)
        line = [
            sys.executable,
            "-m",
            __spec__.name,
            "--rank-of",
            row.name,
            str(file),
            str(into),
            *(["--dry"] if dry else []),
        ]
        environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if dry else {})}
        status = launch(line, row.devices, environment)
        found = json.loads(into.read_text()) if into.exists() else {"status": f"failed, exit status {status}"}
    return {**record, **compared(row, plan, found, dry)}


def compared(row: Row, plan: Plan, found: Mapping[str, Any], dry: bool) -> dict[str, Any]:
    """A row's predicted and measured numbers, and how far they are apart."""
    predicted: dict[str, Any] = {"fits": plan.fits}
    if not dry:
        predicted |= {"predicted_seconds": plan.step_seconds, "predicted_bytes": plan.memory_bytes}
    if found["status"] != "ok":
        return {**predicted, **found}
    ranks = found["ranks"]
    loss, reference = ranks[0]["loss"], ranks[0]["reference_loss"]
    off = abs(loss - reference) / max(abs(reference), 1e-30)
    status = "ok" if off <= TOLERANCE[row.precision] else f"the loss is {loss:.6g}, the model's {reference:.6g}"
    told = {**predicted, "status": status, "loss": loss, "loss_error": off, "trained_loss": ranks[0]["trained_loss"]}
    if dry:
        return told
    steps = {kind: [max(each) for each in zip(*(r[kind] for r in ranks), strict=True)] for kind in
             ("seconds", "seconds_with_optimizer")}  # fmt: skip
    seconds = statistics.median(steps["seconds"])
    held = [max(r["bytes"] for r in ranks if r["stage"] == stage) for stage in range(plan.pp)]
    return {
        **told,
        "measured_seconds": seconds,
        "measured_seconds_with_optimizer": statistics.median(steps["seconds_with_optimizer"]),
        "seconds_error": plan.step_seconds / seconds - 1,
        "measured_bytes": held,
        "bytes_error": max(plan.memory_bytes) / max(held) - 1,
        "steps": steps,
    }


def table(records: Sequence[Mapping[str, Any]], dry: bool) -> Table:
    """A line a configuration."""
    names = ("predicted ms", "measured ms", "error", "with AdamW", "predicted GiB", "measured GiB", "error")
    made = Table("configuration", *(() if dry else names), "loss is off by", "status")
    for r in records:
        cells = []
        if not dry:
            cells = [
                cell(r, "predicted_seconds", lambda v: f"{v * 1e3:.1f}"),
                cell(r, "measured_seconds", lambda v: f"{v * 1e3:.1f}"),
                cell(r, "seconds_error", lambda v: f"{v:+.1%}"),
                cell(r, "measured_seconds_with_optimizer", lambda v: f"{v * 1e3:.1f}"),
                cell(r, "predicted_bytes", lambda v: f"{max(v) / 2**30:.2f}"),
                cell(r, "measured_bytes", lambda v: f"{max(v) / 2**30:.2f}"),
                cell(r, "bytes_error", lambda v: f"{v:+.1%}"),
            ]
        misfit = "" if r.get("fits", True) else ", said not to fit"
        made.add_row(r["name"], *cells, cell(r, "loss_error", lambda v: f"{v:.1e}"), r["status"] + misfit)
    return made


def cell(record: Mapping[str, Any], key: str, text: Any) -> str:
    """A cell; empty for what is not known."""
    return str(text(record[key])) if key in record else ""


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and median of absolute errors, and the mean of signed ones."""
    found: dict[str, Any] = {}
    for kind in ("seconds_error", "bytes_error"):
        errors = [r[kind] for r in records if kind in r]
        absolute = [abs(e) for e in errors]
        if errors:
            found[kind] = {
                "rows": len(errors),
                "mean": statistics.fmean(absolute),
                "median": statistics.median(absolute),
                "mean_signed": statistics.fmean(errors),
            }
    return found


def here() -> tuple[str, int]:
    """The row of hardware that this machine's GPUs are, and how many there are."""
    properties = torch.cuda.get_device_properties(0)
    return of_cuda(properties.name, properties.total_memory).name, torch.cuda.device_count()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the configurations asked for; the exit status is 1 where one failed, trained something else, or lacked
    memory though it was said to fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny versions on the CPU; nothing is timed")
    parser.add_argument("--only", metavar="TEXT", nargs="+", default=[""], help="configurations with a TEXT in them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--rank-of", nargs=3, metavar=("NAME", "PLAN", "INTO"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rank_of:
        name, plan, into = options.rank_of
        be_a_rank(next(r for r in rows() if r.name == name), Plan.load(plan), options.dry, Path(into))
        return 0
    if not options.dry and not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device, and torch finds none; --dry runs tiny versions on the CPU")
    device, count = ("cpu", math.inf) if options.dry else here()
    console = Console(width=None if sys.stdout.isatty() else 200)
    asked = [row for row in rows() if any(text in row.name for text in options.only)]
    records = []
    for row in (row for row in asked if row.devices <= count):
        records.append(run(row, options.dry, device))
        console.print(f"{row.name}: {records[-1]['status']}", markup=False, highlight=False)
    console.print(table(records, options.dry))
    for row in (row for row in asked if row.devices > count):
        console.print(f"left out: {row.name} needs {row.devices} GPUs", markup=False, highlight=False)
    scores = summary(records)
    for kind, score in scores.items():
        console.print(f"{kind}: " + ", ".join(f"{k} {v if k == 'rows' else f'{v:+.1%}'}" for k, v in score.items()))
    if options.json:
        versions = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "command": command_line(__spec__.name),
        }
        where = {"device": device, "dry": options.dry}
        if not options.dry:
            where |= {"gpu": torch.cuda.get_device_name(), "gpus": count}
        data = {**versions, **where, "summary": scores, "rows": records}
        options.json.write_text(json.dumps(data, indent=1) + "\n")
    return 0 if all(r["status"] == "ok" or (r["status"] == "out of memory" and not r["fits"]) for r in records) else 1


if __name__ == "__main__":
    sys.exit(main())
