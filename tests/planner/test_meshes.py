"""The search for a mesh, against planning on each mesh in turn."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import models
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import autopart
from autopart import MeshChoice, PartitionError
from autopart.cli.main import app
from autopart.hardware.mesh import Mesh
from autopart.passes.source import Source
from autopart.planner.explain.mesh_search import device_counts, fewest_devices, meshes_of, ranked
from autopart.planner.make_plan import make_plan, request_of

pytestmark = pytest.mark.usefixtures("traced_once")

Given = tuple[nn.Module, models.Batch]
WIDTH, SAMPLES = 2048, 1024
SETTINGS: dict[str, Any] = {"global_batch": SAMPLES}


@pytest.fixture(scope="module")
def given() -> Given:
    """A model with so much to do that more devices are faster."""
    with torch.device("meta"):
        model = models.Mlp(3, WIDTH)
    return model, {"x": torch.zeros(8, WIDTH), "target": torch.zeros(8, 8)}


@pytest.fixture(scope="module")
def seconds(given: Given) -> Callable[[str], float]:
    """The step time on a mesh, planned for alone; from one trace."""
    source, request = Source(*given, torch.float32), request_of(*given, **SETTINGS)
    return cache(lambda mesh: make_plan(source, Mesh.of(mesh), request).step_seconds)


def test_counts_that_one_would_ask_for() -> None:
    assert device_counts(64, 8) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    assert [n // 8 for n in device_counts(8 * 20, 8) if n % 8 == 0] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20]
    assert device_counts(3, 8) == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "per_host", "meshes"),
    [
        ("64:h100-80gb", 8, ["8x8:h100-80gb"]),
        ("64:h100-80gb@ethernet", 4, ["16x4:h100-80gb@ethernet"]),
        ("4:h100-80gb", 8, ["4:h100-80gb"]),
        ("2x3:h100-80gb", 8, ["2x3:h100-80gb"]),
        ("12:h100-80gb", 8, []),
    ],
)
def test_devices_fill_hosts(text: str, per_host: int, meshes: list[str]) -> None:
    assert [str(mesh) for mesh in meshes_of(text, per_host)] == meshes


@pytest.mark.slow
def test_the_fastest_shape_comes_first(given: Given, seconds: Callable[[str], float]) -> None:
    said: list[str] = []
    found = autopart.search_mesh(
        *given, devices="8:h100-80gb", per_host=(1, 2, 4, 8), on_progress=said.append, **SETTINGS
    )
    alone = {mesh: seconds(mesh) for mesh in ("8x1:h100-80gb", "4x2:h100-80gb", "2x4:h100-80gb", "8:h100-80gb")}
    assert {str(c.mesh): c.step_seconds for c in found} == pytest.approx(alone)
    assert found[0].step_seconds == min(alone.values()) and [c.step_seconds for c in found] == sorted(alone.values())
    assert len(said) == len(alone) and found[0].plan is not None and found[0].plan.mesh == found[0].mesh


PRICES = {"h100-80gb": 3.0, "a100-80gb": 2.0}


@pytest.mark.slow
def test_the_cheapest_comes_first_with_prices(given: Given, seconds: Callable[[str], float]) -> None:
    asked = ["1:h100-80gb", "4:h100-80gb", "1:a100-80gb", "4:a100-80gb"]
    found = autopart.search_mesh(*given, devices=asked, prices=PRICES, **SETTINGS)
    alone = {mesh: seconds(mesh) for mesh in asked}
    costs = {mesh: PRICES[mesh.partition(":")[2]] * int(mesh[0]) * taken / 3600 for mesh, taken in alone.items()}
    assert {str(c.mesh): c.cost for c in found} == pytest.approx(costs)
    assert [c.cost for c in found] == sorted(costs.values())
    assert found[0].tokens_per_second == pytest.approx(SAMPLES / found[0].step_seconds)
    assert found[0].cost_per_million_tokens == pytest.approx(min(costs.values()) / SAMPLES * 1e6)
    beaten = {m for m in asked for o in asked if alone[o] < alone[m] and costs[o] < costs[m]}
    assert alone["4:h100-80gb"] < alone["1:h100-80gb"] and beaten
    assert {str(c.mesh) for c in found if c.front} == set(asked) - beaten


@pytest.mark.slow
@pytest.mark.parametrize("share", [1.0, 0.7, 0.3])
def test_the_fewest_devices_that_meet_a_target(given: Given, seconds: Callable[[str], float], share: float) -> None:
    counts = [1, 2, 4, 8]
    alone = {count: seconds(f"{count}:cpu") for count in counts}
    target = share * alone[1]
    found = autopart.search_mesh(*given, devices="8:cpu", target_seconds=target, **SETTINGS)
    wanted = next(count for count in counts if alone[count] <= target)
    assert found[0].mesh.size == wanted and found[0].meets and found[0].step_seconds <= target
    tried = {c.mesh.size: c for c in found}
    smaller = [count for count in counts if count < wanted]
    assert not smaller or not tried[smaller[-1]].meets


@pytest.mark.slow
def test_a_target_that_none_meets(given: Given) -> None:
    found = autopart.search_mesh(*given, devices="2:cpu", target_seconds=1e-9, **SETTINGS)
    assert [c.mesh.size for c in found] == [2] and not found[0].meets and found[0].plan is not None


def choice(mesh: Mesh, taken: float, target: float) -> MeshChoice:
    class Planned:
        step_seconds = taken

    return MeshChoice(mesh, Planned(), meets=taken <= target)  # type: ignore[arg-type]


def cases() -> Iterator[tuple[list[float], float]]:
    """Seconds of 1 to 16 hosts' meshes that get faster as they double, some slower than the smaller before them."""
    sizes = [mesh.size for mesh in meshes_of("128:h100-80gb", 8, smaller=True)]
    for rough in (0.0, 0.6):
        taken = [1000 / n * (1 + rough * bool(n & (n - 1))) for n in sizes]
        yield from ((taken, target) for target in (1000.0, 130.0, 61.0, 41.0, 40.0, 20.0, 13.5, 9.0, 7.9))


