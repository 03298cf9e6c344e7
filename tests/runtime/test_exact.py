"""Training on several processes gives what one process gives.

Each of two ranks of GPT-2 traces for itself, as a user's do. All others are forks of a process that has traced and
planned for them: what they prove is what runs, on as many processes. GPT-2 and Llama have between them every kind of
configuration, in float64, where an error shows best; the other models have those that split their own operators, and
in float32 what planner and model do by themselves. AUTOPART_EXAMPLES gives all to all.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import exact_worker
import pytest
from ranks import run_apart

NAMES = ["gpt2", "llama", "bert", "t5", "vit", "mlp"]
TRACING = ["gpt2"]
"""Models whose two ranks trace each for itself."""
ALL = "AUTOPART_EXAMPLES" in os.environ
LIMIT = {"float32": 1e-5, "float64": 1e-10}
SPLIT = {"tp": 2, "pp": 2, "micro_batch": 4}
Row = tuple[str, dict[str, Any]]


def table(name: str, ranks: int) -> list[Row]:
    """The configurations of a model; {} is the solver's own choice."""
    if ranks == 2:
        other = ({"pp": 2, "micro_batch": 2}, {"dp": 2}) if ALL or name in ("gpt2", "llama") else ()
        rows = [("float32", s) for s in ({"tp": 2}, {}, *other)]
        levels = [1, 2, 3] if name == "gpt2" else [3] if name == "llama" else []
        beside = [forced(i, "none", "SGD", "h100-80gb") for i in range(4)] if name == "gpt2" else []
        changes = [forced(i, "none", "SGD") for i in levels] + beside
        return rows + [("float32", {"dp": 2, "micro_batch": 4, "forced": change}) for change in changes]
    rows = [("float64", s) for s in ({**SPLIT, "recompute": "full"}, *shared(name))]
    if ALL or name == "gpt2":
        rows += [("float64", {"dp": 2, "pp": 2, "micro_batch": 4, "schedule": "gpipe"}), ("float64", {})]
    if ALL or name == "llama":
        # With tp=4 more ranks than heads of keys and values.
        settings = ({"dp": 2, "tp": 2, "micro_batch": 4}, {"tp": 4, "micro_batch": 4}, {"dp": 4, "zero": 1})
        rows += [("float64", s) for s in settings]
    if ALL or name == "mlp":  # values skip stages
        rows += [("float64", {"pp": 4, "micro_batch": 2})]
    return [*rows, *(("float32", s) for s in ((SPLIT, {"dp": 2, "tp": 2}, {"dp": 4, "zero": 1}, {}) if ALL else ()))]


def shared(name: str) -> list[dict[str, Any]]:
    """Configurations whose data-parallel ranks share states, gradients or weights, with some blocks recomputed: GPT-2
    and Llama have between them every ZeRO level under tensor and under pipeline parallelism, and each level with its
    optimizer on the host."""
    by_tp, by_pp = ({"dp": 2, axis: 2, "micro_batch": 4} for axis in ("tp", "pp"))
    if name not in AGAIN:
        return [{**by_pp, "forced": forced(3, "full mincut none")}]
    again = {"constraints": [f"strategy {name} n+again over tp" for name in AGAIN[name]]}
    gpt2 = [
        {**by_tp, **again, "forced": forced(3, "mincut selective full")},
        {**by_tp, "forced": forced(2, "selective"), "offload": "optimizer"},
        {**by_pp, "forced": forced(1, "full")},
        {**by_pp, "forced": forced(3, "mincut none"), "offload": "optimizer"},
        *({"dp": 4, "micro_batch": 4, "forced": forced(z, "full none", shard_size=2)} for z in (1, 2, 3)),
    ]
    llama = [
        {**by_tp, **again, "forced": forced(3, "full selective")},
        {**by_tp, "forced": forced(1, "none mincut"), "offload": "optimizer"},
        {**by_pp, "forced": forced(2, "none")},
    ]
    return gpt2 + llama if ALL else gpt2 if name == "gpt2" else llama


AGAIN = {"gpt2": ["*.c_attn/matmul", "*.c_fc/matmul"], "llama": ["*.[qkv]_proj/linear", "*.gate_proj/linear"]}
"""Products whose operands are gathered again for backward."""


def forced(zero: int, modes: str, optimizer: str = "AdamW", device: str = "cpu", shard_size: int = 0) -> dict[str, Any]:
    """What the worker changes in a plan: the ZeRO level, what its blocks do by turns, the device, of which some sum
    gradients beside the backward, and the ranks that ZeRO divides among; and an optimizer of its own."""
    return {
        "zero": zero, "modes": modes.split(), "optimizer": optimizer, "device": device, "shard_size": shard_size
    }  # fmt: skip


Results = tuple[int, dict[str, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Results]:
    """Trains a model on so many ranks, and with it all that those ranks, or forks of one process, train one after the
    other: the exit status and the results of every configuration."""

    @cache
    def run(ranks: int, traces_itself: bool) -> Results:
        folder = tmp_path_factory.mktemp("exact")
        names = [name for name in NAMES if (ranks == 2 and name in TRACING) == traces_itself]
        tables = {name: table(name, ranks) for name in names}
        status = run_apart(exact_worker.train_tables, tables, folder, ranks, traces_itself)
        return status, {name: read(folder / f"{name}.json") for name in names}

    return lambda name, ranks: run(ranks, ranks == 2 and name in TRACING)


def read(file: Path) -> list[dict[str, Any]]:
    """The results of a model's configurations, as far as the ranks came."""
    return json.loads(file.read_text()) if file.exists() else []


@pytest.mark.processes
@pytest.mark.timeout(1800)  # the first waits for all of the same ranks
@pytest.mark.parametrize(
    ("name", "ranks", "dtype"), [(n, r, d) for n in NAMES for r in (2, 4) for d in sorted(dict(table(n, r)))]
)
def test_several_processes_train_like_one(
    train: Callable[[str, int], Results], name: str, ranks: int, dtype: str
) -> None:
    status, found = train(name, ranks)
    results = found[name]
    wrong = [f"{r['settings']}: {'; '.join(why)}" for r in results if r["dtype"] == dtype and (why := judge(r))]
    assert not wrong, "\n".join(wrong)
    missing = [row for row in table(name, ranks)[len(results) :] if row[0] == dtype]
    assert not missing, f"status {status}, stopped before or in {missing[0]}, see stderr"
    assert status == 0 or any(len(rows) < len(table(n, ranks)) for n, rows in found.items()), "failed after the last"


def judge(result: dict[str, Any]) -> list[str]:
    """What is wrong with a result of the worker, after the plan that it belongs to."""
    if "refused" in result:
        return [f"refused: {result['refused']}"]
    limit, wrong = LIMIT[result["dtype"]], []
    if not result["loss"] <= limit:
        wrong.append(f"the loss is off by {result['loss']:.1e}")
    if len(set(result["losses"])) > 1:
        wrong.append(f"the ranks have different losses: {result['losses']}")
    if not math.isclose(result["local"], result["losses"][0], rel_tol=limit):
        wrong.append(f"ranks that bring their own share: loss {result['local']}, not {result['losses'][0]}")
    for what in ("gradients", "state"):
        error, tensor = result[what]
        if not error <= limit:
            wrong.append(f"{what} off by {error:.1e}, worst {tensor}")
    return [result["plan"], *wrong] if wrong else []
