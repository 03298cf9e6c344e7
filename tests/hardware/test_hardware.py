"""The tables of devices and links, files that add to them, and which row a CUDA device is."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

import autopart
from autopart import hardware
from autopart.cli.main import app
from autopart.errors import PartitionError
from autopart.hardware import CUDA_NAMES, DEVICES, LINKS, find_device, find_link, load_hardware
from autopart.hardware import mesh as mesh
from autopart.hardware.cuda import of_cuda
from autopart.hardware.files import CONSTANTS, NAME, TAKES
from autopart.hardware.mesh import Mesh
from autopart.hardware.rows import DTYPES, Device, Link, Silicon

GPUS = [device for device in DEVICES.values() if device.name != "cpu"]


@pytest.fixture(autouse=True)
def as_shipped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tables as they are in the package, before and after."""
    monkeypatch.delenv(hardware.ENVIRONMENT, raising=False)
    hardware._load_all.cache_clear()
    tables = hardware._devices, hardware._links, hardware._cuda
    before = [dict(table) for table in tables]
    yield
    hardware._load_all.cache_clear()
    for table, rows in zip(tables, before, strict=True):
        table.clear()
        table.update(rows)  # type: ignore[arg-type]


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str, name: str = "mine.toml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda row: row.name)
def test_device(device: Device) -> None:
    assert DEVICES[device.name] is device and NAME.fullmatch(device.name)
    assert {"float64", "float32"} <= device.flops.keys() <= set(DTYPES)
    assert min(device.flops.values()) > 0
    assert 1e9 <= device.memory_bytes < 1e12 and isinstance(device.memory_bytes, int)
    assert 1e9 < device.bandwidth < 1e14 and 1e-6 <= device.launch_seconds <= 1e-5
    assert LINKS[device.inter].bandwidth < LINKS[device.link].bandwidth < device.bandwidth
    assert 1 <= device.nics_per_host <= device.devices_per_host
    assert len(device.source) > 20 and "  " not in device.source


@pytest.mark.parametrize("device", GPUS, ids=lambda row: row.name)
def test_narrower_is_no_slower(device: Device) -> None:
    rates = [device.flops[dtype] for dtype in DTYPES if dtype in device.flops]
    assert all(slower <= faster for slower, faster in pairwise(rates))
    assert device.flops["float16"] == device.flops.get("bfloat16", device.flops["float16"])
    assert ("bfloat16" in device.flops) == ("tf32" in device.flops)


@pytest.mark.parametrize("link", LINKS.values(), ids=lambda row: row.name)
def test_link(link: Link) -> None:
    assert LINKS[link.name] is link and NAME.fullmatch(link.name)
    assert 1e9 <= link.bandwidth <= 1e12 and 1e-6 <= link.latency_seconds <= 1e-4
    assert "latency" in link.source or "assumption" in link.source


@pytest.mark.parametrize(
    "names",
    [
        ("nvlink1", "nvlink2", "nvlink3", "nvlink4", "nvlink5"),
        ("pcie3", "pcie4", "pcie5", "nvlink2"),
        ("ib-edr", "ib-hdr", "ib-ndr", "ib-xdr"),
        ("roce-100", "roce-200", "roce-400"),
        ("ethernet-10", "ethernet-25", "ethernet-100", "efa-400"),
        ("efa-100", "efa-400"),
    ],
)
def test_generations(names: tuple[str, ...]) -> None:
    assert all(LINKS[a].bandwidth < LINKS[b].bandwidth for a, b in pairwise(names))
    assert all(LINKS[a].latency_seconds >= LINKS[b].latency_seconds for a, b in pairwise(names))


@pytest.mark.parametrize(
    ("slower", "faster"),
    [
        ("v100-32gb-pcie", "v100-32gb"),
        ("a100-40gb-pcie", "a100-40gb"),
        ("a100-80gb-pcie", "a100-80gb"),
        ("a100-40gb", "a100-80gb"),
        ("h100-80gb-pcie", "h100-80gb"),
        ("h100-96gb", "h100-80gb"),
        ("h100-80gb", "h200"),
        ("h200", "b200"),
    ],
)
def test_cards_of_a_family(slower: str, faster: str) -> None:
    low, high = DEVICES[slower], DEVICES[faster]
    matmul = "float16"
    assert low.bandwidth <= high.bandwidth and low.flops[matmul] <= high.flops[matmul]
    assert LINKS[low.link].bandwidth <= LINKS[high.link].bandwidth


