"""Time a training step under autopart and under PyTorch's own ways to train on several ranks.

Every system trains the same model from the same weights on the same batch with SGD, in the same processes. They take
turns, a step each, so that whatever else the machine does falls on all alike. A step is the forward and backward pass,
the optimizer, and the loss of the whole batch on every rank; all ranks start it together, and its time is that of the
slowest. A system whose losses are not those of the unmodified model on one process is marked "differs".
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import autopart
from autopart.runtime.launch import launch
from benchmarks.support.command import command_line

SEED = 0
RATE = 0.1
FIRST_TOLERANCE = 1e-4
LAST_TOLERANCE = 1e-3
"""By how much a loss may differ from the unmodified model's: at the first step, and after all of them."""

OWN = "autopart"
TIMEOUT = timedelta(seconds=120)

Step = Callable[[], Tensor]


class NotExpressibleError(Exception):
    """A system has no way to train this model."""


@dataclass(frozen=True)
class Setting:
    """What every system is given: the model on the CPU, the batch there and on the device, and where it runs."""

    options: argparse.Namespace
    model: nn.Module
    cpu_batch: dict[str, Tensor]
    batch: dict[str, Tensor]
    device: torch.device
    mesh: DeviceMesh
    autopart_mesh: autopart.Mesh

    @property
    def rank(self) -> int:
        """This process's rank."""
        return dist.get_rank()

    @property
    def size(self) -> int:
        """The number of ranks."""
        return dist.get_world_size()

    def copy_of_model(self) -> nn.Module:
        """The model on the device, for one system to train."""
        return copy.deepcopy(self.model).to(self.device).train()

    def share_of_batch(self) -> dict[str, Tensor]:
        """The samples of this rank where ranks split the batch."""
        return {name: tensor.chunk(self.size)[self.rank] for name, tensor in self.batch.items()}


@dataclass(frozen=True)
class System:
    """A way to train: `build` makes a step and says what was chosen; `like` is autopart's plan of the same kind."""

    build: Callable[[Setting], tuple[Step, str]]
    like: str = ""


def main() -> None:
    """Start the ranks, or be one."""
    options = parse(sys.argv[1:])
    if "RANK" in os.environ:
        run_rank(options)
        return
    devices = torch.cuda.device_count()
    if torch.cuda.is_available() and devices < options.processes:
        sys.exit(
            f"{options.processes} processes need as many GPUs, and torch finds {devices}; "
            "CUDA_VISIBLE_DEVICES= runs them on the CPU"
        )
    status = launch([sys.executable, "-m", __spec__.name, *sys.argv[1:]], options.processes)
    sys.exit(status)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, those that do not fit each other refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--model", choices=list(MODELS), default="gpt2")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8, help="samples of a step, over all ranks")
    parser.add_argument("--micro-batches", type=int, help="of the pipelines (default: two a rank, at most the batch)")
    parser.add_argument("--steps", type=int, default=10, help="rounds that count")
    parser.add_argument("--warm-up", type=int, default=3, help="rounds before them")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    options.micro_batches = options.micro_batches or min(2 * options.processes, options.batch)
    for name, divisor in (("processes", options.processes), ("micro-batches", options.micro_batches)):
        if options.batch % divisor:
            parser.error(f"--batch {options.batch} does not divide by the {divisor} {name}")
    if options.layers < options.processes:
        parser.error(f"--layers {options.layers} are fewer than the {options.processes} stages of a pipeline")
    return options


def run_rank(options: argparse.Namespace) -> None:
    """Build every system, time them in turn, and let rank 0 report."""
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    # What a rank does alone, such as planning, may take longer than a message.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    control = dist.new_group(backend="gloo", timeout=3 * TIMEOUT)
    setting = make_setting(options)
    started = time.perf_counter()
    reference = train_alone(setting)
    rows = {name: {"system": name} for name in options.systems}
    steps = build_all(setting, rows, control)
    take_turns(setting, steps, rows, control)
    if setting.rank == 0:
        judge(rows, reference)
        compare(rows)
        record = {
            "command": command_line(__spec__.name),
            "versions": versions(),
            "config": configuration(setting, reference, time.perf_counter() - started),
            "rows": list(rows.values()),
        }
        show(record)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(record, indent=1) + "\n")
    dist.barrier(group=control)
    dist.destroy_process_group()


