"""Profiles of devices and links: what is measured, what is made of it, and what is read back."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import autopart
from autopart import hardware
from autopart.cli.main import app
from autopart.cost.collectives import COLLECTIVES, all_reduce_seconds, message_seconds, p2p_seconds
from autopart.cost.compute import work_in, work_seconds
from autopart.cost.measured_tables import KIND_OF, KINDS, attention_seconds, grid_of, operator_seconds, product_seconds
from autopart.cost.resharding import row_seconds
from autopart.cost.training_state import OPTIMIZER_STATES, Training
from autopart.cost.update_seconds import update_seconds
from autopart.errors import PartitionError
from autopart.hardware import load_hardware
from autopart.hardware.measured import Measured, Wire, read_measured, read_wire
from autopart.hardware.mesh import Mesh
from autopart.runtime.calibrate.measure import Measurements
from autopart.runtime.calibrate.operators import OPERATORS
from autopart.runtime.calibrate.profile import line, middle, profile, to_toml
from autopart.runtime.calibrate.run import calibrate
from autopart.runtime.optimizers import OPTIMIZERS
from autopart.sharding.resharding import RESHARDS
from autopart.sharding.rules import has_rule

pytestmark = pytest.mark.usefixtures("traced_once")

RATE, BANDWIDTH, STEP = 1e11, 2e10, 1e-6
SIZES = (16, 64, 256, 1024)


def found(ranks: int = 2) -> Measurements:
    """Measurements of a machine that is as simple as can be: products of bfloat16 at twice the rate of float32's."""
    made = Measurements(ranks, 1, 2)

    def add(table: str, entry: str, sizes: tuple[float, ...], *seconds: float) -> None:
        made.cases[table, entry, sizes] = [tuple(s * noise for s in seconds) for noise in (1.0, 0.9, 1.5)]

    for (dtype, rate), m, n, k in itertools.product((("float32", 1), ("bfloat16", 2)), SIZES, SIZES, SIZES):
        if m * n * k <= 256**3:
            add("products", dtype, (m, n, k), 2 * m * n * k / (rate * RATE))
    for length, causal in itertools.product((64, 256), (0, 1)):
        add("attention", "float32", (length, 64, causal), 1 / RATE, 3 / RATE)
    for kind, nbytes in itertools.product(OPERATORS, (1e4, 1e6)):
        slow = 1 + (kind == "tanh")
        add("operators", kind, (nbytes,), STEP + slow * nbytes / BANDWIDTH, STEP + nbytes / BANDWIDTH)
    for optimizer, nbytes in itertools.product(OPTIMIZERS, (1e4, 1e6)):
        add("updates", optimizer, (nbytes,), (2 + OPTIMIZER_STATES[optimizer]) * nbytes / BANDWIDTH)
    add("accumulate", "", (1e6,), 3e6 / BANDWIDTH)
    for name, size, nbytes in itertools.product(MESSAGES if ranks > 1 else (), (2, ranks), (1e4, 1e6)):
        add(name, str(size), (nbytes,), 1e-4 + size * nbytes / 1e9)
    for nbytes in (1e4, 1e6) if ranks > 1 else ():
        add("p2p", "", (nbytes,), 5e-5 + nbytes / 1e9)
    add("alone", "", (), 1.1 * ranks / 2)
    add("overlap", "", (), 1.2)
    return made


