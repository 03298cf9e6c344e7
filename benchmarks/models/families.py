"""The architectures that other systems name: exact on 4 ranks, and planned at their published sizes.

    python -m benchmarks.models.families

Exactness is of a tiny model in float64: one step on 4 simulated ranks against one process, under each of `PLANS`. Some
models compute a part in float32. Sizes are `SIZES`, or the defaults of transformers' configurations; their plans are
for bfloat16 with float32 master copies on `MESH`, of `SAMPLES` samples of at most `LONGEST` tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import autopart
from benchmarks.coverage.zoo_models import build, published, with_batched_experts
from benchmarks.support.command import command_line

RESULTS = Path(__file__).parents[1] / "results" / "families.json"
MESH, SAMPLES, LONGEST = "4x8:a100-80gb", 256, 1024
FAMILIES: dict[str, tuple[str, str]] = {
    "BLOOM": ("clm", "bloom"),
    "ALBERT": ("mlm", "albert"),
    "OPT": ("clm", "opt"),
    "BERT": ("mlm", "bert"),
    "GPT-2": ("clm", "gpt2"),
    "Llama": ("clm", "llama"),
    "T5": ("s2s", "t5"),
    "Mixtral": ("clm", "mixtral"),
    "Qwen2": ("clm", "qwen2"),
    "ViT": ("img", "vit"),
    "Swin": ("img", "swin"),
}
"""Name in the table -> (task, model type) of `benchmarks.coverage.zoo_models`."""
SIZES: dict[str, dict[str, Any]] = {
    "BLOOM": {"hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250880},
}
"""BLOOM-560m, and what else is not a default."""
LISTED = {
    "PipeGoose": ("BLOOM", "ALBERT", "OPT", "BERT", "GPT-2", "Llama", "T5"),
    "Galvatron": ("Llama", "Mixtral", "Qwen2", "GPT-2", "BERT", "T5", "ViT", "Swin"),
}
"""System -> what its folders of models, its code or its tests name."""
PLANS: tuple[dict[str, Any], ...] = (
    {"tp": 2, "pp": 2, "micro_batch": 2},
    {"dp": 2, "pp": 2, "zero": 1, "recompute": "full", "micro_batch": 2},
)


def exact(name: str, settings: dict[str, Any]) -> float:
    """The largest error of the loss and of a gradient, on 4 ranks against one process."""
    model, batch = build(*FAMILIES[name])
    with_batched_experts(model)  # torch's grouped product takes no float64
    found = autopart.check(
        model.double(), "4:cpu", {key: converted(value, torch.float64) for key, value in batch.items()}, **settings
    )
    return max(found.loss_error, found.gradient_error)


def converted(value: Any, dtype: torch.dtype) -> Any:
    """A tensor of floating-point numbers in `dtype`; anything else as it is."""
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def planned(name: str) -> dict[str, Any]:
    """The plan of the published size."""
    model, batch = published(*FAMILIES[name], 8, LONGEST, SIZES.get(name, {}), torch.bfloat16)
    batch = {key: converted(value, torch.bfloat16) for key, value in batch.items()}
    started = time.process_time()
    plan = autopart.plan(model, MESH, batch, global_batch=SAMPLES, precision="bfloat16", master="float32")
    return {
        "parameters": parameters(model),
        "plan": f"pp={plan.pp} dp={plan.dp} tp={plan.tp}, ZeRO {plan.zero}",
        "recompute": ", ".join(sorted({mode for stage in plan.stages for mode in stage.recompute})),
        "step": plan.step_seconds,
        "gap": plan.gap,
        "cpu": time.process_time() - started,
    }


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def table(rows: dict[str, dict[str, Any]]) -> str:
    plans = (", ".join(f"{key}={value}" for key, value in plan.items() if key != "micro_batch") for plan in PLANS)
    head = ("model", "named by", *(f"error, {plan}" for plan in plans), "parameters", "plan", "recompute", "gap")
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for name, row in rows.items():
        by = ", ".join(system for system, names in LISTED.items() if name in names)
        errors = " | ".join(f"{error:.0e}" for error in row["errors"])
        of = row["published"]
        size = f"{of['parameters'] / 1e9:.2f} B | {of['plan']} | {of['recompute']} | {of['gap']:.2%}"
        lines.append(f"{name} | {by} | {errors} | {size}")
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), metavar="NAME")
    options = parser.parse_args()
    rows = {}
    for name in options.only:
        rows[name] = {"errors": [exact(name, settings) for settings in PLANS], "published": planned(name)}
        print(name, rows[name], flush=True)
    print(table(rows))
    if options.only == list(FAMILIES):
        RESULTS.write_text(json.dumps({"command": command_line(__spec__.name), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
