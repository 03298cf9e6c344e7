"""Predicted memory against measured: the peak of the tensors' bytes of every stage, of a step of its first rank.

Every configuration of a table is planned as its row says, whether it fits or not, and its emitted code runs for three
steps with an optimizer on simulated ranks, threads of this process. A dispatch mode counts what every operator of a
rank makes until it is let go of; what simulated collectives need beyond their results is not counted. The peak is that
of the last step. Weights of the model itself and the batch are apart.

    python -m benchmarks.accuracy.memory [--only TEXT] [--drawn N [--seed SEED]] [--json FILE]

`--drawn` takes configurations that are drawn instead of the table's.

`--layers` holds the activations of one layer of the GPTs of Korthikanti et al., arXiv 2205.05198, against the paper's
formulas instead. They are per layer, with tokens sb of width h over t ranks: sbh (10 + 24 / t + 5 as / (ht)), of
which 34 sbh / t is left where attention's scores are not kept and the sequence is split, and 2 sbh / t where a layer is
run again. Masks of dropout are not in what is compared (2 of the 34, 1 of the 5): here they are drawn again.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import platform
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from rich.console import Console
from rich.table import Table
from torch import nn

from autopart import Mesh, Plan
from autopart.compile.programs import programs
from autopart.cost.liveness import MODES
from autopart.frontend.batch import DTYPES
from autopart.kernels.table import KERNELS
from autopart.passes.fuse_dropout import RESIDUAL
from autopart.passes.randomness import FUSED
from autopart.passes.source import Source
from autopart.planner.explain.memory_report import stage_memories
from autopart.planner.make_plan import make_plan, request_of
from autopart.runtime.compiled import Compiled
from autopart.runtime.groups import Groups
from autopart.runtime.optimizers import OPTIMIZERS
from autopart.runtime.peak_bytes import PeakBytes
from autopart.runtime.process_group import Group
from autopart.runtime.simulated import run_simulated
from benchmarks.support.command import command_line

LAYERS_FILE = Path(__file__).parents[1] / "data" / "seqsel_2205.05198_activation_memory.csv"
RESULTS = Path(__file__).parents[1] / "results" / "memory.json"
STEPS = 3
COLLECTIVES = (
    *("all_reduce", "all_gather", "start_all_gather", "reduce_scatter", "all_to_all", "broadcast"),
    *("send", "receive"),
)
Batch = Mapping[str, torch.Tensor]


class Memory(PeakBytes):
    """`PeakBytes` that counts of the collectives of simulated groups their results alone."""

    hidden = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {})) if self.hidden else super().__torch_dispatch__(func, types, args, kwargs)

    def watch(self, groups: Groups) -> None:
        """Count of the collectives of simulated groups their results alone."""
        parts = () if groups.shard is groups.dp else (groups.shard, groups.replicas)
        for group in (groups.pp, groups.dp, groups.tp, *parts, groups.activations, groups.gradients):
            self._watched(group)
        tied = groups.tied
        object.__setattr__(groups, "tied", lambda stages: self._watched(tied(stages)))

    def _watched(self, group: Group | None) -> Group | None:
        for name in COLLECTIVES if group is not None else ():
            object.__setattr__(group, name, self._quiet(getattr(group, name)))
        return group

    def _quiet(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(collective)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.hidden = True
            try:
                out = collective(*args, **kwargs)
            finally:
                self.hidden = False
            self.see(out)
            return out

        return run


def measured(source: Source, plan: Plan) -> list[int]:
    """Peak bytes of the first rank of every stage in a step of a plan."""
    layered = source.full(plan.micro_batch, plan.mesh)
    stages = programs(layered, plan)
    kind, settings = OPTIMIZERS[plan.optimizer]

    def one(groups: Groups) -> int:
        apart = [*source.model.parameters(), *source.model.buffers(), *source.batch.values()]
        with Memory(apart=apart) as memory:
            memory.watch(groups)
            program = stages[groups.pp.rank]
            compiled = Compiled(source.model, plan, groups, program, layered.traced.aliases, layered.traced.buffers)
            compiled.optimizer(kind, lr=1e-3, **settings)
            for _ in range(STEPS):
                memory.peak = 0
                compiled.step(source.batch)
            return memory.peak

    each = plan.dp * plan.tp
    return run_simulated(plan.pp, plan.dp, plan.tp, one, plan.shard_size)[::each]


# ---- what is measured --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A configuration: a model of the table, ranks, the settings of `autopart.plan`."""

    model: str
    ranks: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """In short."""
        return " ".join([self.model, *(f"{k}={v}" for k, v in self.settings.items())])


