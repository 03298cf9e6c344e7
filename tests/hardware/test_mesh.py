"""Meshes from text, JSON and DeviceMesh; which link a group uses; what the collectives cost."""

import json
import math
import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from autopart.cost.collectives import COLLECTIVES, message_seconds, p2p_seconds
from autopart.errors import PartitionError
from autopart.hardware import DEVICES, LINKS
from autopart.hardware.mesh import Group, Mesh
from autopart.hardware.rows import Link

GOOD = {  # text: hosts, devices per host, device, intra, inter, the text str() gives back
    "4x8:h100-80gb": (4, 8, "h100-80gb", "nvlink4", "ib-ndr", "4x8:h100-80gb"),
    "4:cpu": (1, 4, "cpu", "shared-memory", "ethernet", "4:cpu"),
    "1x4:cpu": (1, 4, "cpu", "shared-memory", "ethernet", "4:cpu"),
    "2x8:a100-80gb@ib-hdr": (2, 8, "a100-80gb", "nvlink3", "ib-hdr", "2x8:a100-80gb"),
    "2x8:a100-40gb@ethernet": (2, 8, "a100-40gb", "nvlink3", "ethernet", "2x8:a100-40gb@ethernet"),
    " 2X8:V100-32GB ": (2, 8, "v100-32gb", "nvlink2", "ib-edr", "2x8:v100-32gb"),
    "16x8:b200": (16, 8, "b200", "nvlink5", "ib-ndr", "16x8:b200"),
    "2x8:a10g@ethernet-25": (2, 8, "a10g", "pcie4", "ethernet-25", "2x8:a10g@ethernet-25"),
    "8:h200": (1, 8, "h200", "nvlink4", "ib-ndr", "8:h200"),
}

BAD = {  # text: what the error says
    "": "the form is",
    "cpu": "the form is",
    "4": "the form is",
    "4:": "the form is",
    "x4:cpu": "the form is",
    "2x2x2:cpu": "the form is",
    "-1:cpu": "the form is",
    "4:cpu@": "the form is",
    "0:cpu": "empty",
    "0x8:cpu": "empty",
    "2x0:cpu": "empty",
    "8:h100": r"(?s)known are cpu, v100.*try: 'h100-80gb'",
    "8:a100": "(?s)try: 'a100-40gb' or 'a100-80gb'",
    "8:a100-80gv": "(?s)known are.*try: 'a100-80gb'",
    "8:zzz": r"known are .*b200$",
    "8:b200@ib-nrd": "(?s)unknown link.*try: 'ib-ndr'",
}


@pytest.mark.parametrize("text", GOOD)
def test_good_text(text: str) -> None:
    hosts, devices, device, intra, inter, shown = GOOD[text]
    mesh = Mesh.of(text)
    assert mesh == Mesh(hosts, devices, DEVICES[device], LINKS[intra], LINKS[inter])
    assert (mesh.size, mesh.device.memory_bytes) == (hosts * devices, DEVICES[device].memory_bytes)
    assert str(mesh) == shown and Mesh.parse(shown) == mesh
    assert hash(mesh) == hash(Mesh.parse(shown)) and Mesh.of(mesh) is mesh


@pytest.mark.parametrize("text", BAD)
def test_bad_text(text: str) -> None:
    with pytest.raises(PartitionError, match=BAD[text]):
        Mesh.parse(text)


def test_of_something_else() -> None:
    with pytest.raises(PartitionError, match="not a mesh: 7"):
        Mesh.of(7)  # type: ignore[arg-type]


def test_error_parts() -> None:
    error = PartitionError("no", why="because", try_="this")
    assert str(error) == "no\n  why: because\n  try: this"
    assert str(PartitionError("no", try_="this")) == "no\n  try: this" and str(PartitionError("no")) == "no"
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.what, copy.why, copy.try_, str(copy)) == ("no", "because", "this", str(error))


@pytest.mark.parametrize(
    ("axes", "says"),
    [
        ((), None),
        ((("tp", 2),), None),
        ((("pp", 2), ("dp", 2), ("tp", 2)), None),
        ((("tp", 3),), "must divide 8"),
        ((("tp", 0),), "must divide 8"),
        ((("pp", 2), ("dp", 2), ("tp", 1)), "must equal 8"),
        ((("tp", 2), ("tp", 2)), "bad mesh axes"),
        ((("ep", 2),), "bad mesh axes"),
    ],
)
def test_axes(axes, says: str | None) -> None:
    mesh = Mesh.parse("8:cpu")
    if says is None:
        assert replace(mesh, axes=axes).axes == axes
    else:
        with pytest.raises(PartitionError, match=says):
            replace(mesh, axes=axes)


