"""Writes the tables of the documents, and what reports say of published runs, from the results that the benchmarks left
in benchmarks/results/.

    python -m benchmarks.figures             renews every table
    python -m benchmarks.figures --check     ends with status 1 where a table is not that of the last results

A table stands between two markers, `<!-- name -->` and `<!-- /name -->`. FIGURES names its document, the file of
results and the function that writes the rows. Running a benchmark anew renews its results; its docstring says how long
that takes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.coverage import zoo
from benchmarks.models import families, gptx_sizes
from benchmarks.planning import every_model
from benchmarks.support.documents import DOCS, written_between

RESULTS = Path(__file__).parent / "results"
REPORTED = Path(__file__).parents[1] / "autopart" / "plan" / "report" / "published.json"
"""What reports say of published runs (`autopart.plan.report.accuracy.Published`)."""
SOURCES = {
    "megatron_sc21_t1": "Megatron-LM, SC21 (arXiv 2104.04473, table 1)",
    "megatron_jan2021": "Megatron-LM, January 2021",
    "seqsel_t5": "Megatron-LM, selective recompute (arXiv 2205.05198)",
    "seqsel_abstract": "Megatron-LM, selective recompute (arXiv 2205.05198)",
    "torchtitan_2024_12": "torchtitan, December 2024",
    "torchtitan_2025_06": "torchtitan, June 2025",
}
"""How the names of published rows begin -> what reports call their source."""
Found = dict[str, Any]


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))


def captioned(found: Found, table: str) -> str:
    """A table under the command that its results are from."""
    return f"`{found['command']}`:\n\n{table}"


def published(found: Found) -> str:
    """Errors of predicted step times, by source."""
    head = ("source", "rows", "mean error", "median", "mean, signed", "Kendall's tau")
    return markdown(
        head,
        (
            (s["source"], s["rows"], f"{s['mape']:.1%}", f"{s['median']:.1%}", f"{s['mean']:+.1%}", f"{s['tau']:.2f}")
            for s in found["scores"]
        ),
    )


def reported(accuracy: Found, steps: Found) -> str:
    """`published.json`: errors of published runs by source and device, and of real steps on CPU ranks."""
    errors: dict[tuple[str, str], list[float]] = {}
    for row in accuracy["rows"]:
        device = row["row"]["mesh"].rpartition(":")[2].partition("-")[0]
        errors.setdefault((SOURCES[row["row"]["name"].partition(":")[0]], device), []).append(row["error"])
    on_cpu = "small models on 1, 2 and 4 CPU ranks, each planned on a profile of its host (docs/accuracy.md)"
    errors[on_cpu, "cpu"] = [row["error"] for row in steps["rows"]]
    sources = [
        {"source": source, "device": device, "rows": len(e), "mean": round(fmean(map(abs, e)), 4),
         "signed": round(fmean(e), 4), "worst": round(max(e, key=abs), 4)}
        for (source, device), e in errors.items()
    ]  # fmt: skip
    return json.dumps({"sources": sources}, indent=1) + "\n"


def memory(found: Found) -> str:
    """How far counted peaks are from predicted ones, by stage."""
    errors = [m / p - 1 for row in found["rows"] for p, m in zip(row["predicted"], row["measured"], strict=True)]
    bands = ((-2.0, -0.02, "over 2 % below the plan"), (-0.02, 0.02, "within 2 %"), (0.02, 9.0, "over 2 % above it"))
    rows = [(sum(low <= e < high for e in errors), f"of {len(errors)}", text) for low, high, text in bands]
    mean = (f"{fmean(map(abs, errors)):.2%}", "mean", f"from {min(errors):+.2%} to {max(errors):+.2%}")
    return markdown(("stages", "share", "counted peak against the plan's"), [*rows, mean])


def measured(found: Found) -> str:
    """Errors against steps on CPU ranks, by number of ranks."""

    def line(name: object, rows: Sequence[Found]) -> Sequence[object]:
        steps = [1e3 * r["measured"] for r in rows]
        errors, at_speed = ([abs(r[key]) for r in rows] for key in ("error", "error_at_speed"))
        span = f"{min(steps):.0f} to {max(steps):.0f}"
        return name, len(rows), span, f"{fmean(errors):.1%}", f"{fmean(at_speed):.1%}", f"{max(at_speed):.1%}"

    rows = found["rows"]
    by_ranks = [line(n, [r for r in rows if r["ranks"] == n]) for n in sorted({r["ranks"] for r in rows})]
    head = ("ranks", "rows", "step, ms", "mean error", "at the machine's speed", "largest at it")
    return markdown(head, [*by_ranks, line("all", rows)])


def regret(found: Found) -> str:
    """The planner's choice against the fastest uniform configuration."""
    rows = (
        (r["ranks"], r["model"], r["configurations"], f"`{r['choice']}`", f"{1e3 * r['seconds']:.0f}", f"`{r['best']}`",
         f"{1e3 * r['best_seconds']:.0f}", f"{1e3 * r['worst_seconds']:.0f}", f"{r['regret']:.1%}")
        for r in found["regret"]
    )  # fmt: skip
    return markdown(("ranks", "model", "runs", "chosen", "ms", "fastest run", "ms", "slowest", "regret"), rows)