@dataclass(frozen=True)
class Compared:
    """A row, with bytes of every stage."""

    name: str
    predicted: tuple[int, ...]
    measured: tuple[int, ...]
    memory: tuple[Mapping[str, float], ...]

    @property
    def errors(self) -> tuple[float, ...]:
        """predicted / measured - 1 of every stage."""
        return tuple(p / m - 1 for p, m in zip(self.predicted, self.measured, strict=True))


SAMPLES, WORDS, LAYERS = 8, 2048, 4
SHAPES = {"": (128, 128), "wide ": (64, 512)}
"""Tokens of a sample and width: where values are larger than weights, and where weights are."""


def gpt2(tokens: int, width: int) -> nn.Module:
    """A GPT-2 without dropout."""
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            n_embd=width, n_head=4, n_layer=LAYERS, vocab_size=WORDS, n_positions=tokens, use_cache=False,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def llama(tokens: int, width: int) -> nn.Module:
    """A Llama with a head of its own."""
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            hidden_size=width, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=LAYERS,
            intermediate_size=3 * width, vocab_size=WORDS, max_position_embeddings=tokens, use_cache=False,
            bos_token_id=0, eos_token_id=0, pad_token_id=None,
        )
    )  # fmt: skip


MODELS: Mapping[str, tuple[Callable[[int, int], nn.Module], tuple[int, int]]] = {
    f"{name}{build.__name__}": (build, shape) for name, shape in SHAPES.items() for build in (gpt2, llama)
}
MIXED = {"precision": "bfloat16", "master": "float32"}
SPLITS: Sequence[tuple[int, Mapping[str, Any]]] = (
    (1, {}),
    (1, {"micro_batch": 2}),
    (1, {"micro_batch": 2, "recompute": "full"}),
    (1, {"micro_batch": 2, "recompute": "selective"}),
    (1, {"micro_batch": 4, **MIXED}),
    (2, {"tp": 2, "micro_batch": 4}),
    (2, {"pp": 2, "micro_batch": 2}),
    (2, {"pp": 2, "micro_batch": 2, "recompute": "full"}),
    *((2, {"dp": 2, "micro_batch": 4, "zero": zero}) for zero in range(4)),
    *((2, {"dp": 2, "micro_batch": 4, "zero": zero, **MIXED}) for zero in range(4)),
    (4, {"pp": 4, "micro_batch": 1}),
    (4, {"pp": 2, "tp": 2, "micro_batch": 2}),
    (1, {"micro_batch": 2, "recompute": "mincut"}),
    *((2, {"tp": 2, "micro_batch": 4, "recompute": mode}) for mode in ("selective", "mincut", "full")),
    (2, {"dp": 2, "micro_batch": 2, "zero": 3, "recompute": "mincut", **MIXED}),
    *((2, {"tp": 2, "micro_batch": 4, "again": True, "recompute": mode}) for mode in ("none", "selective", "full")),
    (4, {"dp": 2, "tp": 2, "micro_batch": 4, "zero": 1}),
    *((2, {"dp": 2, "micro_batch": 2, "zero": zero, "recompute": "full"}) for zero in (2, 3)),
    *((2, {"dp": 2, "micro_batch": 2, "zero": zero, "recompute": "full", **MIXED}) for zero in (1, 2, 3)),
    *((4, {"pp": 2, "dp": 2, "micro_batch": 2, "zero": zero, "recompute": "full", **MIXED}) for zero in (2, 3)),
    (2, {"dp": 2, "micro_batch": 4, "zero": 3, "prefetch": 64}),
    (2, {"dp": 2, "micro_batch": 2, "zero": 3, "prefetch": 64, **MIXED}),
    *((2, {"dp": 2, "micro_batch": 2, "zero": 3, "prefetch": 64, "recompute": mode}) for mode in ("mincut", "full")),
    (4, {"pp": 2, "dp": 2, "micro_batch": 2, "zero": 3, "prefetch": 64, "recompute": "full", **MIXED}),
)
DEGREES = (
    (1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (1, 4, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2),
)  # fmt: skip
"""pp, dp and tp of drawn configurations."""
AGAIN = {
    "gpt2": ("*.c_attn/matmul", "*.c_fc/matmul"),
    "llama": ("*.[qkv]_proj/linear", "*.gate_proj/linear", "*.up_proj/linear"),
}
"""Products whose operands are gathered again for backward."""
ROWS = [Row(model, ranks, settings) for model in MODELS for ranks, settings in SPLITS]


def drawn(count: int, seed: int) -> Iterator[Row]:
    """Rows of any degrees, micro-batch, ZeRO level, recompute, precision and optimizer."""
    draw, ahead = random.Random(seed), random.Random(seed)
    for _ in range(count):
        pp, dp, tp = draw.choice(DEGREES)
        settings = {"pp": pp, "dp": dp, "tp": tp, "micro_batch": draw.choice([m for m in (2, 4, 8) if m >= dp])}
        settings |= {
            "recompute": draw.choice(MODES),
            "zero": draw.randrange(4) if dp > 1 else 0,
        }
        settings |= {"optimizer": draw.choice(("adamw", "momentum", "sgd")), **draw.choice(({}, MIXED))}
        settings |= {"prefetch": ahead.choice((0, 64))} if settings["zero"] == 3 else {}
        yield Row(draw.choice(list(MODELS)), pp * dp * tp, settings)


def built(name: str) -> tuple[nn.Module, Batch]:
    """A model of the table with random weights, and a batch."""
    torch.manual_seed(0)
    build, (length, width) = MODELS[name]
    tokens = torch.randint(WORDS, (SAMPLES, length))
    return build(length, width), {"input_ids": tokens, "labels": tokens.clone()}


class Bench:
    """Rows share what is traced."""

    def __init__(self) -> None:
        self.sources: dict[tuple[str, str], Source] = {}

    def compared(self, row: Row) -> Compared:
        """A row planned, run and compared. Raises PartitionError where it has no plan."""
        precision = row.settings.get("precision", "float32")
        key = row.model, precision
        if key not in self.sources:
            self.sources[key] = Source(*built(row.model), DTYPES[precision])
        source = self.sources[key]
        forced = ["strategy *.weight C over dp"] if row.settings.get("zero") else []
        if row.settings.get("again"):
            forced += [f"strategy {name} n+again over tp" for name in AGAIN[row.model.split()[-1]]]
        settings = {name: value for name, value in row.settings.items() if name != "again"}
        request = replace(request_of(source.model, source.batch, constraints=forced, **settings), must_fit=False)
        plan = make_plan(source, Mesh.parse(f"{row.ranks}:cpu"), request, to_run=True)
        memory = tuple(dict(stage.memory) for stage in plan.stages)
        return Compared(row.name, plan.memory_bytes, tuple(measured(source, plan)), memory)


# ---- against the formulas -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """Bytes that one layer keeps for a micro-batch on a rank: as predicted, and by the paper's formula without masks of
    dropout."""

    model: str
    mode: str
    predicted: float
    formula: float

    @property
    def error(self) -> float:
        """Relative."""
        return self.predicted / self.formula - 1


@dataclass(frozen=True)
class Formula:
    """How a row runs here, and what it keeps: so many bytes of sbh that tensor parallelism does not split, that it
    splits, and of the scores' as^2 b, which it splits too.

    scores    whether attention is written out; else it is one kernel, which keeps none
    sequence  whether the sequence is split between products, whose whole inputs are gathered again
    """

    recompute: str
    scores: bool
    sequence: bool
    whole: float
    split: float

    def bytes(self, tokens: int, hidden: int, scores: float, tp: int) -> float:
        """Of a layer; `scores` is as / h."""
        written = 5 - 1 if self.scores else 0
        return tokens * hidden * (self.whole + (self.split + written * scores) / tp)


FORMULAS: Mapping[str, Formula] = {
    "TP only, no recompute": Formula("none", True, False, 10 - 2, 24),
    "TP+SP": Formula("none", True, True, 0, 34 - 2),
    "TP+selective": Formula("none", False, False, 10 - 2, 24),
    "TP+SP+selective": Formula("none", False, True, 0, 34 - 2),
    "TP+full recompute": Formula("full", False, True, 0, 2),
}
"""Table 2 of the paper without masks: 2 of the 34 (or of the 10) and 1 of the 5 bytes. Selective recompute of attention
is here a kernel that keeps no scores. What is run again keeps its input in parts here."""
COLUMNS, ROWS_OF = ("attn.c_attn", "mlp.c_fc"), ("attn.c_proj", "mlp.c_proj")
MEGATRON = [
    *(f"split transformer.h.*.{name}.weight dim 1 over tp" for name in COLUMNS),
    *(f"split transformer.h.*.{name}.weight dim 0 over tp" for name in ROWS_OF),
]
"""Products split as in Megatron-LM."""
SEQUENCE = {
    True: [f"strategy transformer.h.*.{name}/matmul n+again over tp" for name in COLUMNS],
    False: ["not split transformer.h.*.ln_* over tp", "not split transformer.h.*/add* over tp"],
}
"""What is between products: split, or whole on every rank."""


def layers(models_asked: Sequence[str] = ()) -> Iterator[Layer]:
    """The rows of the paper; of some models, if they are named."""
    with LAYERS_FILE.open() as lines:
        rows = list(csv.DictReader(lines))
    for row in rows:
        if not models_asked or row["model"] in models_asked:
            yield layer(row)


def layer(row: Mapping[str, str]) -> Layer:
    """One row: its model cut to 3 layers, tensor-parallel over a host."""
    hidden, heads, length, tp, samples = (int(row[k]) for k in ("hidden", "heads", "seq_len", "tp", "micro_batch"))
    formula = FORMULAS[row["mode"]]
    source = layer_source(hidden, heads, length, samples, formula.scores)
    settings = {"tp": tp, "micro_batch": samples, "recompute": formula.recompute, **MIXED}
    request = request_of(source.model, source.batch, constraints=MEGATRON + SEQUENCE[formula.sequence], **settings)
    request = replace(request, must_fit=False)
    plan = make_plan(source, Mesh.parse(f"{tp}:a100-80gb"), request)
    (stage,) = stage_memories(plan, source)
    kept = math.fsum(nbytes for _, label, _, nbytes in stage.saved() if label == "transformer.h.1")
    return Layer(row["model"], row["mode"], kept, formula.bytes(length * samples, hidden, heads * length / hidden, tp))


@cache
def layer_source(hidden: int, heads: int, length: int, samples: int, scores: bool) -> Source:
    """A GPT of 3 layers with dropout, without fused kernels, and a batch; its attention is written out where scores are
    kept."""
    config = hf.GPT2Config(
        n_embd=hidden, n_head=heads, n_layer=3, n_positions=length, vocab_size=51200, activation_function="gelu",
        use_cache=False, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1 * scores,
    )  # fmt: skip
    with torch.device("meta"):
        model = hf.GPT2LMHeadModel(config)
        tokens = torch.zeros(samples, length, dtype=torch.long)
    return Source(model, {"input_ids": tokens, "labels": tokens}, torch.bfloat16, (*KERNELS, FUSED, RESIDUAL))


def layers_table(found: Sequence[Layer]) -> Table:
    """All rows, one a line."""
    made = Table("model", "mode", "predicted MiB", "formula MiB", "error", title="Activations of a layer")
    for row in found:
        numbers = (f"{x / 2**20:.1f}" for x in (row.predicted, row.formula))
        made.add_row(row.model, row.mode, *numbers, f"{row.error:+.2%}")
    return made


# ---- told ---------------------------------------------------------------------------------------------------


def table(rows: Sequence[Compared]) -> Table:
    """All stages, one a line."""
    made = Table("configuration", "stage", "predicted MiB", "measured MiB", "error", "of it", title="Peak tensor bytes")
    for row in rows:
        for stage, error in enumerate(row.errors):
            parts = ", ".join(f"{k} {v / 2**20:.2f}" for k, v in row.memory[stage].items() if v)
            predicted, found = (f"{x[stage] / 2**20:.2f}" for x in (row.predicted, row.measured))
            made.add_row(row.name if not stage else "", str(stage), predicted, found, f"{error:+.2%}", parts)
    return made


def summary(rows: Sequence[Compared]) -> str:
    """How far all are off."""
    errors = [e for row in rows for e in row.errors]
    within, below = sum(abs(e) <= 0.02 for e in errors), sum(e < -0.02 for e in errors)
    mean = math.fsum(map(abs, errors)) / len(errors)
    return (
        f"{len(errors)} stages: {within} within 2 %, {below} predicted lower; mean {mean:.2%}, "
        f"from {min(errors):+.2%} to {max(errors):+.2%}"
    )


def asked(only: str | None, count: int = 0, seed: int = 0) -> Iterator[Row]:
    """The rows whose name has a text in it, of so many that are drawn, if any are."""
    return (row for row in (drawn(count, seed) if count else ROWS) if not only or only in row.name)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TEXT", help="rows with TEXT in their name")
    parser.add_argument("--drawn", type=int, default=0, metavar="N", help="N rows drawn instead of the table's")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"write to FILE (of the whole table: {RESULTS.name})")
    parser.add_argument("--layers", action="store_true", help="a layer's activations against published formulas")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench, console = Bench(), Console(width=None if sys.stdout.isatty() else 200)
    if options.layers:
        console.print(layers_table(list(layers())))
        return
    rows = [bench.compared(row) for row in asked(options.only, options.drawn, options.seed)]
    console.print(table(rows))
    console.print(summary(rows))
    if file := options.json or (None if options.only or options.drawn else RESULTS):
        run = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "command": command_line(__spec__.name),
        }
        file.write_text(
            json.dumps({**run, "summary": summary(rows), "rows": [asdict(r) for r in rows]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