def test_json_keeps_custom_rows() -> None:
    mesh = Mesh.parse("2x4:h200")
    mesh = replace(
        mesh,
        device=replace(mesh.device, name="mine", flops={"float32": 1e12}),
        intra=replace(mesh.intra, name="wire", bandwidth=1.5e9),
        axes=(("dp", 4), ("tp", 2)),
        nics_per_host=2,
    )
    data = json.loads(json.dumps(mesh.to_json()))
    assert Mesh.from_json(data) == mesh
    assert str(mesh) == "2x4:mine"


@pytest.mark.parametrize("change", [{"hosts": None}, {"device": {"name": "x"}}, {"colour": 1}, {"axes": 3}])
def test_bad_json(change) -> None:
    with pytest.raises(PartitionError, match="not a mesh in JSON"):
        Mesh.from_json(Mesh.parse("4:cpu").to_json() | change)


@pytest.mark.parametrize(
    ("text", "stride", "size", "inter"),
    [
        ("2x8:b200", 1, 8, False),
        ("2x8:b200", 4, 2, False),
        ("2x8:b200", 8, 2, True),
        ("2x8:b200", 1, 16, True),
        ("2x8:b200", 16, 1, None),
        ("2x8:b200", 15, 1, False),
        ("8:b200", 1, 8, False),
        ("8:b200", 1, 9, None),
        ("8:b200", 0, 2, None),
        ("2x6:b200", 1, 4, True),
        ("2x6:b200", 2, 3, False),
        ("2x6:b200", 1, 3, False),
    ],
)
def test_link(text: str, stride: int, size: int, inter: bool | None) -> None:
    mesh = Mesh.parse(text)
    if size == 1:
        assert mesh.link(stride, size) is mesh.intra
    elif inter is None:
        with pytest.raises(PartitionError, match="no group"):
            mesh.link(stride, size)
    else:
        assert mesh.link(stride, size) is (mesh.inter if inter else mesh.intra)


