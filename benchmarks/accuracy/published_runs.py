"""The cost model against published step times: predicted and published seconds of every run that can be expressed here.

Each row is planned with what its authors chose: degrees, ZeRO level, recompute, micro-batch, 1F1B, and as many blocks
in every stage where they divide so; the splits of operators are the planner's. It is priced whether it fits or not. An
error is predicted / published - 1. Nothing is fitted on these rows. A row whose computation is another one (8 bits,
context parallelism, asynchronous tensor parallelism) is named and not scored.

What is known of how a row ran and no plan says is added or taken away by formula, which `differences` and
`benchmarks/accuracy/reserved.py` tell with their sources.

`--memory` prints the predicted bytes of the fullest stage beside what was published, of plans with master copies in
float32, as the runs had them: what the allocator reserved at most, more than what tensors took. `--cross` fits the
constants on parts of their sources and judges them on the rest.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from autopart import Estimate, Mesh, PartitionError, Plan, timeline
from autopart.cost.collectives import collective_seconds, message_seconds
from autopart.cost.compute import stream_rate_seconds
from autopart.cost.message_sizes import BUCKET_BYTES
from autopart.cost.training_state import Training, amortization, widening
from autopart.cost.update_seconds import update_seconds
from autopart.plan.stages import PlanSegment, PlanStage
from benchmarks.accuracy.fit import Collectives, Fabric, Fitted, Profile, refits
from benchmarks.accuracy.published import Bench, Published, read
from benchmarks.accuracy.reserved import reserved
from benchmarks.support.command import command_line

FILES = {
    "megatron_sc21_table1_a100.csv": "Megatron-LM SC21, A100",
    "megatron_jan2021_tp_dp.csv": "Megatron-LM January 2021, V100 and A100",
    "seqsel_2205.05198_iter_time_a100.csv": "Selective recompute, A100",
    "torchtitan_llama3.csv": "torchtitan Llama 3, H100",
}
"""Table -> what it is called."""

WHOLE = (
    *("*.ln_1/layer_norm", "*.ln_2/layer_norm", "*.c_proj/add.Tensor"),
    *("*.resid_dropout/autopart.dropout", "*.mlp.dropout/autopart.dropout", "*.h.0/add.Tensor", "*.h.0/add.Tensor#2"),
)
"""What every rank of tensor parallelism does in full without sequence parallelism: all between the products that end in
an all-reduce and those that begin (Korthikanti et al., arXiv 2205.05198, section 4.2.2)."""

TURNS = 60
"""Of the simplex of every fit that is cross-validated."""

WORST = 3
"""Rows of a source that are named with where their time goes."""


@dataclass(frozen=True)
class Scored:
    """A row with its prediction.

    predicted  seconds of a step
    shares     of it, by `Estimate.breakdown`
    memory     bytes of a device of the fullest stage, by what takes them; see `held`
    clock      how far the plan's simulated step is from the one it says, relatively; its stages whole
    sharing    share of the seconds that gathers and scatters of ZeRO 3 take, as far as they are not hidden behind
               products, or slow products down
    """

    row: Published
    predicted: float
    shares: Mapping[str, float]
    memory: Mapping[str, float]
    fits: bool
    clock: float = 0.0
    sharing: float = 0.0

    @property
    def error(self) -> float:
        """Relative error of the seconds; nan where none are published."""
        return self.predicted / self.row.measured - 1 if self.row.measured else math.nan

    @property
    def excess(self) -> float:
        """Relative error of the bytes; nan where none are published."""
        return sum(self.memory.values()) / 2**30 / self.row.memory - 1 if self.row.memory else math.nan

    @property
    def hidden(self) -> float:
        """The error that it would have if products hid all messages of ZeRO 3 and took no longer for it."""
        return (1 + self.error) * (1 - self.sharing) - 1


@dataclass(frozen=True)
class Score:
    """How far a source's rows are off: mean and median of absolute relative errors, and Kendall's tau-b in sweeps."""

    source: str
    rows: int
    mape: float
    median: float
    mean: float
    tau: float

    @staticmethod
    def of(source: str, scored: Sequence[Scored]) -> Score:
        """Of some rows, at least one."""
        errors = [s.error for s in scored]
        absolute = [abs(e) for e in errors]
        tau = kendall([(sweep(s.row), s.predicted, s.row.measured or math.nan) for s in scored])
        return Score(source, len(scored), fmean(absolute), median(absolute), fmean(errors), tau)


def sweep(row: Published) -> str:
    """What one experiment varied nothing of: its source, and the device, the replicas and the recompute."""
    source = row.name.partition(":")[0]
    return f"{source} {row.mesh.rpartition(':')[2]} {row.forced['recompute']} {row.forced['dp'] > 1}"


def kendall(rows: Sequence[tuple[str, float, float]]) -> float:
    """Kendall's tau-b (Biometrika 33, 1945) of two rankings of (sweep, x, y), over the pairs within each sweep: 1 where
    they agree, -1 where they are opposite; nan where one of them ranks nothing."""
    signs = [(sign(a - b), sign(c - d)) for (one, a, c), (other, b, d) in combinations(rows, 2) if one == other]
    ranked = math.sqrt(sum(x != 0 for x, _ in signs) * sum(y != 0 for _, y in signs))
    return sum(x * y for x, y in signs) / ranked if ranked else math.nan


def sign(x: float) -> int:
    """-1, 0 or 1."""
    return int(x > 0) - int(x < 0)


def step_seconds(
    work: Sequence[float],
    sync: Sequence[float],
    send: Sequence[float],
    micro_batches: int,
    pieces: int = 1,
    zero: int = 0,
) -> float:
    """Seconds of a step under 1F1B whose stages are each in some interleaved pieces.

    By stage, `work` is forward and backward of a micro-batch, `sync` of a step, `send` what it sends and receives for a
    micro-batch when it is whole. The slowest stage takes all micro-batches; filling and draining the pipeline takes a
    piece of each other stage, a v-th of its time (Narayanan et al., arXiv 2104.04473, section 2.2). Each of v pieces
    has a stage's messages; the first and the last stage, which have a neighbour on one side alone, become neighbours,
    so that of their 2 v sides all but one have messages. What is done once a step has its share in all these turns
    (`training_state.amortization`). With one piece this is what a plan says: sum(f) + (m - 1) max(f).
    """
    ends = {0, len(work) - 1}
    times = [2 * pieces - 1 if i in ends else pieces for i in range(len(work))]
    shared = micro_batches + (amortization(zero, micro_batches, len(work)) - micro_batches) / pieces
    each = [w + s / shared + t * m for w, s, t, m in zip(work, sync, times, send, strict=True)]
    return micro_batches * max(each) + (sum(each) - max(each)) / pieces


def differences(plan: Plan, stage: PlanStage, row: Published) -> dict[str, float]:
    """Seconds of a step, by where they show in a breakdown, that a stage takes more than its plan says because of what
    its authors are known to have done otherwise.

    recompute      every second product of a block is run again
    communication  collectives of tensor parallelism backward, as many as forward, run beside products that give weight
                   gradients (`Published.overlapped`)
    gradient sync  and those products add to the sum of the gradients themselves; all gradients are one message
                   (`one_message`); what FSDP2 gathers and scatters goes block by block, through buffers (`fsdp`)
    p2p            every rank sends its part of a message to another host, where the ranks gather it
    """
    m, held, zero = plan.micro_batches, stage.memory["parameters"], row.forced["zero"]
    comm = sum(len(run.labels) * line.comm_seconds for run in stage.segments for line in run.lines)
    summed = -stream_rate_seconds(3 * (m - 1) * held, plan.mesh.device) if row.overlapped else 0.0
    summed += one_message(plan, stage) if zero == 0 and plan.dp > 1 else 0.0
    return {
        "recompute": m * again_seconds(stage) if row.again else 0.0,
        "communication": -m * comm / 2 if row.overlapped else 0.0,
        "gradient sync": sum(fsdp(plan, stage)) if zero == 3 else summed,
        "p2p": m * stage.send_seconds * (scattered(plan.mesh, row.forced["tp"]) - 1) if row.replicated else 0.0,
    }


def one_message(plan: Plan, stage: PlanStage) -> float:
    """Seconds of a step that summing all gradients over dp in one message takes more than messages of BUCKET_BYTES: at
    most 0, for the latencies (Megatron-LM's DistributedDataParallel of 2020 to 2022 sums buffers of all gradients)."""
    nbytes, group = (
        stage.memory["parameters"] * widening(plan.precision, plan.master),
        plan.mesh.group(plan.tp, plan.dp),
    )
    full = collective_seconds("all_reduce", BUCKET_BYTES, group)
    more = collective_seconds("all_reduce", nbytes, group) - nbytes / BUCKET_BYTES * full
    return float(min(0.0, more)) * (1 - plan.mesh.device.overlapped_share)


def fsdp(plan: Plan, stage: PlanStage) -> tuple[float, float]:
    """Seconds of a step that FSDP2 takes more than a plan says: less for latencies, since a block is one message, twice
    for its parameters and once for their gradients, which computing hides; and parameters are copied out of what was
    gathered, gradients into what is scattered, in the master dtype
    (torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py)."""
    wide, narrow = (getattr(torch, dtype or plan.precision).itemsize for dtype in (plan.master, None))
    elements, group = stage.memory["parameters"] * plan.dp / wide, plan.mesh.group(plan.tp, plan.dp)
    units = defaultdict[str, list[float]](list)
    for key, shape in plan.signature.parameters.items():
        units[next(filter(str.isdigit, key.split(".")), "root")].append(math.prod(shape) / plan.tp)
    late = 0.0
    for times, name, each in ((2, "all_gather", narrow), (1, "reduce_scatter", wide)):
        for unit in units.values():
            nbytes = each * sum(unit)
            message = min(nbytes, BUCKET_BYTES * each / narrow)
            planned = sum(message_seconds(each * numbers, group, name, message) for numbers in unit)
            late += times * float(collective_seconds(name, nbytes, group) - planned)
    late *= 1 - plan.mesh.device.overlapped_share
    return late, stream_rate_seconds((2 * 2 * narrow + narrow + wide) * elements, plan.mesh.device)


def sharing_seconds(plan: Plan) -> float:
    """Seconds of a step that gathers and scatters of ZeRO 3 are priced at: all of its gradient sync but the optimizer's
    step and sums of gradients."""
    if plan.zero < 3:
        return 0.0
    (stage,), m = plan.stages, plan.micro_batches
    wide, narrow = (getattr(torch, dtype or plan.precision).itemsize for dtype in (plan.master, None))
    training = Training(plan.optimizer, 3, plan.mesh.group(plan.tp, plan.dp), m, wide / narrow, True)
    nbytes = stage.memory["parameters"] * plan.dp * narrow / wide
    update = update_seconds(nbytes, True, True, training, plan.mesh.busy_device(plan.pp, m))
    return stage.sync_seconds - update + fsdp(plan, stage)[0]


def blocks_of(run: PlanSegment) -> bool:
    """Whether a run is of numbered blocks."""
    return run.labels[0].rpartition(".")[2].isdigit()


def scattered(mesh: Mesh, ranks: int) -> float:
    """What a message between hosts takes to what it takes whole, where each of some ranks that have it sends a part
    and those that want it gather the parts (Narayanan et al., arXiv 2104.04473, section 4.1)."""
    inside = mesh.intra.bandwidth * mesh.intra.share
    return 1 / ranks + (ranks - 1) / ranks * mesh.inter.bandwidth * mesh.inter.share / inside


def again_seconds(stage: PlanStage) -> float:
    """Seconds of a micro-batch to run every second product of a block again: forward is a third of a product."""
    products = (
        len(run.labels) * line.seconds / 3
        for run in stage.segments
        if blocks_of(run)
        for line in [line for line in run.lines if line.operator == "linear"][1::2]
    )
    return sum(products)


def predicted_seconds(plan: Plan, row: Published) -> float:
    """Seconds of a plan's step, as a row ran it."""
    m, others = plan.micro_batches, [differences(plan, stage, row) for stage in plan.stages]
    return step_seconds(
        [
            s.forward_seconds + s.backward_seconds + (d["recompute"] + d["communication"]) / m
            for s, d in zip(plan.stages, others, strict=True)
        ],
        [s.sync_seconds + d["gradient sync"] for s, d in zip(plan.stages, others, strict=True)],
        [s.send_seconds + d["p2p"] / m for s, d in zip(plan.stages, others, strict=True)],
        m,
        row.pieces,
        plan.zero,
    )


def plan_of(bench: Bench, row: Published, master: str | None = None, prefetch: int | None = None) -> Plan:
    """The plan that stands for a row, with master copies of a dtype, and so many MiB gathered ahead. ZeRO shares what
    is a partial sum over dp, which is then asked of the weights: where memory is no matter, gradients may else be
    summed block by block and nothing is shared."""
    cuts = ["cuts=uniform"] if row.even else []
    if row.cuts:
        cuts = [f"cuts=manual:{','.join(f'model.layers.{n}' for n in row.cuts)}"]
    whole = [f"not split {each} over tp" for each in WHOLE] if row.replicated else []
    shared = ["strategy *.weight C over dp"] if row.forced["zero"] and row.forced["dp"] > 1 else []
    settings = {**row.forced, "schedule": "1f1b", "micro_batch": row.micro_batch, "must_fit": False, "master": master}
    settings["prefetch"] = prefetch
    return bench.plan(row, cuts + shared + whole, **settings)[0]


def score(bench: Bench, row: Published, master: str | None = None, prefetch: int | None = None) -> Scored:
    """A row with its prediction. Raises PartitionError where it has no plan."""
    plan = plan_of(bench, row, master or row.master, prefetch)
    seconds, parts = predicted_seconds(plan, row), dict(Estimate.of(plan).breakdown)
    slowest = max(plan.stages, key=lambda s: s.forward_seconds + s.backward_seconds)
    for name, more in differences(plan, slowest, row).items():
        parts[name] += more
    parts["bubble"] += seconds - sum(parts.values())
    fullest = max(plan.stages, key=lambda s: s.memory_bytes)
    clock = timeline(plan).seconds / plan.step_seconds - 1
    shares, sharing = {k: v / seconds for k, v in parts.items()}, sharing_seconds(plan) / seconds
    return Scored(row, seconds, shares, fullest.memory, plan.fits, clock, sharing)


def why_not(row: Published) -> str:
    """Why a row is not scored; "" for one that is."""
    return "; ".join(row.apart) or row.skipped or ("" if row.measured else "no time is published")


def what(row: Published) -> str:
    """What is forced on a row, in short."""
    settings = {**row.forced, "micro_batch": row.micro_batch, "batch": row.global_batch}
    return " ".join(f"{k} {v}" for k, v in settings.items() if k in ("pp", "dp", "tp") or v not in (0, "none"))


def largest(scored: Scored) -> str:
    """Where most of the predicted time goes."""
    name, share = max(scored.shares.items(), key=lambda item: item[1])
    return f"{name} {share:.0%}"


def rows_table(title: str, scored: Sequence[Scored]) -> Table:
    """A source's rows, the largest error first."""
    made = Table("row", "model", "mesh", "forced", "predicted s", "published s", "error", "most of it", "left out")
    made.title = title
    for s in sorted(scored, key=lambda s: -abs(s.error)):
        made.add_row(
            s.row.name,
            f"{s.row.model} {s.row.sequence}",
            s.row.mesh,
            what(s.row) + (f", interleaved in {s.row.pieces}" if s.row.pieces > 1 else ""),
            f"{s.predicted:.4g}",
            f"{s.row.measured:.4g}",
            f"{s.error:+.1%}",
            largest(s),
            "; ".join(s.row.left_out),
        )
    return made


def scores_table(scores: Sequence[Score]) -> Table:
    """The sources, one a line."""
    made = Table("source", "rows", "mean error", "median error", "mean, signed", "Kendall's tau", title="Step time")
    for s in scores:
        made.add_row(s.source, str(s.rows), f"{s.mape:.1%}", f"{s.median:.1%}", f"{s.mean:+.1%}", f"{s.tau:.2f}")
    return made


def worst(scored: Sequence[Scored]) -> Iterator[str]:
    """The rows that are off most, with the parts of their predicted time; and what hiding messages would change."""
    for s in sorted(scored, key=lambda s: -abs(s.error))[:WORST]:
        parts = ", ".join(f"{k} {v:.0%}" for k, v in sorted(s.shares.items(), key=lambda item: -item[1]) if v > 0.005)
        yield f"  {s.row.name} {s.row.model} on {s.row.mesh}: {s.error:+.1%} ({parts})"
    for s in scored:
        if s.sharing:
            yield f"  {s.row.name}: {s.error:+.1%}, with all messages of ZeRO 3 hidden {s.hidden:+.1%}"


def memory_table(scored: Sequence[Scored]) -> Table:
    """Predicted memory beside what was published."""
    columns = ("predicted GiB", "published GiB", "difference", "fits", "most of it", "left out")
    made = Table("row", "model", "mesh", "forced", *columns)
    made.title = "Memory of the fullest device: what the allocator reserved"
    for s in scored:
        made.add_row(
            s.row.name,
            f"{s.row.model} {s.row.sequence}",
            s.row.mesh,
            what(s.row),
            f"{sum(s.memory.values()) / 2**30:.1f}",
            f"{s.row.memory:.1f}" if s.row.memory else "out of memory",
            f"{s.excess:+.1%}" if s.row.memory else "",
            "yes" if s.fits else "no",
            ", ".join(f"{k} {v / 2**30:.1f}" for k, v in Counter(s.memory).most_common(2)),
            "; ".join(t for t in s.row.left_out if not t.startswith("fp32 states")),
        )
    return made


def as_held(row: Published) -> Published:
    """A row with the ZeRO level that tells what it held. Under a pipeline FSDP2 leaves parameters gathered and sums
    gradients once a step (torchtitan's `reshard_after_forward_policy`, `stage.py` of torch.distributed.pipelining), so
    that both are whole on every rank: that is level 1."""
    level = 1 if row.forced["pp"] > 1 and row.forced["zero"] == 3 else row.forced["zero"]
    return replace(row, forced={**row.forced, "zero": level})


def held(bench: Bench, row: Published) -> Scored:
    """A row with what it reserved (`benchmarks.reserved`), of a plan with master copies in float32. What is gathered is
    counted there, also what is gathered ahead."""
    plan = plan_of(bench, row, "float32", prefetch=0)
    return replace(score(bench, row, "float32", prefetch=0), memory=reserved(plan, row, bench.source(row)))


def memory(bench: Bench, rows: Sequence[Published], console: Console) -> list[Scored]:
    """Print and return the rows with published memory, context parallelism apart, and those out of memory."""
    asked = [r for r in rows if (r.memory or r.out) and not r.skipped and not any("cp " in a for a in r.apart)]
    scored = [held(bench, as_held(row)) for row in asked]
    console.print(memory_table(scored))
    for name, some in (
        ("without", [s for s in scored if s.row.forced["pp"] == 1]),
        ("with", [s for s in scored if s.row.forced["pp"] > 1]),
    ):
        errors = [abs(s.excess) for s in some if s.row.memory]
        if errors:
            console.print(
                f"{len(errors)} rows {name} a pipeline: {fmean(errors):.1%} off on average, {max(errors):.1%} most"
            )
    out = [s for s in scored if s.row.out]
    console.print(
        f"Published as out of memory: {len(out)} rows, of which {sum(s.fits for s in out)} are called fitting."
        if out
        else "No row was published as out of memory."
    )
    return scored


def figure_of(groups: Mapping[str, Sequence[Scored]]) -> Any:
    """Predicted against published seconds of all sources, on logarithmic axes; and for every source its runs in the
    order of their published seconds, which the predicted ones keep where they rise too."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.5 * max(2, -(-len(groups) // 2))), layout="constrained")
    left, right = figure.subfigures(1, 2)
    axes = left.subplots()
    seconds = [t for scored in groups.values() for s in scored for t in (s.row.measured or s.predicted, s.predicted)]
    ends = [min(seconds) / 1.2, max(seconds) * 1.2]
    for title, scored in groups.items():
        axes.loglog([s.row.measured for s in scored], [s.predicted for s in scored], "o", label=title, alpha=0.7)
    axes.plot(ends, ends, color="grey", linewidth=1, label="equal")
    axes.fill_between(
        ends, [e / 1.2 for e in ends], [e * 1.2 for e in ends], color="grey", alpha=0.15, label="within a factor of 1.2"
    )
    axes.set(xlabel="published seconds of a step", ylabel="predicted seconds", xlim=ends, ylim=ends)
    axes.legend()
    panels = right.subplots(-(-len(groups) // 2), 2, squeeze=False).flat
    for number, (panel, (title, scored)) in enumerate(zip(panels, groups.items(), strict=False)):
        ordered = sorted(scored, key=lambda s: s.row.measured or math.nan)
        panel.semilogy([s.row.measured for s in ordered], "-", color="grey", label="published")
        panel.semilogy([s.predicted for s in ordered], "o", color=f"C{number}", label="predicted")
        panel.set_title(f"{title}\ntau {Score.of(title, scored).tau:.2f}", fontsize="small")
        panel.set(xlabel="runs by published seconds", xticks=[])
        panel.legend(fontsize="small")
    for panel in list(panels)[len(groups) :]:
        panel.set_visible(False)
    return figure


def fits() -> list[Fitted]:
    """Everything that is fitted, on parts of its sources and judged on the others."""
    return [f for f in refits(Profile(), Collectives(), Fabric.read(), TURNS) if not math.isnan(f.others)]


def fits_table(fitted: Sequence[Fitted]) -> Table:
    """Constants fitted on one part of their source and judged on the rest, one a line."""
    made = Table("constants", "fitted on", "error there", "error on the rest", "found", title="Cross-validation")
    for f in fitted:
        made.add_row(f.constants, f.on, f"{f.own:.1%}", f"{f.others:.1%}", f.found)
    return made


def to_json(scored: Scored) -> dict[str, Any]:
    """A row as plain data."""
    return {**asdict(scored), "error": scored.error, "hidden": scored.hidden}


def main() -> int:
    """Score the rows asked for; the exit status is 1 where one that should have a plan has none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TEXT", help="rows whose name, model or mesh has TEXT in it")
    parser.add_argument("--memory", action="store_true", help="print predicted and published memory too")
    parser.add_argument(
        "--cross", action="store_true", help="fit constants on parts of their sources, judge on the rest"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write scores and rows to FILE")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw predicted against published seconds, as PNG, SVG or PDF"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 220)
    bench, groups, failed = Bench(as_run=True), dict[str, list[Scored]](), list[str]()
    rows = {
        title: [r for r in read(file) if not options.only or options.only in f"{r.name} {r.model} {r.mesh}"]
        for file, title in FILES.items()
    }
    for title, asked in rows.items():
        scored = list[Scored]()
        for row in (r for r in asked if not why_not(r)):
            try:
                scored.append(score(bench, row))
            except (PartitionError, AssertionError) as error:
                failed.append(f"{row.name} {row.model} on {row.mesh}: {error}")
        if scored:
            groups[title] = scored
            console.print(rows_table(title, scored))
            console.print("off most:", *worst(scored), sep="\n", markup=False, highlight=False)
        for row in asked:
            if why_not(row):
                console.print(f"not scored: {row.name} {row.model}: {why_not(row)}", markup=False, highlight=False)
    everything = [s for scored in groups.values() for s in scored]
    scores = [Score.of(title, scored) for title, scored in groups.items()]
    scores += [Score.of("all", everything)] if everything else []
    console.print(scores_table(scores))
    clocks = [s.clock for s in everything if s.row.forced["pp"] > 1]
    if clocks:
        console.print(
            f"{len(clocks)} pipelines simulated with their stages whole: {min(clocks):+.1%} to {max(clocks):+.1%} "
            "from what their plans say"
        )
    held = memory(bench, [r for asked in rows.values() for r in asked], console) if options.memory else []
    fitted = fits() if options.cross else []
    if fitted:
        console.print(fits_table(fitted))
    for line in failed:
        console.print(f"no plan: {line}", markup=False, highlight=False)
    if options.json:
        run = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "command": command_line(__spec__.name),
        }
        data = {**run, "scores": [asdict(s) for s in scores], "rows": [to_json(s) for s in everything]}
        data |= {"memory": [to_json(s) for s in held]} if options.memory else {}
        data |= {"cross": [asdict(f) for f in fitted]} if fitted else {}
        options.json.write_text(json.dumps(data, indent=1) + "\n")
    if options.plot and groups:
        figure_of(groups).savefig(options.plot, dpi=150)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
