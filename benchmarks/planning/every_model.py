"""Plans every architecture of transformers at the sizes of its default configuration, and large models at those that
their authors published, on 8 hosts of 8 H100 in bfloat16: CPU seconds, peak memory, gap, and what was traced in full.

Every model has a process of its own, forked after the imports: its CPU seconds count building the model on meta and
planning it, its peak bytes also what the imports take (some 0.4 GiB).
"""

from __future__ import annotations

import functools
import json
import os
import platform
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.support.alone import Row, alone
from benchmarks.support.command import command_line

RESULTS = Path(__file__).parents[1] / "results" / "planning_zoo.json"
MESH = "8x8:h100-80gb"
GLOBAL_BATCH = 64
EXAMPLE = 2
"""Samples of the batch that is traced."""
LONGEST = 2048
"""Tokens of a sample, where the model takes so many."""
CPU_GOAL, BYTES_GOAL = 10.0, 2**30
CPU_MOST, BYTES_MOST = 60.0, 2 * 2**30
SHARE = 0.95
"""Of the models, which are to be within the goals; none is to be above the most."""

LATENT = {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
LARGE: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    # Name -> task, model type, and what its config says otherwise than by default; the source is its authors' config.
    "llama-3-8b": ("clm", "llama", {}),
    "llama-3-70b": ("clm", "llama", {}),
    "llama-3-405b": ("clm", "llama", {}),
    "mixtral-8x7b": ("clm", "mixtral", {}),
    "mixtral-8x22b": (
        "clm", "mixtral",
        {
            "hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56, "num_attention_heads": 48,
            "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32768,
        },
    ),
    "qwen3-32b": (
        "clm", "qwen3",
        {
            "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        },
    ),
    "qwen3-235b-a22b": (
        "clm", "qwen3_moe",
        {
            "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 94,
            "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
            "num_experts_per_tok": 8, "vocab_size": 151936,
        },
    ),
    "deepseek-v3": (
        "clm", "deepseek_v3",
        {
            **LATENT, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
            "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256,
            "num_experts_per_tok": 8, "n_shared_experts": 1, "first_k_dense_replace": 3, "vocab_size": 129280,
        },
    ),
    "gemma-3-27b": (
        "clm", "gemma3_text",
        {
            "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "num_attention_heads": 32,
            "num_key_value_heads": 16, "head_dim": 128, "sliding_window": 1024, "vocab_size": 262208,
        },
    ),
    "falcon-40b": (
        "clm", "falcon",
        {
            "hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128, "num_kv_heads": 8,
            "new_decoder_architecture": True, "bias": False, "vocab_size": 65024,
        },
    ),
    "falcon-180b": (
        "clm", "falcon",
        {
            "hidden_size": 14848, "num_hidden_layers": 80, "num_attention_heads": 232, "num_kv_heads": 8,
            "new_decoder_architecture": True, "bias": False, "vocab_size": 65024,
        },
    ),
    "bloom-176b": ("clm", "bloom", {"hidden_size": 14336, "n_layer": 70, "n_head": 112, "vocab_size": 250880}),
    "gpt-neox-20b": (
        "clm", "gpt_neox",
        {
            "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44, "num_attention_heads": 64,
            "vocab_size": 50432,
        },
    ),
    "opt-175b": (
        "clm", "opt",
        {"hidden_size": 12288, "ffn_dim": 49152, "num_hidden_layers": 96, "num_attention_heads": 96},
    ),
    "t5-11b": ("s2s", "t5", {}),
    "mamba2-2.7b": (
        "clm", "mamba2",
        {
            "hidden_size": 2560, "num_hidden_layers": 64, "num_heads": 80, "head_dim": 64, "n_groups": 1,
            "state_size": 128, "vocab_size": 50288,
        },
    ),
    "vit-huge": ("img", "vit", {}),
    "whisper-large": (
        "", "whisper",
        {
            "d_model": 1280, "encoder_layers": 32, "decoder_layers": 32, "encoder_attention_heads": 20,
            "decoder_attention_heads": 20, "encoder_ffn_dim": 5120, "decoder_ffn_dim": 5120, "num_mel_bins": 80,
        },
    ),
}  # fmt: skip


def large(name: str, dtype: Any) -> tuple[Any, dict[str, Any]]:
    """A large model on meta, with its batch."""
    import torch

    from autopart.cli.models import SIZES
    from benchmarks.coverage.zoo_models import published

    task, model_type, settings = LARGE[name]
    settings = settings or SIZES[name][1]
    if task:
        return published(task, model_type, EXAMPLE, LONGEST, settings, dtype)
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    with torch.device("meta"):
        model = WhisperForConditionalGeneration._from_config(WhisperConfig(**settings, use_cache=False), dtype=dtype)
    labels = torch.randint(3, 100, (EXAMPLE, 448))
    return model.train(), {"input_features": torch.rand(EXAMPLE, settings["num_mel_bins"], 3000), "labels": labels}


def trial(task: str, name: str) -> Row:
    """Build a model on meta and plan it; `task` is "large" for one of LARGE."""
    import torch

    import autopart
    from benchmarks.coverage.zoo_models import FLOAT32, PUBLISHED_SETTINGS, Unbuildable, published

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    dtype = torch.float32 if task != "large" and name in FLOAT32 else torch.bfloat16
    try:
        model, batch = large(name, dtype) if task == "large" else published(task, name, EXAMPLE, LONGEST, dtype=dtype)
    except Unbuildable as error:
        return {"outcome": f"not built: {error}"}
    batch = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}
    row: Row = {"parameters": sum(p.numel() for p in model.parameters())}
    row["otherwise"] = [f"float32: {FLOAT32[name]}"] if dtype is torch.float32 else []
    row["otherwise"] += [PUBLISHED_SETTINGS[name][1]] if name in PUBLISHED_SETTINGS else []
    row["sample"] = {k: list(v.shape[1:]) for k, v in batch.items() if isinstance(v, torch.Tensor)}
    try:
        plan = autopart.plan(model, MESH, batch, global_batch=GLOBAL_BATCH, precision=dtype)
    except autopart.PartitionError as error:
        return {**row, "outcome": f"refused: {error.what}" + (f" ({error.why})" if error.why else "")}
    return {
        **row,
        "outcome": "planned",
        "gap": plan.gap,
        "step_seconds": plan.step_seconds,
        "plan": f"{plan.degrees} zero {plan.zero} recompute {plan.recompute}",
        "replicated": list(plan.replicated),
        "traced in full": [note for note in plan.notes if "traced" in note],
    }