def planning(found: Found) -> str:
    """CPU seconds and peak resident memory of planning in a fresh process."""
    rows = (
        (r["name"], r["mesh"], f"{r['cpu']:.1f}", f"{r['memory'] / 2**30:.2f} GiB", f"{r['plan']['gap']:.2%}")
        for r in found["rows"]
    )
    return captioned(found, markdown(("model", "mesh", "CPU s", "memory", "gap"), rows))


def step_time(found: Found) -> str:
    """Seconds of a step of other systems over autopart's own plan, and over its plan of the same degrees."""
    by_system = {row["system"]: row for row in found["rows"]}

    def ratio(row: Found, key: str) -> str:
        return f"{row[key]:.2f} ({row[f'{key}_spread'][0]:.2f} to {row[f'{key}_spread'][1]:.2f})" if key in row else ""

    def line(row: Found) -> Sequence[object]:
        seconds = f"{1e3 * row['median_seconds']:.0f}" if row["status"] == "ok" else row["status"]
        like = by_system.get(row["like"], {}).get("note", "")
        return row["system"], seconds, ratio(row, "to_autopart"), like, ratio(row, "to_like")

    config = found["config"]
    head = ("system", "ms", "over autopart's own plan", "autopart with", "over that")
    ran = f"{config['ranks']} ranks on {config['cores']} cores, load {config['load']:.1f} at the end"
    own = by_system["autopart"]["note"]
    return captioned(found, f"{ran}; own plan: {own}.\n\n{markdown(head, map(line, found['rows']))}")


def proof(found: Found) -> str:
    """What the proof of the rules covers."""
    mutants = found["mutants disproven"] + found["mutants refused"]
    of_torch = "{:,}, of which {:,} are {}".format
    rows = [
        ("rows", of_torch(found["rows"], found["rows that PyTorch's tests call"], "called by PyTorch's tests")),
        ("calls", of_torch(found["calls"], found["calls of PyTorch's tests"], "PyTorch's")),
        ("proofs: strategies of calls over 2, 3, 4 and 5 ranks", f"{found['proofs']:,}, all pass"),
        ("corrupted rows that claim something new", f"{mutants:,}, caught {found['caught']:.2%}"),
        ("those that survive", "; ".join(f"`{s}`" for s in found["survivors"]) or "none"),
    ]
    return markdown(("the table of operators", ""), rows)


def dropout(found: Found) -> str:
    """Seconds of dropout against torch's, forward and backward."""
    rows = [("x".join(map(str, row["shape"])), row["seconds"]) for row in found["operators"]]
    rows += [(f"a step of a small GPT-2, dropout {row['p']:g}", row["seconds"]) for row in found["steps"]]
    lines = (
        (name, f"{1e3 * s['autopart']:.3g} ms", f"{1e3 * s['torch']:.3g} ms", f"{s['autopart'] / s['torch']:.2f}")
        for name, s in rows
    )
    return markdown(("what", "autopart", "torch", "ratio"), lines)


def kernel_matches(found: Found) -> str:
    """The fused kernels of models, eager kernels that are left in a layer, and its bytes."""
    rows = (
        (r["model"], ", ".join(f"{name} x {count}" for name, count in r["calls"].items()),
         "{:.0f} -> {:.0f}".format(*r["eager"]), f"{r['bytes'][1] / r['bytes'][0] - 1:+.0%}")
        for r in found["rows"]
    )  # fmt: skip
    return captioned(found, markdown(("model", "calls in the model", "eager kernels a layer", "bytes a layer"), rows))