def test_fields_are_those_of_rows() -> None:
    for kind, takes in TAKES.items():
        assert takes.keys() - {"like", "cuda"} == kind.__annotations__.keys() - {"name"}
    assert CONSTANTS.keys() == Silicon.__annotations__.keys()


MINE = """
[devices.my-gpu]
like = "h100-80gb"
memory_bytes = 64e9
inter = "my-fabric"
cuda = 'My GPU( \\d+GB)?'

[devices.my-gpu-2]
like = "my-gpu"
flops = { bfloat16 = 2e15 }
source = "measured"

[links.my-fabric]
bandwidth = 40_000_000_000
latency_seconds = 5e-6
source = "measured"
"""


def test_own_rows(written: Callable[[str], Path], recwarn: pytest.WarningsRecorder) -> None:
    assert load_hardware(written(MINE)) == ["my-fabric", "my-gpu", "my-gpu-2"]
    one, two, like = DEVICES["my-gpu"], DEVICES["my-gpu-2"], DEVICES["h100-80gb"]
    assert (one.memory_bytes, one.inter, one.flops, one.nics_per_host) == (64 * 10**9, "my-fabric", like.flops, 8)
    assert isinstance(one.memory_bytes, int) and isinstance(LINKS["my-fabric"].bandwidth, float)
    assert one.source == f"as h100-80gb but for memory_bytes, inter: {like.source}"
    assert (two.flops, two.memory_bytes, two.source) == ({"bfloat16": 2e15}, one.memory_bytes, "measured")
    made = Mesh.of("4x8:my-gpu")
    assert (made.device, made.intra, made.inter) == (one, LINKS["nvlink4"], LINKS["my-fabric"])
    assert str(made) == "4x8:my-gpu" and Mesh.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert Mesh.parse("2x8:h200@my-fabric").inter is LINKS["my-fabric"]
    assert of_cuda("My GPU 64GB", 0) is one and not recwarn


def test_a_row_of_all_fields(written: Callable[[str], Path]) -> None:
    text = """
    [devices.whole]
    flops = { float32 = 1e12 }
    memory_bytes = 1_000_000_000
    bandwidth = 1e11
    launch_seconds = 0
    link = "pcie3"
    source = "none"
    """
    load_hardware(written(text))
    assert find_device("whole") == Device("whole", {"float32": 1e12}, 10**9, 1e11, 0.0, "pcie3", "none")
    assert Mesh.parse("2x8:whole").nics == 8


def test_constants_of_kernels(written: Callable[[str], Path]) -> None:
    """They are taken over from the row that one is like, as a whole; a row of one's own needs none."""
    text = """
    [devices.taken]
    like = "h100-80gb"
    [devices.given]
    like = "h100-80gb"
    silicon = { processors = 78, issue = 0.8, sustained = 0.7, attention = [0.6, 0.5], source = "measured" }
    """
    load_hardware(written(text))
    assert find_device("taken").silicon is DEVICES["h100-80gb"].silicon
    assert find_device("given").silicon == Silicon(78, 0.8, 0.7, (0.6, 0.5), "measured")
    for name in ("taken", "given", "cpu"):
        mesh = Mesh.parse(f"2x8:{name}")
        assert Mesh.from_json(json.loads(json.dumps(mesh.to_json()))) == mesh


def test_a_row_takes_the_place_of_one(written: Callable[[str], Path]) -> None:
    source, path = DEVICES["a100-80gb"].source, written("[devices.a100-80gb]\nlike = 'a100-80gb'\nbandwidth = 1e12")
    for _ in range(2):
        load_hardware(path)
        assert find_device("a100-80gb").bandwidth == 1e12 and source in find_device("a100-80gb").source
    assert of_cuda("NVIDIA A100-SXM4-80GB", 0).bandwidth == 1e12