@pytest.mark.parametrize(("taken", "target"), list(cases()))
def test_halving_finds_what_trying_all_does(taken: list[float], target: float) -> None:
    meshes = meshes_of("128:h100-80gb", 8, smaller=True)
    by_mesh = dict(zip(meshes, taken, strict=True))
    tried: list[Mesh] = []

    def choose(mesh: Mesh) -> MeshChoice:
        tried.append(mesh)
        return choice(mesh, by_mesh[mesh], target)

    found = fewest_devices(meshes, choose)
    met = next((m for m in meshes if by_mesh[m] <= target), None)
    assert (found and found.mesh) == met
    assert met is None or met is meshes[0] or meshes[meshes.index(met) - 1] in tried


def test_nothing_on_the_front_is_beaten() -> None:
    meshes = meshes_of("64:h100-80gb", 8, smaller=True)
    taken = [10, 6, 7, 4, 2, 2, 3, 1, 1, 1, 0.5]
    made = ranked([choice(m, t, 100) for m, t in zip(meshes, taken, strict=True)])
    unbeaten = [mesh.size for i, mesh in enumerate(meshes) if all(t > taken[i] for t in taken[:i])]
    assert sorted(c.mesh.size for c in made if c.front) == unbeaten
    assert [c.step_seconds for c in made] == sorted(taken)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"devices": "12:cpu"}, "12 devices fill no hosts of 8"),
        ({"devices": "2:cpu", "prices": {}}, "no price for cpu"),
        ({"devices": "2:cpu", "prices": {"cpu": 0.0}}, "not a positive number"),
        ({"devices": []}, "no devices"),
        ({"devices": "2:h1000"}, "unknown device"),
        ({"devices": "2:cpu", "tp": 3}, "no mesh of these devices has a plan"),
    ],
)
def test_what_is_refused(given: Given, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        autopart.search_mesh(*given, **settings)


@pytest.mark.slow
def test_the_shell(tmp_path: Any) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 96}')
    line = ["mesh", str(file), "--devices", "2:cpu", "--devices", "1:cpu", "--price", "cpu=0.1", "--sequence", "16"]
    shell = CliRunner().invoke(app, line)
    assert shell.exit_code == 0, shell.output
    assert "tokens/s" in shell.stdout and "2:cpu" in shell.stdout and "a M tokens" in shell.stdout
    told = json.loads(CliRunner().invoke(app, [*line, "--json"]).stdout)
    costs = [row["cost"] for row in told["choices"]]
    assert costs == sorted(costs) and told["plan"]["mesh"]["device"]["name"] == "cpu"
    assert CliRunner().invoke(app, [*line[:-2], "--price", "cpu=cheap"]).exit_code == 2