def kernels_on_cpu(found: Found) -> str:
    """Steps and peaks on a CPU with and without fused operators."""
    rows = (
        (r["model"], f"{1e3 * r['seconds']['unfused']:.0f}", f"{1e3 * r['seconds']['fused']:.0f}", f"{r['ratio']:.3f}",
         f"{r['peak_bytes']['unfused'] / 2**20:.0f}", f"{r['peak_bytes']['fused'] / 2**20:.0f}")
        for r in found["rows"]
    )  # fmt: skip
    head = ("model", "unfused, ms", "fused, ms", "ratio", "peak unfused, MiB", "peak fused, MiB")
    return captioned(found, markdown(head, rows))


def kernel_resources(found: Found) -> str:
    """Registers, shared memory and occupancy of every Triton function by compute capability, each the worst of those of
    several layers."""
    functions: dict[tuple[str, str], list[Found]] = {}
    for row in found["rows"]:
        functions.setdefault((row["kernel"], row["function"]), []).append(row)
    capabilities = sorted({row["capability"] for row in found["rows"]})

    def worst(rows: Sequence[Found], key: str, pick: Callable[[Iterable[float]], float], text: str) -> str:
        each = (pick(r[key] for r in rows if r["capability"] == c) for c in capabilities)
        return " / ".join(text.format(value) for value in each)

    lines = (
        (f"`{kernel}`", function, worst(rows, "registers", max, "{}"), worst(rows, "shared", max, "{:,}"),
         worst(rows, "occupancy", min, "{:.0%}"))
        for (kernel, function), rows in functions.items()
    )  # fmt: skip
    head = ("kernel", "function", "registers", "shared bytes", "occupancy")
    return captioned(found, markdown(head, lines))


FIGURES: dict[str, tuple[str, str, Callable[[Found], str]]] = {
    "published": ("accuracy.md", "accuracy.json", published),
    "memory": ("accuracy.md", "memory.json", memory),
    "measured": ("accuracy.md", "measured.json", measured),
    "regret": ("accuracy.md", "regret.json", regret),
    "planning": ("benchmarks.md", "planning.json", planning),
    "step-time-gpt2-2": ("benchmarks.md", "step_time_gpt2_2.json", step_time),
    "step-time-gpt2-4": ("benchmarks.md", "step_time_gpt2_4.json", step_time),
    "step-time-llama-2": ("benchmarks.md", "step_time_llama_2.json", step_time),
    "step-time-llama-4": ("benchmarks.md", "step_time_llama_4.json", step_time),
    "proof": ("sharding-rules.md", "proof.json", proof),
    "dropout": ("randomness.md", "dropout.json", dropout),
    "kernel-matches": ("kernels.md", "kernel_matches.json", kernel_matches),
    "kernels-on-cpu": ("kernels.md", "kernels_on_cpu.json", kernels_on_cpu),
    "kernel-resources": ("kernels.md", "kernel_resources.json", kernel_resources),
    "gptx-sizes": (
        "other-systems.md",
        "gptx_sizes.json",
        lambda found: captioned(found, gptx_sizes.table(found["rows"])),
    ),
    "families": (
        "other-systems.md",
        "families.json",
        lambda found: captioned(found, families.table(found["rows"])),
    ),
    "zoo": ("zoo.md", "zoo.json", lambda found: captioned(found, zoo.table(found["rows"]))),
    "outside": ("zoo.md", "zoo_outside.json", lambda found: captioned(found, zoo.table(found["rows"]))),
    "planning-zoo": ("zoo.md", "planning_zoo.json", lambda found: captioned(found, every_model.table(found["rows"]))),
}
"""Marker -> its document, its results, and what writes the table."""


def written() -> dict[Path, str]:
    """Every document with a table, and REPORTED -> its text as the last results have it; no results change nothing."""
    texts: dict[Path, str] = {}
    for marker, (document, results, table) in FIGURES.items():
        path = DOCS / document
        if (RESULTS / results).exists():
            text = texts.get(path) or path.read_text()
            texts[path] = written_between(text, marker, table(json.loads((RESULTS / results).read_text())))
    accuracy, steps = (json.loads((RESULTS / name).read_text()) for name in ("accuracy.json", "measured.json"))
    return {**texts, REPORTED: reported(accuracy, steps)}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, tell by the exit status")
    check = parser.parse_args().check
    for path, text in written().items():
        if check and path.read_text() != text:
            sys.exit(f"{path.name} is not what python -m benchmarks.figures writes")
        if not check:
            path.write_text(text)


if __name__ == "__main__":
    main()