@pytest.mark.parametrize("per_host", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("hosts", [1, 2, 3])
def test_link_against_enumeration(hosts: int, per_host: int) -> None:
    mesh = Mesh.parse(f"{hosts}x{per_host}:cpu")
    for stride in range(1, mesh.size + 1):
        for size in range(1, (mesh.size - 1) // stride + 2):
            last = (size - 1) * stride
            firsts = [rank for rank in range(mesh.size - last) if rank // stride % size == 0]
            crosses = any(rank // per_host != (rank + last) // per_host for rank in firsts)
            assert (mesh.link(stride, size) is mesh.inter) == crosses, (stride, size)


def test_json_before_hosts_were_known() -> None:
    """A mesh written without the usual host of its device has a network card for each device."""
    data = Mesh.parse("2x8:v100-32gb").to_json()
    del data["nics_per_host"]
    data["device"] = {
        k: v for k, v in data["device"].items() if k not in ("inter", "devices_per_host", "nics_per_host")
    }
    mesh = Mesh.from_json(data)
    assert mesh.nics == 8 and mesh.inter == LINKS["ib-edr"] and mesh.shared(mesh.inter) is mesh.inter


@pytest.mark.parametrize(
    ("text", "given", "nics"),
    [
        ("2x8:h100-80gb", None, 8),
        ("2x4:h100-80gb", None, 4),
        ("2x16:v100-32gb", None, 8),
        ("2x8:v100-32gb", None, 4),
        ("2x1:v100-32gb", None, 1),
        ("2x3:v100-32gb", None, 2),
        ("2x8:a10g", None, 1),
        ("2x16:a10g", None, 2),
        ("2x4:cpu", None, 4),
        ("2x8:a10g", 4, 4),
    ],
)
def test_nics(text: str, given: int | None, nics: int) -> None:
    assert replace(Mesh.parse(text), nics_per_host=given).nics == nics


def test_no_nics() -> None:
    with pytest.raises(PartitionError, match="0 network cards"):
        replace(Mesh.parse("2x8:a10g"), nics_per_host=0)


@pytest.mark.parametrize(
    ("text", "senders", "share"),
    [
        ("2x8:h100-80gb", None, 1),
        ("2x16:v100-32gb", None, 1 / 2),
        ("2x16:v100-32gb", 8, 1),
        ("2x16:v100-32gb", 12, 2 / 3),
        ("2x8:a10g", None, 1 / 8),
        ("2x8:a10g", 1, 1),
        ("2x1:a10g", None, 1),
        ("8:a10g", None, 1),
    ],
)
def test_shared(text: str, senders: int | None, share: float) -> None:
    mesh = Mesh.parse(text)
    link = mesh.shared(mesh.inter, senders)
    assert link.bandwidth == pytest.approx(mesh.inter.bandwidth * share)
    assert replace(link, bandwidth=mesh.inter.bandwidth) == mesh.inter
    assert (link is mesh.inter) == (share == 1)
    assert mesh.shared(mesh.intra, senders) is mesh.intra


def test_cards_beyond_the_senders_add_nothing() -> None:
    mesh = replace(Mesh.parse("2x8:h100-80gb"), nics_per_host=32)
    assert mesh.shared(mesh.inter) is mesh.inter


@pytest.mark.parametrize("senders", [0, 9])
def test_too_many_senders(senders: int) -> None:
    mesh = Mesh.parse("2x8:a10g")
    with pytest.raises(PartitionError, match=f"{senders} devices"):
        mesh.shared(mesh.inter, senders)


@pytest.fixture
def eight_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("eight_ranks")
@pytest.mark.parametrize(
    ("shape", "names", "local", "hosts"),
    [
        ((2, 2, 2), ("pp", "dp", "tp"), None, 1),
        ((4, 2), ("dp", "tp"), "4", 2),
        ((8,), ("tp",), "8", 1),
        ((8,), ("dp",), "16", 1),
        ((8,), ("dp",), "1", 8),
    ],
)
def test_device_mesh(shape, names, local: str | None, hosts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    mesh = Mesh.of(init_device_mesh("cpu", shape, mesh_dim_names=names))
    assert mesh == replace(Mesh.parse(f"{hosts}x{8 // hosts}:cpu"), axes=tuple(zip(names, shape, strict=True)))


@pytest.mark.usefixtures("eight_ranks")
@pytest.mark.parametrize(
    ("device", "ranks", "names", "local", "says"),
    [
        ("cpu", range(8), None, "8", "no dim names"),
        ("cpu", range(8), ("ep",), "8", "bad mesh axes"),
        ("cpu", range(7, -1, -1), ("dp",), "8", "in order"),
        ("cpu", range(8), ("dp",), "3", "LOCAL_WORLD_SIZE=3"),
        ("cpu", range(8), ("dp",), "0", "LOCAL_WORLD_SIZE=0"),
        ("cpu", range(8), ("dp",), "four", "LOCAL_WORLD_SIZE=four"),
        ("meta", range(8), ("dp",), "8", "only cpu and cuda"),
    ],
)
def test_bad_device_mesh(device, ranks, names, local, says, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    device_mesh = DeviceMesh(device, torch.tensor(list(ranks)), mesh_dim_names=names)
    with pytest.raises(PartitionError, match=says):
        Mesh.of(device_mesh)


@pytest.mark.usefixtures("eight_ranks")
@pytest.mark.parametrize("present", [True, False])
def test_cuda_device_mesh(present: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    device_mesh = init_device_mesh("cpu", (8,), mesh_dim_names=("dp",))
    monkeypatch.setattr(device_mesh, "_device_type", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("P", (), {"total_memory": 1}))
    if present:
        assert Mesh.of(device_mesh) == replace(Mesh.parse("8:h200"), axes=(("dp", 8),))
    else:
        with pytest.raises(PartitionError, match="finds no device"):
            Mesh.of(device_mesh)


LINK = Link("mine", 450e9, 1.9e-6, "own")


def of(size: int, link: Link = LINK) -> Group:
    return Group(size, size, link, link)


@pytest.mark.parametrize("name", COLLECTIVES)
def test_collective(name: str) -> None:
    seconds = COLLECTIVES[name]
    assert seconds(1e9, of(1)) == 0
    by_bytes = [seconds(nbytes, of(8)) for nbytes in (0, 1, 1e3, 1e6, 1e9)]
    by_size = [seconds(1e6, of(size)) for size in range(1, 20)]
    by_link = [seconds(1e6, of(8, LINKS[link])) for link in ("nvlink5", "nvlink4", "pcie4", "ethernet")]
    for row in (by_bytes, by_size, by_link):
        assert all(a < b for a, b in pairwise(row))
    assert by_bytes[0] >= LINK.latency_seconds
    assert seconds(1e6, of(8)) == pytest.approx(
        seconds(0, of(8)) + seconds(1e6, of(8, replace(LINK, latency_seconds=0.0)))
    )


@pytest.mark.parametrize("size", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("nbytes", [0, 10, 10**9])
def test_all_reduce_is_reduce_scatter_and_all_gather(nbytes: int, size: int) -> None:
    cost = {name: seconds(nbytes, of(size)) for name, seconds in COLLECTIVES.items()}
    assert cost["all_reduce"] == pytest.approx(cost["reduce_scatter"] + cost["all_gather"])


@pytest.mark.parametrize("size", [1, 2, 64])
def test_a_message_shares_its_latency_by_bytes(size: int) -> None:
    """Tensors that fill a message take its seconds together, a larger one those of its own."""
    seconds, full = COLLECTIVES["all_gather"], 1e6
    parts = [message_seconds(nbytes, of(size), "all_gather", full) for nbytes in (2e5, 3e5, 5e5)]
    assert sum(parts) == pytest.approx(seconds(full, of(size)))
    assert message_seconds(3e6, of(size), "all_gather", full) == pytest.approx(seconds(3e6, of(size)))


@pytest.mark.parametrize(
    ("hosts", "nbytes", "by_trees"), [(4, 1e4, False), (1024, 1e4, True), (1024, 1e7, True), (1024, 1e10, False)]
)
def test_gathers_of_one_rank_a_host_take_trees(hosts: int, nbytes: float, by_trees: bool) -> None:
    """By hand: 8 us, log2(hosts) steps of 14 us of which 3.5 are under way at once, 2.8 us a host, and bytes at 3/4 of
    a ring's bandwidth; or a ring by the fastest of its protocols, which few hosts and many bytes take."""
    group = Group(hosts, 1, LINK, LINKS["ib-ndr"])
    bandwidth, wire = group.inter.bandwidth * group.inter.share, (hosts - 1) / hosts * nbytes
    protocols = ((3.6e-6, 5.0e-6, 1 / 4), (10e-6, 8.5e-6, 0.92), (8.4e-6, 14e-6, 1.0))
    trees = 8e-6 + math.log2(hosts) * 14e-6 / 3.5 + hosts * 2.8e-6 + wire / (0.75 * bandwidth)
    ring = min(base + (hosts - 1) * step + wire / (share * bandwidth) for base, step, share in protocols)
    assert (trees < ring) == by_trees
    assert COLLECTIVES["reduce_scatter"](nbytes, group) == pytest.approx(min(trees, ring))


@pytest.mark.parametrize("hosts", [16, 128, 1250])
def test_a_ring_takes_a_step_for_every_host(hosts: int) -> None:
    group = Group(8 * hosts, 8, LINKS["nvlink4"], LINKS["ib-ndr"])
    step = min(2.7e-6, 4e-6) * (hosts - 1) + 0.47e-6 * 7 * hosts
    assert COLLECTIVES["all_gather"](1.0, group) == pytest.approx(3.6e-6 + step, rel=1e-3)


def test_two_ranks_by_hand() -> None:
    link = replace(LINK, bandwidth=100.0, latency_seconds=1.0)
    cost = {name: seconds(1000, of(2, link)) for name, seconds in COLLECTIVES.items()}
    expected = {"all_reduce": 12, "all_gather": 6, "reduce_scatter": 6, "all_to_all": 6, "broadcast": 11}
    assert cost == expected and p2p_seconds(1000, link) == 11


@pytest.mark.parametrize(
    ("text", "stride", "size", "per_host", "nics"),
    [
        ("4x8:h100-80gb", 1, 8, 8, 1),
        ("4x8:h100-80gb", 1, 16, 8, 1),
        ("4x8:h100-80gb", 2, 16, 4, 1),
        ("4x8:h100-80gb", 8, 4, 1, 1),
        ("4x8:h100-80gb", 16, 2, 1, 1),
        ("8:h100-80gb", 2, 4, 4, 1),
        ("2x16:v100-32gb", 4, 8, 4, 1 / 2),
        ("2x8:a10g", 1, 16, 8, 1 / 8),
        ("2x6:b200", 1, 4, 2, 1),
        ("2x6:b200", 4, 3, 1, 1),
        ("8:b200", 4, 1, 1, 1),
    ],
)
def test_group(text: str, stride: int, size: int, per_host: int, nics: float) -> None:
    mesh = Mesh.parse(text)
    found = mesh.group(stride, size)
    assert (found.ranks, found.per_host, found.intra, found.inter) == (size, per_host, mesh.intra, mesh.inter)
    assert found.nics == pytest.approx(nics)


@pytest.mark.parametrize("per_host", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("hosts", [1, 2, 3])
def test_no_group_sits_worse_than_said(hosts: int, per_host: int) -> None:
    """Of every group each host that holds any holds as many as said, or a multiple."""
    mesh = Mesh.parse(f"{hosts}x{per_host}:cpu")
    for stride in range(1, mesh.size + 1):
        for size in range(1, mesh.size // stride + 1):
            if mesh.size % (stride * size):
                continue
            found = mesh.group(stride, size)
            assert size % found.per_host == 0 and (found.hosts > 1) == (mesh.link(stride, size) is not mesh.intra)
            for first in (rank for rank in range(mesh.size) if rank // stride % size == 0):
                held = Counter((first + k * stride) // per_host for k in range(size))
                assert all(count % found.per_host == 0 for count in held.values()), (stride, size)


def test_stages_share_the_cards_of_a_host() -> None:
    mesh = Mesh.parse("2x8:a10g")
    assert mesh.between(8, 2, 4).bandwidth == mesh.inter.bandwidth / 8
    assert mesh.between(2, 8, 4).bandwidth == mesh.inter.bandwidth / 2
    assert replace(mesh, hosts=1).between(4, 2, 4) is mesh.intra
