"""Estimates: FLOPs and MFU against published formulas and figures, and parts that add up."""

from __future__ import annotations

import csv
import json
from functools import cache
from pathlib import Path
from typing import Any

import models as tiny
import pytest
from typer.testing import CliRunner

import autopart
from autopart import Estimate
from autopart.cli import models as models
from autopart.cli.main import app
from autopart.hardware.mesh import Mesh, usable_bytes
from benchmarks.accuracy.published import DATA, Bench, read
from benchmarks.accuracy.published_runs import plan_of

pytestmark = pytest.mark.usefixtures("traced_once")

BENCH = Bench()
SEQSEL = "seqsel_2205.05198_iter_time_a100.csv"


@cache
def rows(file: str) -> list[dict[str, str]]:
    with (DATA / file).open() as lines:
        return list(csv.DictReader(lines))


def of_size(name: str, mesh: str, samples: int, sequence: int, **settings: Any) -> Estimate:
    model, batch = models.load(name, samples, sequence, meta=True, dropout=False)
    return autopart.estimate(model, mesh, batch, precision="bfloat16", **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layers", "hidden", "words"), [("gpt-1.7b", 24, 2304, 51200), ("gpt2-xl", 48, 1600, 50257)]
)
def test_the_flops_of_a_gpt(name: str, layers: int, hidden: int, words: int) -> None:
    """72 B L s h^2 (1 + s / 6h + V / 12hL): Korthikanti et al., arXiv 2205.05198, equation 7 without recompute."""
    made = of_size(name, "8:a100-80gb", 16, 1024, tp=4, recompute="full", micro_batch=8)
    s, h = 1024, hidden
    flops = 72 * 16 * layers * s * h**2 * (1 + s / 6 / h + words / 12 / h / layers)
    assert 3 * made.plan.forward_flops == pytest.approx(flops, rel=1e-2)
    assert made.mfu == pytest.approx(flops / (made.step_seconds * 8 * 312e12), rel=1e-2)


@pytest.mark.parametrize("number", [n for n, row in enumerate(rows(SEQSEL)) if row["metric_mfu_pct"]][:1])
def test_published_seconds_give_the_published_mfu(number: int) -> None:
    row = list(read(SEQSEL))[number]
    flops = 3 * plan_of(BENCH, row).forward_flops
    found = flops / (float(row.measured or 0) * Mesh.parse(row.mesh).size * 312e12)
    assert 100 * found == pytest.approx(float(rows(SEQSEL)[number]["metric_mfu_pct"]), rel=1e-2)


@pytest.mark.slow
def test_the_flops_of_a_llama() -> None:
    """6 (N - N_emb) + 12 L h s a token, as torchtitan counts them; 5,762 tokens/s of a device are 33.7 % of 989e12."""
    made = of_size("llama-3-8b", "8:h100-80gb", 16, 8192, dp=8, zero=3, recompute="selective", micro_batch=16)
    embedding = 128256 * 4096
    a_token = 6 * (8.030261248e9 - embedding) + 12 * 32 * 4096 * 8192
    tokens = 16 * 8192
    assert 3 * made.plan.forward_flops == pytest.approx(a_token * tokens, rel=1e-2)
    assert 5762 * 3 * made.plan.forward_flops / tokens / 989e12 == pytest.approx(0.337, rel=1e-2)
    assert made.tokens_per_second == pytest.approx(tokens / made.step_seconds)
    assert made.mfu == pytest.approx(a_token * tokens / (made.step_seconds * 8 * made.peak_flops), rel=1e-2)
    assert (made.peak_dtype, made.peak_flops) == ("bfloat16", 989.5e12)


SETTINGS: list[tuple[str, str, dict[str, Any]]] = [
    ("gpt2", "1:cpu", {}),
    ("gpt2", "4:cpu", {"tp": 2, "pp": 2, "micro_batch": 2, "recompute": "full"}),
    ("llama", "4:a100-80gb", {"dp": 2, "pp": 2, "micro_batch": 2, "zero": 3, "recompute": "selective"}),
    ("vit", "2:cpu", {"dp": 2, "micro_batch": 4}),
    ("mlp", "2:cpu", {"pp": 2, "micro_batch": 1}),
]


@cache
def small(number: int) -> Estimate:
    name, mesh, settings = SETTINGS[number]
    return autopart.estimate(*given(name, mesh), **settings)


def given(name: str, mesh: str) -> tuple[Any, str, Any]:
    model, batch = tiny.build(name)
    return model, mesh, batch


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_parts_add_up(number: int) -> None:
    made, (name, _, settings) = small(number), SETTINGS[number]
    plan = made.plan
    assert sum(made.breakdown.values()) == pytest.approx(made.step_seconds)
    assert min(made.breakdown.values()) >= 0
    assert (made.breakdown["recompute"] > 0) == ("recompute" in settings)
    assert (made.breakdown["bubble"] > 0) == (made.breakdown["p2p"] > 0) == (plan.pp > 1)
    assert (made.breakdown["communication"] > 0) == (plan.tp * plan.dp > 1)
    assert made.samples_per_second == pytest.approx(tiny.SAMPLES / made.step_seconds)
    tokens = tiny.SAMPLES * tiny.TOKENS / made.step_seconds
    assert made.tokens_per_second == (pytest.approx(tokens) if name in ("gpt2", "llama") else None)
    assert tuple(round(sum(parts.values())) for parts in made.memory) == made.memory_bytes
    room = usable_bytes(plan.mesh)
    assert made.headroom_bytes == tuple(round(room) - held for held in made.memory_bytes)


def test_more_micro_batches_are_as_many_flops() -> None:
    name, mesh, _ = SETTINGS[0]
    counts = {autopart.estimate(*given(name, mesh), micro_batch=n).plan.forward_flops for n in (1, 8)}
    assert len({round(count) for count in counts}) == 1


def test_what_does_not_fit_says_how_much_it_lacks() -> None:
    made = of_size("llama-3-8b", "1:a100-40gb", 1, 512)
    assert not made.fits and made.headroom_bytes[0] < 0
    assert "does not fit, " in str(made) and " lacking" in str(made)


@pytest.mark.slow
def test_the_shell_tells_it_all(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}))
    arguments = ["estimate", str(tmp_path), "4:h100-80gb", "--sequence", "32", "--pp", "2", "--global-batch", "8"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    for text in ("samples/s", "tokens/s", "MFU", "TFLOP/s (float32)", "bubble", "stage 0", "stage 1", "fits, "):
        assert text in shown.stdout, text
    told = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert set(told) == set(Estimate.__dataclass_fields__) - {"plan"}
    assert sum(told["breakdown"].values()) == pytest.approx(told["step_seconds"])
    assert told["fits"] == all(room >= 0 for room in told["headroom_bytes"])