def test_the_environment(written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = written(MINE), written("[links.thread]\nlike = 'ethernet'", "other.toml")
    with pytest.raises(PartitionError, match="unknown device 'my-gpu'"):
        Mesh.parse("4:my-gpu")
    monkeypatch.setenv("AUTOPART_HARDWARE", os.pathsep.join(("", str(first), str(second))))
    assert Mesh.of("4x8:my-gpu@thread").inter.bandwidth == find_link("ethernet").bandwidth
    monkeypatch.setenv("AUTOPART_HARDWARE", str(second.with_name("none.toml")))
    for _ in range(2):
        with pytest.raises(PartitionError, match=r"cannot read .*none\.toml"):
            Mesh.parse("4:cpu")


def test_the_shell(written: Callable[..., Path]) -> None:
    tiny = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 16}
    config = written(json.dumps(tiny), "config.json")
    arguments = ["plan", str(config), "4:my-gpu", "--json"]
    planned = CliRunner().invoke(app, arguments, env={"AUTOPART_HARDWARE": str(written(MINE))})
    assert planned.exit_code == 0, planned.output
    assert json.loads(planned.stdout)["mesh"]["device"]["memory_bytes"] == 64 * 10**9
    bad = written("[devices.my-gpu]\nlink = 'pcie4'", "bad.toml")
    failed = CliRunner().invoke(app, arguments, env={"AUTOPART_HARDWARE": str(bad)})
    assert failed.exit_code == 2 and "devices.my-gpu" in failed.stderr and "without flops" in failed.stderr


def test_the_names_in_the_package() -> None:
    assert autopart.load_hardware is mesh.load_hardware is load_hardware