def make_setting(options: argparse.Namespace) -> Setting:
    """The same model and batch on every rank, and where they go."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.manual_seed(SEED)
    model = MODELS[options.model](options).train()
    shape = (options.batch, options.sequence)
    tokens = torch.randint(options.vocabulary, shape, generator=torch.Generator().manual_seed(SEED))
    cpu_batch = {"input_ids": tokens, "labels": tokens.clone()}
    batch = {name: tensor.to(device) for name, tensor in cpu_batch.items()}
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp",))
    return Setting(options, model, cpu_batch, batch, device, mesh, replace(autopart.Mesh.of(mesh), axes=()))


def make_gpt2(options: argparse.Namespace) -> nn.Module:
    """GPT-2 without dropout."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=options.vocabulary,
            n_positions=options.sequence,
            n_embd=options.width,
            n_layer=options.layers,
            n_head=options.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
    )


def make_llama(options: argparse.Namespace) -> nn.Module:
    """Llama; its inner width 8/3 of the width, as the paper's, up to a multiple of 64."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocabulary,
            max_position_embeddings=options.sequence,
            hidden_size=options.width,
            intermediate_size=-(-options.width * 8 // (3 * 64)) * 64,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            num_key_value_heads=options.heads,
            attention_dropout=0.0,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )


MODELS: Mapping[str, Callable[[argparse.Namespace], nn.Module]] = {"gpt2": make_gpt2, "llama": make_llama}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """The optimizer of every system but autopart's, which gets the same."""
    return torch.optim.SGD(parameters, lr=RATE)


def mean_over_ranks(loss: Tensor) -> Tensor:
    """The loss of the whole batch from those of the ranks' equal shares."""
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def train_alone(setting: Setting) -> list[float]:
    """The losses of the unmodified model on one process, step by step; every rank does the same."""
    model = setting.copy_of_model()
    step = plain_step(model, setting.batch, sgd(model.parameters()))
    return [float(step()) for _ in range(setting.options.warm_up + setting.options.steps)]