def main(only: Sequence[str], every: int, limit: int, path: Path | None) -> int:
    """Plan the models asked for ("large:llama-3-8b", "clm:gpt2"; none: the large ones and one of `every` so many
    architectures), print the table, write the figures; the exit status is 1 where the goals are missed."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical", "OMP_NUM_THREADS": "1"}
    import torch
    import transformers.modeling_utils  # noqa: F401  # imported once, before the forks

    import autopart  # noqa: F401
    from benchmarks.coverage.zoo_models import architectures

    torch.export.export(torch.nn.Identity(), (torch.ones(1),))  # which imports what exports need
    names = [*(("large", name) for name in LARGE), *architectures()[:: 1 if only else every]]
    todo = [pair for pair in names if not only or ":".join(pair) in only]
    rows = []

    def tried(pair: tuple[str, str]) -> Row:
        return {"task": pair[0], "model": pair[1], **alone(functools.partial(trial, *pair), limit)}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for row in pool.map(tried, todo):
            row.setdefault("outcome", f"failed: {row.get('failed')}")
            rows.append(row)
            told = f"{row['cpu']:.1f} CPU s {row['peak_bytes'] / 2**30:.2f} GiB gap {row.get('gap', 0):.2%}"
            print(f"{len(rows)}/{len(todo)} {row['task']}:{row['model']} {told} {row['outcome']}", flush=True)
    print(table(rows))
    if path or not only:
        command = command_line("benchmarks.planning.cold")
        found = {"command": command, "python": platform.python_version(), "rows": rows}
        (path or RESULTS).write_text(json.dumps(found, indent=1) + "\n")
    return 0 if met(rows) else 1


def met(rows: Sequence[Row]) -> bool:
    """Whether the goals are met by all that could be built."""
    built = [row for row in rows if not row["outcome"].startswith("not built")]
    within = sum(row["cpu"] <= CPU_GOAL and row["peak_bytes"] <= BYTES_GOAL for row in built)
    most = all(row["cpu"] <= CPU_MOST and row["peak_bytes"] <= BYTES_MOST for row in built)
    return most and within >= SHARE * len(built)


def table(rows: Sequence[Row]) -> str:
    """The figures as Markdown: the large models one by one, then a summary of all, what is above a goal, and why what
    was not planned was not."""
    lines = ["| model | parameters | CPU s | peak memory | gap | plan |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row["task"] == "large" and row["outcome"] == "planned":
            size = f"{row['parameters'] / 1e9:.1f} B"
            figures = f"{row['cpu']:.1f} | {row['peak_bytes'] / 2**30:.2f} GiB | {row['gap']:.2%}"
            lines.append(f"| {row['model']} | {size} | {figures} | {row['plan']} |")
    return "\n".join([*lines, "", *summary(rows)])


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """What the figures say of all models, a line each."""
    kinds = Counter(row["outcome"].partition(":")[0] for row in rows)
    yield f"{len(rows)} models: {', '.join(f'{many} {kind}' for kind, many in kinds.most_common())}."
    built = [row for row in rows if not row["outcome"].startswith("not built")]
    for what, field, goal, most, unit in (
        ("CPU seconds", "cpu", CPU_GOAL, CPU_MOST, 1.0),
        ("Peak GiB", "peak_bytes", BYTES_GOAL, BYTES_MOST, 2.0**30),
    ):
        values = sorted(row[field] for row in built)
        over = [f"{r['task']}:{r['model']} {r[field] / unit:.1f}" for r in built if r[field] > goal]
        within = sum(value <= goal for value in values) / max(1, len(values))
        above = sum(value > most for value in values)
        yield (
            f"{what}: median {values[len(values) // 2] / unit:.2f}, at most {values[-1] / unit:.2f}; "
            f"{within:.1%} within {goal / unit:g}, {above} above {most / unit:g}; "
            f"above {goal / unit:g}: {', '.join(over) or 'none'}."
        )
    gaps = sorted((row["gap"], f"{row['task']}:{row['model']}") for row in built if "gap" in row)
    if gaps:
        yield f"Gap: median {gaps[len(gaps) // 2][0]:.2%}, at most {gaps[-1][0]:.2%} ({gaps[-1][1]})."
    full = _by_note((note, row) for row in built for note in row.get("traced in full", ()))
    yield from (f"{note}: {names}" for note, names in full.items())
    for title, notes in (
        ("not as by default", ((note, row) for row in rows for note in row.get("otherwise", ()))),
        ("not planned", ((row["outcome"], row) for row in rows if row["outcome"] != "planned")),
    ):
        if named := _by_note(notes):
            yield from ("", f"| {title} | which |", "|---|---|")
            yield from (f"| {note} | {names} |" for note, names in named.items())


def _by_note(notes: Iterable[tuple[str, Row]]) -> dict[str, str]:
    """Each note once, with the names of the models that it is of."""
    found: dict[str, list[str]] = {}
    for note, row in notes:
        found.setdefault(note.replace("|", "/"), []).append(f"{row['task']}:{row['model']}")
    return {note: ", ".join(names) for note, names in found.items()}