LIKE = "[devices.mine]\nlike = 'h200'\n"
BAD = {  # file: what the error says
    "[devices.mine": r"mine\.toml is no TOML",
    "[gpus.mine]": r"mine\.toml: unknown table 'gpus'(?s:.*)\[devices\.NAME\]",
    "devices = 3": "devices is no table of rows",
    "devices.mine = 3": r"devices\.mine is no row",
    "[devices.MyGPU]\nlike = 'h200'": r"devices\.MyGPU: not a name",
    "[devices.mine]": r"toml: devices\.mine: without flops, memory_bytes, bandwidth, launch_seconds, link, source\n",
    "[links.mine]\nbandwidth = 1e9": r"links\.mine: without latency_seconds, source\n",
    "[links.mine]\nlike = 'ethernet'\ncuda = 'x'": r"links\.mine: unknown field 'cuda'",
    "[links.mine]\nlike = 'ethernet'\nbandwidth = 0": r"bandwidth = 0\n.*a number above 0",
    "[links.mine]\nlike = 'ethernet'\nlatency_seconds = -1e-6": r"latency_seconds = -1e-06\n.*at least 0",
    LIKE + "bandwith = 1e12": r"devices\.mine: unknown field 'bandwith'\n(?s:.*)try: 'bandwidth'",
    LIKE + "bandwidth = -1e12": r"devices\.mine: bandwidth = -1000000000000\.0\n.*a number above 0",
    LIKE + "bandwidth = '1 TB/s'": "bandwidth = '1 TB/s'",
    LIKE + "bandwidth = true": "bandwidth = True",
    LIKE + "bandwidth = inf": "bandwidth = inf",
    LIKE + "bandwidth = nan": "bandwidth = nan",
    LIKE + f"bandwidth = 1{'0' * 400}": "bandwidth = 1000",
    LIKE + "memory_bytes = 1.5": r"memory_bytes = 1\.5\n.*a whole number above 0",
    LIKE + "nics_per_host = 0": "nics_per_host = 0",
    LIKE + "source = ' '": "source = ' '",
    LIKE + "flops = {}": "flops = {}",
    LIKE + "flops = { bf16 = 1e15 }": r"flops = .*\n.*among float64, .*, float8",
    LIKE + "flops = { bfloat16 = -1 }": "flops = ",
    LIKE + "flops = 1e15": "flops = 1000",
    LIKE + "silicon = { processors = 78 }": r"silicon = .*\n.*a table of processors",
    LIKE + "silicon = { processors = 78, issue = 0.8, sustained = 0.7, attention = [0.6], source = 'x' }": "silicon = ",
    LIKE + "silicon = { processors = 0, issue = 0.8, sustained = 0.7, attention = [1, 1], source = 'x' }": "silicon = ",
    LIKE + "cuda = '('": r"cuda = '\('\n.*a regular expression",
    LIKE + "link = 'nvlink'": r"devices\.mine: link = 'nvlink'\n.*no such link(?s:.*)'nvlink4'",
    LIKE + "inter = 'ib-nrd'": r"devices\.mine: inter = 'ib-nrd'\n(?s:.*)try: 'ib-ndr'",
    "[devices.mine]\nlike = 'h100'": r"devices\.mine: like = 'h100'\n.*no such row(?s:.*)'h100-80gb'",
    "[devices.mine]\nlike = 3": "like = 3",
    "[devices.one]\nlike = 'two'\n[devices.two]\nlike = 'h200'": r"devices\.one: like = 'two'",
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: repr(text[-40:]))
def test_bad_files(text: str, written: Callable[[str], Path]) -> None:
    tables = dict(DEVICES), dict(LINKS), dict(CUDA_NAMES)
    path = written(f"[links.before]\nlike = 'ethernet'\n{text}" if text.startswith("[") else text)
    with pytest.raises(PartitionError, match=BAD[text]) as error:
        load_hardware(path)
    assert str(path) in error.value.what
    assert tables == (DEVICES, LINKS, CUDA_NAMES)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_unreadable_files(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "rows.toml"
    if content:
        path.write_bytes(content)
    with pytest.raises(PartitionError, match=re.escape(str(path))):
        load_hardware(path)


@pytest.mark.parametrize(
    ("name", "gigabytes", "row", "exact"),
    [
        ("Tesla V100-SXM2-32GB", 34, "v100-32gb", True),
        ("Tesla V100-PCIE-32GB", 34, "v100-32gb-pcie", True),
        ("NVIDIA A100-SXM4-40GB", 42, "a100-40gb", True),
        ("NVIDIA A100-SXM4-80GB", 85, "a100-80gb", True),
        ("NVIDIA A100-PCIE-40GB", 42, "a100-40gb-pcie", True),
        ("A100-PCIE-40GB", 42, "a100-40gb-pcie", True),
        ("NVIDIA A100 80GB PCIe", 85, "a100-80gb-pcie", True),
        ("NVIDIA A10G", 24, "a10g", True),
        ("NVIDIA H100 80GB HBM3", 85, "h100-80gb", True),
        ("NVIDIA H100 PCIe", 85, "h100-80gb-pcie", True),
        ("NVIDIA L40S", 48, "l40s", True),
        ("NVIDIA H200", 150, "h200", True),
        ("NVIDIA B200", 192, "b200", True),
        ("Tesla V100-SXM2-16GB", 17, "v100-16gb", True),
        ("Tesla V100-FHHL-16GB", 17, "v100-16gb", False),
        ("NVIDIA A100-PG509-200", 42, "a100-40gb", False),
        ("GRID A100X-80C", 85, "a100-80gb", False),
        ("NVIDIA A800 80GB PCIe", 85, "h100-80gb-pcie", False),
        ("NVIDIA H800", 85, "h100-80gb", False),
        ("NVIDIA GH200 480GB", 102, "h100-80gb", False),
        ("NVIDIA H200 MIG 1g.18gb", 17, "a10g", False),
        ("NVIDIA GeForce RTX 4090", 25, "a10g", False),
        ("NVIDIA GB300", 300, "b200", False),
    ],
)
def test_cuda_row(name: str, gigabytes: int, row: str, exact: bool, recwarn: pytest.WarningsRecorder) -> None:
    assert of_cuda(name, gigabytes * 10**9).name == row
    assert [name in str(warning.message) for warning in recwarn] == ([] if exact else [True])