MESSAGES = [*COLLECTIVES, *(f"merged_{name}" for name in ("all_reduce", "all_gather", "reduce_scatter"))]


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Leave the tables as they were."""
    devices, links = dict(hardware.DEVICES), dict(hardware.LINKS)
    yield
    for table, before in ((hardware.DEVICES, devices), (hardware.LINKS, links)):
        assert isinstance(table, dict)
        table.clear()
        table.update(before)


def text_of(ranks: int = 2, name: str = "mine") -> str:
    return to_toml(*profile(found(ranks), Mesh.of(f"{ranks}:cpu"), name, "cpu"), name)


def mesh_of(folder: Path, ranks: int = 2) -> Mesh:
    file = folder / "mine.toml"
    file.write_text(text_of(ranks))
    assert load_hardware(file) == ["mine", "mine"]
    return Mesh.of(f"{ranks}:mine")


def tables_of(mesh: Mesh) -> tuple[Measured, Wire]:
    assert mesh.device.measured is not None and mesh.intra.measured is not None
    return mesh.device.measured, mesh.intra.measured


# ---- the file -------------------------------------------------------------------------------------------------------


def test_a_profile_is_read_back(tmp_path: Path) -> None:
    mesh = mesh_of(tmp_path)
    measured, wire = tables_of(mesh)
    assert (measured.type, measured.ranks, measured.threads, measured.alone) == ("cpu", 2, 1, 1.0)
    assert measured.products.keys() == {"float32", "bfloat16"} and set(measured.operators) == set(KINDS)
    assert all(row[-1] == 0.5 for rows in measured.products.values() for row in rows)
    assert wire.collectives.keys() == set(MESSAGES) and set(wire.collectives["all_reduce"]) == {"2"}
    assert mesh.device.flops == {"float32": RATE, "bfloat16": 2 * RATE}
    assert mesh.device.memory_bytes == Mesh.of("2:cpu").device.memory_bytes and mesh.intra.name == "mine"
    again = Mesh.from_json(json.loads(json.dumps(mesh.to_json())))
    assert again == mesh and hash(again) == hash(mesh)
    assert str(Mesh.of(str(mesh))) == str(mesh) == "2:mine"


def test_one_rank_has_no_messages(tmp_path: Path) -> None:
    mesh = mesh_of(tmp_path, 1)
    assert mesh.device.measured is not None and mesh.intra.measured is None


BAD = {  # what is done to the text: what the error says
    ("ranks = 2", "ranks = 0"): r"devices\.mine: measured = ",
    ('type = "cpu"', 'type = "tpu"'): r"measured = .*\n.*the tables that `autopart calibrate` writes",
    ("alone = 1.0", "alone = -1.0"): "measured = ",
    ("alone = 1.0\n", ""): "measured = ",
    ("threads = 1\n", "threads = 1\nfibres = 2\n"): "measured = ",
    ("  [16, 16, 16, ", "  [16, 16, "): "measured = ",
    ("  [16, 16, 16, ", "  [16, 16, inf, "): "measured = ",
    ("  [16, 16, 16, ", "  [16, -16, 16, "): "measured = ",
    ("  [16, 16, 16, 8.192e-08", "  [16, 16, 16, 0"): "measured = ",
    (
        "mine.measured.collectives.all_reduce]\n2 =",
        "mine.measured.collectives.all_reduce]\ntwo =",
    ): r"links\.mine: meas",
    ("  [10000, 6e-05, 0.5]", "  [10000, '6e-05', 0.5]"): r"links\.mine: measured = ",
}


@pytest.mark.parametrize("change", BAD, ids=lambda change: repr(change[1]))
def test_what_is_no_profile_is_refused(change: tuple[str, str], tmp_path: Path) -> None:
    old, new = change
    text, file = text_of(), tmp_path / "mine.toml"
    text = text.replace("alone = 1\n", "alone = 1.0\n")
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(PartitionError, match=rf"mine\.toml: .*{BAD[change]}") as error:
        load_hardware(file)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("read", [read_measured, read_wire])
@pytest.mark.parametrize(
    "value", [None, 3, [], {}, {"p2p": []}, {"collectives": {"all_reduce": 3}, "p2p": [[1, 1, 0]]}]
)
def test_what_is_no_table_is_none(read: Any, value: Any) -> None:
    assert read(value) is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"mesh": "2x2:cpu"}, "has 2 hosts"),
        ({"dtypes": ("int8",)}, "computes no int8"),
        ({"dtypes": ("float8",), "mesh": "1:h200"}, "computes no float8"),
        ({"rounds": 0}, "0 rounds"),
        ({"to": "nowhere/to.toml"}, "no such folder"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(PartitionError, match=says):
        calibrate(**{"mesh": "1:cpu", "to": tmp_path / "mine.toml", **arguments})
    assert not list(tmp_path.iterdir())


# ---- the numbers ----------------------------------------------------------------------------------------------------


def test_medians_and_spread() -> None:
    assert middle([(1.0, 0.0), (2.0, 0.0), (4.0, 0.0)]) == ([2.0, 0.0], 1.0)


@pytest.mark.parametrize(("latency", "bandwidth"), [(5e-6, 1e9), (1e-3, 2e11), (0.0, 3e9)])
def test_a_line_is_recovered(latency: float, bandwidth: float) -> None:
    sizes = np.logspace(3, 8, 12)
    noise = 1 + 0.01 * np.cos(np.arange(12))
    assert line([(n, latency + n / bandwidth) for n in sizes]) == pytest.approx(
        (latency, bandwidth), rel=1e-6, abs=1e-12
    )
    near = line([(n, (latency + n / bandwidth) * x) for n, x in zip(sizes, noise, strict=True)])
    assert near == pytest.approx((latency, bandwidth), rel=0.05, abs=1e-7)


def test_a_line_has_no_latency_below_zero() -> None:
    latency, bandwidth = line([(1e3, 1e-6), (1e6, 2e-3)])
    assert latency == 0 and 5e8 < bandwidth < 1e9


def test_a_grid_is_straight_in_logarithms() -> None:
    points = np.array(list(itertools.product((1, 8, 64), (2, 32), (5,))), dtype=float)
    grid = grid_of(points, points[:, 0] ** 0.5 * points[:, 1] ** -2)
    sizes = np.array([[1, 3, 20, 64], [2, 5, 31, 32], [5, 5, 5, 700]], dtype=float)
    assert grid.at(*sizes) == pytest.approx(sizes[0] ** 0.5 * sizes[1] ** -2)
    assert grid.at(640.0, 1.0, 5.0) == pytest.approx(64**0.5 * 2**-2.0)


def test_what_was_not_measured_takes_the_nearest() -> None:
    grid = grid_of(np.array([[1, 1], [1, 100], [100, 1]], dtype=float), np.array([1.0, 2.0, 2.0]))
    assert grid.at(100.0, 100.0) == pytest.approx(2.0)


def test_products_take_their_flops_at_the_rate_of_their_dtype(tmp_path: Path) -> None:
    mesh = mesh_of(tmp_path)
    measured, _ = tables_of(mesh)
    m, n, k = (np.array(x, dtype=float) for x in ([100, 7000], [300, 20], [64, 1e5]))
    for peak, rate in ((RATE, 1), (2 * RATE, 2), (2.2 * RATE, 2.2)):
        assert product_seconds(3.0, m, n, k, peak, mesh.device.flops, measured) == pytest.approx(
            6 * m * n * k / (rate * RATE), rel=1e-4
        )
    peaks = np.array([RATE, 2 * RATE])
    assert product_seconds(1.0, m, n, k, peaks, mesh.device.flops, measured) == pytest.approx(
        2 * m * n * k / peaks, rel=1e-4
    )


def test_attention_takes_its_flops(tmp_path: Path) -> None:
    mesh = mesh_of(tmp_path)
    measured, _ = tables_of(mesh)
    sizes = np.array([[6, 128, 128, 64, 64, 1], [2, 1000, 30, 80, 40, 0]], dtype=float)
    work = 2 * sizes[:, 0] * sizes[:, 1] * sizes[:, 2] * (sizes[:, 3] + sizes[:, 4]) * [0.5, 1]
    forward, backward = attention_seconds(sizes.T, np.array([RATE, RATE]), mesh.device.flops, measured)
    assert forward == pytest.approx(work / RATE) and backward == pytest.approx(3 * work / RATE)


def test_operators_take_their_bytes_by_kind(tmp_path: Path) -> None:
    measured, _ = tables_of(mesh_of(tmp_path))
    kinds = [KIND_OF["aten.tanh"], KIND_OF.get("aten.add.Tensor", 0)]
    forward, backward = operator_seconds(kinds, [1e6, 1e6], measured)
    assert forward == pytest.approx([STEP + 2e6 / BANDWIDTH, STEP + 1e6 / BANDWIDTH])
    assert backward == pytest.approx([STEP + 1e6 / BANDWIDTH] * 2)
    assert operator_seconds(0, 1.0, measured)[0] == operator_seconds(0, 1e4, measured)[0]
    assert operator_seconds(0, 1e9, measured)[0] == pytest.approx(1000 * operator_seconds(0, 1e6, measured)[0])


def test_kinds_are_of_operators_that_there_are() -> None:
    assert set(OPERATORS) == set(KINDS) and set(OPTIMIZERS) == set(OPTIMIZER_STATES)
    for names in KINDS.values():
        assert all(has_rule(f"aten.{name}") for name in names)


def test_work_of_a_measured_device(tmp_path: Path) -> None:
    device = mesh_of(tmp_path).device
    size, none = (1, 256, 256, 256, 0, 0), (0,) * 6
    rows = [
        [2 * 256**3, 1e6, RATE, 2, 1, 0, *size, 1, 1],
        [2 * 256**3, 1e6, RATE, 1, 1, 0, *size, 0, 1],
        [0, 1e6, math.inf, 1, 1, 0, *none, 0, 0],
        [0, 1e6, math.inf, 0, 1, 0, *none, 0, 0],
        [0, 1e6, math.inf, 1, 0, 0, *none, 0, 0],
        [1e9, 1e6, RATE, 2, 1, 0, *none, 0, 0],
    ]
    got = work_seconds(work_in(np.array(rows, dtype=float)), device)
    product, stream = 2 * 256**3 / RATE + device.launch_seconds, STEP + 1e6 / BANDWIDTH
    assert got.forward == pytest.approx([product, product, stream, stream, 0, 1e9 / RATE], rel=1e-4)
    assert got.backward == pytest.approx([2 * product, product, stream, 0, 0, 2e9 / RATE], rel=1e-4)


def test_messages_as_measured(tmp_path: Path) -> None:
    mesh = mesh_of(tmp_path, 4)
    two, four = mesh.group(1, 2), mesh.group(1, 4)
    assert COLLECTIVES["all_reduce"](1e6, four) == pytest.approx(1e-4 + 4e6 / 1e9)
    assert COLLECTIVES["all_to_all"](1e4, two) == pytest.approx(1e-4 + 2e4 / 1e9)
    assert message_seconds(1e3, two, "all_reduce", 2**26) == pytest.approx(1e-3 * (1e-4 + 2e6 / 1e9))
    assert p2p_seconds(1e6, mesh.intra) == pytest.approx(5e-5 + 1e6 / 1e9)
    three = replace(four, ranks=3, per_host=3)
    assert COLLECTIVES["all_reduce"](1e6, three) == all_reduce_seconds(1e6, three)
    apart = replace(four, per_host=1)
    assert COLLECTIVES["all_reduce"](1e6, apart) == all_reduce_seconds(1e6, apart)


def test_an_optimizer_takes_time_where_it_was_measured(tmp_path: Path) -> None:
    mesh = mesh_of(tmp_path)
    group = mesh.group(1, 2)
    known, adding = Training("adamw", 0, group, 1), 3e6 / BANDWIDTH

    def seconds(training: Training, nbytes: float = 1e6, grad: bool = True, shared: bool = True) -> float:
        return update_seconds(nbytes, grad, shared, training, mesh.device)

    assert seconds(known) == pytest.approx(4e6 / BANDWIDTH) == pytest.approx(2 * seconds(replace(known, zero=1)))
    assert seconds(replace(known, zero=1), shared=False) == seconds(known) > seconds(replace(known, optimizer="sgd"))
    assert seconds(replace(known, micro_batches=3)) == pytest.approx(seconds(known) + 2 * adding)
    assert seconds(known, grad=False) == 0 == update_seconds(1e6, True, True, known, Mesh.of("2:cpu").device)


@pytest.mark.parametrize(
    ("stages", "micro_batches", "pace"), [(1, 4, 1), (4, 4, 4 / 7), (4, 1, 1 / 2), (2, 100, 100 / 101)]
)
def test_ranks_that_wait_leave_their_cores_to_others(
    stages: int, micro_batches: int, pace: float, tmp_path: Path
) -> None:
    mesh = mesh_of(tmp_path, 4)
    busy = mesh.busy_device(stages, micro_batches)
    assert busy.measured is not None and busy.measured.pace == pytest.approx(pace)
    found = [product_seconds(1, 64, 64, 64, RATE, d.flops, d.measured) for d in (mesh.device, busy)]  # type: ignore[arg-type]
    assert found[1] == pytest.approx(pace * found[0])
    links = mesh.intra, mesh.between(1, stages, micro_batches)
    assert p2p_seconds(1e5, links[1]) == pytest.approx(pace * p2p_seconds(1e5, links[0]))
    group, row = mesh.group(1, 2), RESHARDS["P", "R"]
    sums = [row_seconds(row, 1e5, group, True, device)[0] for device in (mesh.device, busy)]
    assert sums[1] == pytest.approx(pace * sums[0])
    steps = [update_seconds(1e6, True, True, Training("adamw", 0, group, 1), device) for device in (mesh.device, busy)]
    assert steps[1] == steps[0]
    assert Mesh.of("4:cpu").busy_device(4, 4) is Mesh.of("4:cpu").device


# ---- a plan, and a real calibration ---------------------------------------------------------------------------------


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


BATCH = {"x": torch.randn(8, 64)}


@pytest.mark.parametrize("settings", [{}, {"pp": 2, "dp": 2}, {"pp": 4, "recompute": "full"}, {"dp": 4, "zero": 1}])
def test_a_profile_plans(settings: dict[str, Any], tmp_path: Path) -> None:
    mesh = mesh_of(tmp_path, 4)
    torch.manual_seed(0)
    plan = autopart.plan(Blocks(), mesh, BATCH, **settings)
    autopart.certify(plan, Blocks(), BATCH)
    plan.save(tmp_path / "plan.json")
    assert autopart.Plan.load(tmp_path / "plan.json") == plan
    every = autopart.plan(Blocks(), mesh, BATCH)
    assert every.bound_seconds <= plan.step_seconds * (1 + 1e-9)


def test_what_is_faster_makes_the_step_so(tmp_path: Path) -> None:
    mesh = mesh_of(tmp_path)
    prices = {p.what: p for p in autopart.explain(Blocks(), mesh, BATCH, tp=2).prices()}
    for what in ("links between devices of a host 10 % faster (mine)", "memory of the devices 10 % faster"):
        assert (prices[what].seconds or 1.0) < prices[what].against


@pytest.mark.processes
def test_a_quick_calibration_plans_and_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    )
    file = tmp_path / "own.toml"
    result = CliRunner().invoke(app, ["calibrate", "2:cpu", "--to", str(file), "--quick", "--rounds", "1", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"name": "cpu-2", "file": str(file)}
    assert capfd.readouterr().out == "", "a rank printed"
    mesh = Mesh.of("2:cpu-2")
    measured, wire = tables_of(mesh)
    assert measured.ranks == 2 and {"2"} == set(wire.collectives["all_gather"]) and "1 thread" in mesh.device.source
    assert 1e6 < mesh.device.flops["float32"] < 1e14 and measured.overlap > 0
    plan = autopart.plan(Blocks(), mesh, BATCH)
    autopart.certify(plan, Blocks(), BATCH)
    assert autopart.check(Blocks(), mesh, BATCH, pp=2).gradient_error < 1e-5


@pytest.mark.gpu
def test_a_gpu_is_measured(tmp_path: Path) -> None:
    ranks = torch.cuda.device_count()
    name = Mesh.of(f"{ranks}:h100-80gb").device.name
    made = calibrate(f"{ranks}:{name}", tmp_path / "gpu.toml", quick=True, rounds=1)
    measured = Mesh.of(f"{ranks}:{made}").device.measured
    assert measured is not None and measured.type == "cuda" and measured.products.keys() == {"bfloat16", "float32"}