def plain_step(model: nn.Module, batch: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Step:
    """A training step as one writes it for a single process."""

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss: Tensor = model(**batch).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def build_autopart(setting: Setting, **settings: Any) -> tuple[Step, str]:
    """autopart under `settings`, in which a function stands for its value on the options."""
    asked = {k: v(setting.options) if callable(v) else v for k, v in settings.items()}
    compiled = autopart.compile(
        copy.deepcopy(setting.model), setting.autopart_mesh, setting.cpu_batch, optimizer="sgd", **asked
    )
    compiled.optimizer(torch.optim.SGD, lr=RATE)
    plan = compiled.plan
    degrees = " ".join(f"{a}={n}" for a in ("pp", "dp", "tp") if (n := getattr(plan, a)) > 1)
    pipeline = f", {plan.schedule}" if plan.pp > 1 else ""
    extras = [f"zero {plan.zero}"] * bool(plan.zero) + ["recompute"] * (plan.recompute != "none")
    note = ", ".join([f"{degrees or 'one rank'}{pipeline}, {micro_batches(plan.micro_batches)}", *extras])
    return partial(compiled.step, setting.batch), note


def micro_batches(number: int) -> str:
    """The number of micro-batches in words."""
    return f"{number} micro-batch{'es' * (number > 1)}"


def build_ddp(setting: Setting) -> tuple[Step, str]:
    """DistributedDataParallel."""
    ids = [setting.device.index] if setting.device.type == "cuda" else None
    model = nn.parallel.DistributedDataParallel(setting.copy_of_model(), device_ids=ids)
    step = plain_step(model, setting.share_of_batch(), sgd(model.parameters()))
    return lambda: mean_over_ranks(step()), f"dp={setting.size}"


def build_fsdp(setting: Setting) -> tuple[Step, str]:
    """FSDP2: every block on its own, then what is left."""
    model = setting.copy_of_model()
    for block in blocks_of(model):
        fully_shard(block, mesh=setting.mesh)
    fully_shard(model, mesh=setting.mesh)
    step = plain_step(model, setting.share_of_batch(), sgd(model.parameters()))
    return lambda: mean_over_ranks(step()), f"dp={setting.size}, fully_shard per block"


def blocks_of(model: Any) -> nn.ModuleList:
    """The model's equal blocks."""
    inner = getattr(model, model.base_model_prefix)
    return cast("nn.ModuleList", inner.h if hasattr(inner, "h") else inner.layers)


def llama_tensor_plan() -> dict[str, Any]:
    """Which of Llama's layers are split how, by name; the loss takes logits that are split along the vocabulary."""
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    rows = ("self_attn.o_proj", "mlp.down_proj")
    return {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        **{f"model.layers.*.{name}": ColwiseParallel() for name in columns},
        **{f"model.layers.*.{name}": RowwiseParallel() for name in rows},
        "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }


TENSOR_PLANS: Mapping[str, Callable[[], dict[str, Any]]] = {"llama": llama_tensor_plan}


def build_dtensor(setting: Setting) -> tuple[Step, str]:
    """DTensor with a plan by hand."""
    name = setting.options.model
    if name not in TENSOR_PLANS:
        raise NotExpressibleError("Conv1D (ColwiseParallel takes nn.Linear and nn.Embedding)")
    mesh = init_device_mesh(setting.device.type, (setting.size,), mesh_dim_names=("tp",))
    model = parallelize_module(setting.copy_of_model(), mesh, TENSOR_PLANS[name]())
    kinds: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        kinds[isinstance(parameter, DTensor)].append(parameter)
    step = plain_step(model, setting.batch, sgd([{"params": kind} for kind in kinds.values() if kind]))

    def parallel_step() -> Tensor:
        with loss_parallel():
            loss = step()
        return loss.full_tensor() if isinstance(loss, DTensor) else loss

    return parallel_step, f"tp={setting.size}, embedding and loss split by vocabulary"


class Gpt2Stage(nn.Module):
    """Some of GPT-2's blocks, with the embeddings before the first of them and the head after the last."""

    def __init__(self, model: Any, blocks: range) -> None:
        super().__init__()
        inner = model.transformer
        self.blocks = nn.ModuleList(inner.h[i] for i in blocks)
        first, last = blocks.start == 0, blocks.stop == len(inner.h)
        self.wte, self.wpe = (inner.wte, inner.wpe) if first else (None, None)
        self.ln_f, self.lm_head = (inner.ln_f, model.lm_head) if last else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens or hidden states to hidden states or logits."""
        if self.wte is not None and self.wpe is not None:
            x = self.wte(x) + self.wpe(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            x = block(x)
        return x if self.lm_head is None or self.ln_f is None else self.lm_head(self.ln_f(x))


class LlamaStage(nn.Module):
    """Some of Llama's layers, with the embedding before the first of them and the head after the last."""

    def __init__(self, model: Any, blocks: range) -> None:
        super().__init__()
        inner = model.model
        self.blocks = nn.ModuleList(inner.layers[i] for i in blocks)
        first, last = blocks.start == 0, blocks.stop == len(inner.layers)
        self.embed_tokens = inner.embed_tokens if first else None
        self.rotary_emb = inner.rotary_emb
        self.norm, self.lm_head = (inner.norm, model.lm_head) if last else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens or hidden states to hidden states or logits."""
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        positions = torch.arange(x.shape[1], device=x.device)[None]
        rotary = self.rotary_emb(x, position_ids=positions)
        for block in self.blocks:
            x = block(x, position_embeddings=rotary)
        return x if self.lm_head is None or self.norm is None else self.lm_head(self.norm(x))


STAGES: Mapping[str, tuple[Callable[[Any, range], nn.Module], Callable[[Any], Tensor | None]]] = {
    "gpt2": (Gpt2Stage, lambda model: model.transformer.wte.weight),
    "llama": (LlamaStage, lambda model: None),
}
"""What makes a stage, and the weight that the first and the last stage share."""


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross entropy of every position's logits and the token after it."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def build_pipeline(setting: Setting, schedule_class: Any) -> tuple[Step, str]:
    """torch.distributed.pipelining over stages made by hand, with the same number of blocks each."""
    options, rank, size = setting.options, setting.rank, setting.size
    make_stage, shared_weight = STAGES[options.model]
    model = setting.copy_of_model()
    blocks = range(rank * options.layers // size, (rank + 1) * options.layers // size)
    module, last = make_stage(model, blocks), size - 1
    stage = PipelineStage(module, rank, size, setting.device)
    schedule = schedule_class(stage, options.micro_batches, loss_fn=next_token_loss)
    optimizer = sgd(module.parameters())
    ends = dist.new_group([0, last])
    shared = shared_weight(model) if rank in (0, last) else None
    tokens = (setting.batch["input_ids"],) if rank == 0 else ()
    labels = setting.batch["labels"] if rank == last else None

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        schedule.step(*tokens, target=labels, losses=losses, return_outputs=False)
        if shared is not None and size > 1:
            dist.all_reduce(shared.grad, group=ends)
        optimizer.step()
        loss = torch.stack(losses).mean().detach() if losses else torch.zeros((), device=setting.device)
        dist.broadcast(loss, last)
        return loss

    return step, f"pp={size}, {micro_batches(options.micro_batches)}"


def pipeline_micro_batch(options: argparse.Namespace) -> int:
    """The samples of a pipeline's micro-batch."""
    return int(options.batch // options.micro_batches)


def processes(options: argparse.Namespace) -> int:
    """The number of ranks."""
    return int(options.processes)


def autopart_pipeline(schedule: str) -> System:
    """autopart's pipeline under a schedule, with the rivals' micro-batches."""
    return System(partial(build_autopart, pp=processes, micro_batch=pipeline_micro_batch, schedule=schedule))


SYSTEMS: Mapping[str, System] = {
    OWN: System(build_autopart),
    "autopart dp": System(partial(build_autopart, dp=processes)),
    "DDP": System(build_ddp, "autopart dp"),
    "FSDP2": System(build_fsdp, "autopart dp"),
    "autopart tp": System(partial(build_autopart, tp=processes)),
    "DTensor": System(build_dtensor, "autopart tp"),
    "autopart pp gpipe": autopart_pipeline("gpipe"),
    "pipelining GPipe": System(partial(build_pipeline, schedule_class=ScheduleGPipe), "autopart pp gpipe"),
    "autopart pp 1f1b": autopart_pipeline("1f1b"),
    "pipelining 1F1B": System(partial(build_pipeline, schedule_class=Schedule1F1B), "autopart pp 1f1b"),
}
"""The systems in their turn, every rival after the plan of its kind."""


def build_all(setting: Setting, rows: dict[str, dict[str, Any]], control: Any) -> dict[str, Step]:
    """The steps of the systems that could be built and run one; the other rows are told why not."""
    steps: dict[str, Step] = {}
    for name, row in rows.items():
        started = time.perf_counter()
        step, error = None, ""
        try:
            step, row["note"] = SYSTEMS[name].build(setting)
            row["build_seconds"] = time.perf_counter() - started
            row["first_loss"] = float(step())
        except NotExpressibleError as reason:
            error = f"not expressible: {reason}"
        except Exception as failure:
            error = f"failed: {type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:160]}"
        errors = on_all_ranks(error, control)
        row["status"] = next((f"{e} (rank {r})" for r, e in enumerate(errors) if e), "ok")
        if setting.rank == 0:
            print(f"{name}: {row['status']}, {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
        if step is not None and not any(errors):
            steps[name] = step
    return steps


def on_all_ranks(value: Any, control: Any) -> list[Any]:
    """Every rank's value."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value, group=control)
    return everyone


def take_turns(setting: Setting, steps: dict[str, Step], rows: dict[str, dict[str, Any]], control: Any) -> None:
    """Let every system make a step, round after round, and note the slowest rank's times of those that count.

    A step that fails takes its system out of the later rounds.
    """
    options = setting.options
    mine: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.freeze()
    # Every system has made its first step.
    for number in range(1, options.warm_up + options.steps):
        for name in list(steps):
            dist.barrier(group=control)
            started = now(setting.device)
            error = ""
            try:
                loss = steps[name]()
            except Exception as failure:
                error = f"failed: step {number}: {type(failure).__name__}: {str(failure)[:160]}"
            taken = now(setting.device) - started
            errors = [e for e in on_all_ranks(error, control) if e]
            if errors:
                rows[name]["status"] = errors[0]
                del steps[name]
                continue
            rows[name]["last_loss"] = float(loss)
            if number >= options.warm_up:
                mine[name].append(taken)
    for name in steps:
        times = [max(ranks) for ranks in zip(*on_all_ranks(mine[name], control), strict=True)]
        rows[name] |= {"median_seconds": statistics.median(times), "min_seconds": min(times), "seconds": times}


def now(device: torch.device) -> float:
    """The time once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def judge(rows: dict[str, dict[str, Any]], reference: list[float]) -> None:
    """Mark the systems that did not train what the unmodified model trains."""
    for row in rows.values():
        if row["status"] != "ok":
            continue
        gaps = abs(row["first_loss"] - reference[0]), abs(row["last_loss"] - reference[-1])
        if not (gaps[0] <= FIRST_TOLERANCE and gaps[1] <= LAST_TOLERANCE):
            row["status"] = f"differs: losses off by {gaps[0]:.1e} at first, {gaps[1]:.1e} at last"


def compare(rows: dict[str, dict[str, Any]]) -> None:
    """Ratios of medians: above 1 where autopart, or its plan of the same kind, is faster."""
    for name, row in rows.items():
        for key, other in (("to_autopart", OWN), ("to_like", SYSTEMS[name].like)):
            if "median_seconds" in row and "median_seconds" in rows.get(other, {}):
                row[key] = row["median_seconds"] / rows[other]["median_seconds"]


def versions() -> dict[str, str]:
    """What was measured."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
    }


def configuration(setting: Setting, reference: list[float], seconds: float) -> dict[str, Any]:
    """The options, and what follows from them."""
    return {
        **{k: v for k, v in vars(setting.options).items() if k not in ("json", "systems")},
        "parameters": sum(p.numel() for p in setting.model.parameters()),
        "device": setting.device.type,
        "backend": dist.get_backend(setting.mesh.get_group()),
        "cores": os.cpu_count(),
        "threads_per_rank": torch.get_num_threads(),
        "optimizer": f"SGD, lr {RATE}",
        "reference_first_loss": reference[0],
        "reference_last_loss": reference[-1],
        "total_seconds": seconds,
    }


def show(record: Mapping[str, Any]) -> None:
    """Print the results as a table."""
    config = record["config"]
    table = Table(
        title=f"{config['model']}, {config['parameters'] / 1e6:.1f}M parameters, batch {config['batch']} x "
        f"{config['sequence']}, {config['processes']} processes on {config['device']}",
        caption=f"{config['steps']} steps each; ratios of medians, above 1 where autopart is faster; losses of the "
        f"unmodified model: {config['reference_first_loss']:.5f}, {config['reference_last_loss']:.5f}",
    )
    table.add_column("system")
    for name in ("median ms", "min ms", "to autopart", "to like plan", "first loss", "last loss"):
        table.add_column(name, justify="right")
    table.add_column("as", overflow="fold")
    for row in record["rows"]:
        cells = (
            _cell(row, "median_seconds", 1e3, ".1f"),
            _cell(row, "min_seconds", 1e3, ".1f"),
            _cell(row, "to_autopart", 1, ".2f"),
            _cell(row, "to_like", 1, ".2f"),
            _cell(row, "first_loss", 1, ".5f"),
            _cell(row, "last_loss", 1, ".5f"),
        )
        status = [] if row["status"] == "ok" else [row["status"]]
        table.add_row(row["system"], *cells, "; ".join([*status, *[row[k] for k in ("note",) if k in row]]))
    console = Console(width=None if sys.stdout.isatty() else 170)
    console.print(table)


def _cell(row: Mapping[str, Any], key: str, scale: float, form: str) -> str:
    return format(row[key] * scale, form) if key in row else ""


if __name__ == "__main__":
    main()
