"""The machines a plan is made for: devices, links, and the mesh of hosts they form.

Ranks fill hosts one after the other: rank r sits on host ``r // devices_per_host``.

Conventions of the tables
-------------------------
FLOP/s are dense peaks; datasheets that print the rate with 2:4 sparsity are halved. A rate is that of
matrix products, hence of tensor cores where the type has them. Memory is the datasheet's capacity at 1e9
bytes to the GB, and bandwidth that of one direction; NVLink datasheets print the sum of both directions.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import PartitionError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("pp", "dp", "tp")
"""The axes whose degrees a user may fix: pipeline, data and tensor parallelism."""

_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Device:
    """One kind of device.

    flops           dense peak FLOP/s by dtype ("float64", "float32", "tf32", "float16", "bfloat16",
                    "float8"); a dtype the device does not support is absent
    memory_bytes    capacity in bytes
    bandwidth       bytes/s of device memory
    launch_seconds  fixed overhead of one kernel, in seconds
    link            name of the link between devices of one host
    source          where the numbers are from
    """

    name: str
    flops: Mapping[str, float] = field(hash=False)
    memory_bytes: int
    bandwidth: float
    launch_seconds: float
    link: str
    source: str


@dataclass(frozen=True)
class Link:
    """One kind of link: `bandwidth` in bytes/s, one direction, per device; latency per message in seconds."""

    name: str
    bandwidth: float
    latency_seconds: float
    source: str


LAUNCH_SECONDS = 5e-6
"""Seconds per kernel, CPU and GPU alike. An assumption: launches are commonly measured at 4 to 6 us."""

_HOPPER_FLOPS = {
    "float64": 67e12,
    "float32": 67e12,
    "tf32": 494.5e12,
    "float16": 989.5e12,
    "bfloat16": 989.5e12,
    "float8": 1979e12,
}
_HOPPER_SOURCE = "FP64 tensor 67, FP32 67, TF32 989/2, BF16 and FP16 1979/2, FP8 3958/2 TFLOPS (sparse/2)"
_AMPERE_FLOPS = {
    "float64": 19.5e12,
    "float32": 19.5e12,
    "tf32": 156e12,
    "float16": 312e12,
    "bfloat16": 312e12,
}
_AMPERE_SOURCE = "FP64 tensor 19.5, FP32 19.5, TF32 156, BF16 and FP16 312 TFLOPS"

_DEVICES = (
    Device(
        name="cpu",
        flops={"float64": 2.5e10, "float32": 5e10, "float16": 2.5e10, "bfloat16": 2.5e10},
        memory_bytes=8 * 2**30,
        bandwidth=1e10,
        launch_seconds=LAUNCH_SECONDS,
        link="shared-memory",
        source="assumption: one core's share of a server CPU, 5e10 FLOP/s in float32, 8 GiB, 1e10 bytes/s",
    ),
    Device(
        name="v100-32gb",
        flops={"float64": 7.8e12, "float32": 15.7e12, "float16": 125e12},
        memory_bytes=32 * 10**9,
        bandwidth=900e9,
        launch_seconds=LAUNCH_SECONDS,
        link="nvlink2",
        source="NVIDIA V100 Tensor Core GPU datasheet, SXM2: FP64 7.8, FP32 15.7, tensor 125 TFLOPS; 32 GB; 900 GB/s",
    ),
    Device(
        name="a100-40gb",
        flops=_AMPERE_FLOPS,
        memory_bytes=40 * 10**9,
        bandwidth=1555e9,
        launch_seconds=LAUNCH_SECONDS,
        link="nvlink3",
        source=f"NVIDIA A100 Tensor Core GPU datasheet, 40GB SXM: {_AMPERE_SOURCE}; 40 GB; 1555 GB/s",
    ),
    Device(
        name="a100-80gb",
        flops=_AMPERE_FLOPS,
        memory_bytes=80 * 10**9,
        bandwidth=2039e9,
        launch_seconds=LAUNCH_SECONDS,
        link="nvlink3",
        source=f"NVIDIA A100 Tensor Core GPU datasheet, 80GB SXM: {_AMPERE_SOURCE}; 80 GB; 2039 GB/s",
    ),
    Device(
        name="h100-80gb",
        flops=_HOPPER_FLOPS,
        memory_bytes=80 * 10**9,
        bandwidth=3.35e12,
        launch_seconds=LAUNCH_SECONDS,
        link="nvlink4",
        source=f"NVIDIA H100 Tensor Core GPU datasheet, SXM: {_HOPPER_SOURCE}; 80 GB; 3.35 TB/s",
    ),
    Device(
        name="h200",
        flops=_HOPPER_FLOPS,
        memory_bytes=141 * 10**9,
        bandwidth=4.8e12,
        launch_seconds=LAUNCH_SECONDS,
        link="nvlink4",
        source=f"NVIDIA H200 Tensor Core GPU datasheet, SXM: {_HOPPER_SOURCE}; 141 GB; 4.8 TB/s",
    ),
    Device(
        name="b200",
        flops={
            "float64": 40e12,
            "float32": 80e12,
            "tf32": 1.1e15,
            "float16": 2.25e15,
            "bfloat16": 2.25e15,
            "float8": 4.5e15,
        },
        memory_bytes=180 * 10**9,
        bandwidth=8e12,
        launch_seconds=LAUNCH_SECONDS,
        link="nvlink5",
        source="NVIDIA Blackwell Architecture Technical Brief, HGX B200 per GPU: FP64 40, FP32 80, "
        "TF32 2.2/2, BF16 and FP16 4.5/2, FP8 9/2 PFLOPS (sparse/2); 8 TB/s. "
        "NVIDIA DGX B200 datasheet: 1440 GB / 8",
    ),
)
DEVICES: Mapping[str, Device] = {device.name: device for device in _DEVICES}
"""The known devices by name."""

_ALPHA_SOURCE = "latency: NCCL tuning table, ring, LL128,"

_LINKS = (
    Link("shared-memory", 2e9, 5e-5, "assumption: order of magnitude of gloo within one host"),
    Link("nvlink2", 150e9, 1.9e-6, f"NVIDIA V100 datasheet: 300 GB/s / 2; {_ALPHA_SOURCE} NVLink"),
    Link("nvlink3", 300e9, 1.9e-6, f"NVIDIA A100 datasheet: 600 GB/s / 2; {_ALPHA_SOURCE} NVLink"),
    Link("nvlink4", 450e9, 1.9e-6, f"NVIDIA H100 datasheet: 900 GB/s / 2; {_ALPHA_SOURCE} NVLink"),
    Link("nvlink5", 900e9, 1.9e-6, f"NVIDIA DGX B200 datasheet: 1.8 TB/s / 2; {_ALPHA_SOURCE} NVLink"),
    Link("pcie4", 32e9, 2.5e-6, f"NVIDIA A100 datasheet: PCIe Gen4 x16 64 GB/s / 2; {_ALPHA_SOURCE} PCI"),
    Link("ib-hdr", 25e9, 4e-6, f"NVIDIA ConnectX-6 datasheet: HDR 200 Gb/s; {_ALPHA_SOURCE} network"),
    Link("ib-ndr", 50e9, 4e-6, f"NVIDIA ConnectX-7 datasheet: NDR 400 Gb/s; {_ALPHA_SOURCE} network"),
    Link("ethernet", 1.25e9, 1e-4, "IEEE 802.3ae: 10 Gb/s; latency: assumption, gloo over TCP"),
)
LINKS: Mapping[str, Link] = {link.name: link for link in _LINKS}
"""The known links by name."""

INTER: Mapping[str, str] = {
    "cpu": "ethernet",
    "v100-32gb": "ib-hdr",
    "a100-40gb": "ib-hdr",
    "a100-80gb": "ib-hdr",
    "h100-80gb": "ib-ndr",
    "h200": "ib-ndr",
    "b200": "ib-ndr",
}
"""The link between hosts, by device, where the user names none: the fabric the device's DGX ships with."""

_CUDA_NAMES = {
    r"Tesla V100-SXM\d-32GB": "v100-32gb",
    r"(NVIDIA )?A100-SXM\d?-40GB": "a100-40gb",
    r"(NVIDIA )?A100-SXM\d?-80GB": "a100-80gb",
    r"NVIDIA H100 80GB HBM3": "h100-80gb",
    r"NVIDIA H200": "h200",
    r"NVIDIA B200": "b200",
}
"""What the CUDA driver calls a device, as a pattern for the full name -> row of DEVICES, oldest first."""

_GRAMMAR = re.compile(r"(?:(\d+)x)?(\d+):([\w.-]+)(?:@([\w.-]+))?")


@dataclass(frozen=True)
class Mesh:
    """`hosts` hosts of `devices_per_host` equal devices each.

    intra  the link between devices of one host
    inter  the link between hosts
    axes   degrees the user has fixed, outermost first, e.g. ``(("pp", 2), ("dp", 2), ("tp", 2))``;
           empty leaves all to the planner. Their product divides `size`, and equals it if all are given

    Raises PartitionError if a size is below 1 or `axes` does not fit.
    """

    hosts: int
    devices_per_host: int
    device: Device
    intra: Link
    inter: Link
    axes: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if min(self.hosts, self.devices_per_host) < 1:
            raise PartitionError(
                f"a mesh of {self.hosts} x {self.devices_per_host} devices is empty",
                try_="at least 1 host of 1 device",
            )
        _check_axes(self.axes, self.size)

    @property
    def size(self) -> int:
        """The number of devices, which is that of ranks."""
        return self.hosts * self.devices_per_host

    @property
    def memory_bytes(self) -> int:
        """The memory of one device in bytes, which every rank has to get by with."""
        return self.device.memory_bytes

    def link(self, stride: int, size: int) -> Link:
        """The slowest link within the groups of `size` ranks spaced `stride` apart that tile the mesh.

        The groups interleave in blocks of ``stride * size`` ranks, so that a host boundary inside a block
        parts at least one of them; the link is then `inter`. Raises PartitionError if the mesh has no such
        group.
        """
        if min(stride, size) < 1 or (size - 1) * stride >= self.size:
            raise PartitionError(f"{self} has no group of {size} ranks spaced {stride} apart")
        within = size == 1 or self.hosts == 1 or self.devices_per_host % (stride * size) == 0
        return self.intra if within else self.inter

    def __str__(self) -> str:
        """The text `parse` reads; `axes` and a custom `intra` are not part of it (see `to_json`)."""
        hosts = f"{self.hosts}x" if self.hosts > 1 else ""
        link = f"@{self.inter.name}" if self.inter.name != INTER.get(self.device.name) else ""
        return f"{hosts}{self.devices_per_host}:{self.device.name}{link}"

    @staticmethod
    def parse(text: str) -> Mesh:
        """Read ``"[HOSTSx]DEVICES:DEVICE[@LINK]"``, LINK being the one between hosts.

        ``"4x8:h100-80gb"`` is 4 hosts of 8, ``"4:cpu"`` one host of 4, ``"2x8:a100-80gb@ib-hdr"`` names
        the link. Raises PartitionError on other text, zero sizes and names not in DEVICES or LINKS.
        """
        match = _GRAMMAR.fullmatch(text.strip().lower())
        if match is None:
            raise PartitionError(
                f"not a mesh: {text!r}",
                why='the form is "[HOSTSx]DEVICES:DEVICE[@LINK]"',
                try_='"4x8:h100-80gb", "4:cpu" or "2x8:a100-80gb@ib-hdr"',
            )
        hosts, devices, name, link = match.groups()
        device = _look_up(DEVICES, name, "device")
        inter = _look_up(LINKS, link or INTER[device.name], "link")
        return Mesh(int(hosts or 1), int(devices), device, LINKS[device.link], inter)

    @staticmethod
    def of(obj: str | Mesh | DeviceMesh) -> Mesh:
        """The mesh `obj` describes: text for `parse`, a Mesh (returned as it is) or a torch DeviceMesh.

        A DeviceMesh fixes `axes` by its dim names, which must be among AXES; its ranks must be 0, 1, ...
        in order. A cpu one gets the cpu row, a cuda one the row of the current device, with a warning if
        that is only the nearest. LOCAL_WORLD_SIZE tells the devices per host; unset, there is one host.

        Raises PartitionError on anything else.
        """
        if isinstance(obj, Mesh):
            return obj
        if isinstance(obj, str):
            return Mesh.parse(obj)
        from torch.distributed.device_mesh import DeviceMesh

        if isinstance(obj, DeviceMesh):
            return _of_device_mesh(obj)
        raise PartitionError(
            f"not a mesh: {obj!r}",
            try_='text such as "4x8:h100-80gb", an autopart Mesh or a torch DeviceMesh',
        )

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and text; device and links go by full row, known or custom."""
        return asdict(self) | {"axes": [list(axis) for axis in self.axes]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Mesh:
        """The inverse of `to_json`. Raises PartitionError if a field is missing or unknown."""
        try:
            return Mesh(
                **{
                    **data,
                    "device": Device(**data["device"]),
                    "intra": Link(**data["intra"]),
                    "inter": Link(**data["inter"]),
                    "axes": tuple((name, degree) for name, degree in data["axes"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise PartitionError("not a mesh in JSON", why=f"{type(error).__name__}: {error}") from error


def _look_up(table: Mapping[str, _Row], name: str, kind: str) -> _Row:
    """The row of `table` called `name`, or a PartitionError that lists the names and the closest.

    Names that begin alike go before difflib's, to which "h200" is closer to "h100" than "h100-80gb" is.
    """
    if name in table:
        return table[name]
    closest = [known for known in table if known.startswith(name)]
    closest = closest or difflib.get_close_matches(name, table, n=1)
    raise PartitionError(
        f"unknown {kind} {name!r}",
        why=f"known are {', '.join(table)}",
        try_=" or ".join(map(repr, closest)),
    )


def _check_axes(axes: Iterable[tuple[str, int]], size: int) -> None:
    names, degrees = [name for name, _ in axes], [degree for _, degree in axes]
    if len(set(names)) < len(names) or not set(names) <= set(AXES):
        raise PartitionError(f"bad mesh axes {names}", why=f"each must be one of {', '.join(AXES)}, once")
    product = math.prod(degrees)
    complete = len(names) == len(AXES)
    if min(degrees, default=1) < 1 or size % product or (complete and product != size):
        given = ", ".join(f"{name}={degree}" for name, degree in axes)
        raise PartitionError(
            f"the degrees {given} do not fit {size} devices",
            why=f"their product {product} must {'equal' if complete else 'divide'} {size}",
        )


def _of_device_mesh(device_mesh: DeviceMesh) -> Mesh:
    names = device_mesh.mesh_dim_names
    if names is None:
        raise PartitionError(
            "the DeviceMesh has no dim names",
            why="they tell which degree each dim fixes",
            try_=f"mesh_dim_names out of {AXES}",
        )
    ranks = device_mesh.mesh.flatten().tolist()
    if ranks != list(range(len(ranks))):
        raise PartitionError(
            f"the DeviceMesh holds the ranks {ranks}",
            why="a plan is made for all ranks, in order",
            try_="the root mesh, as init_device_mesh makes it",
        )
    device = _of_device_type(device_mesh.device_type)
    per_host = _devices_per_host(len(ranks))
    return Mesh(
        hosts=len(ranks) // per_host,
        devices_per_host=per_host,
        device=device,
        intra=LINKS[device.link],
        inter=LINKS[INTER[device.name]],
        axes=tuple(zip(names, device_mesh.shape, strict=True)),
    )


def _devices_per_host(size: int) -> int:
    """LOCAL_WORLD_SIZE, as torchrun sets it, for a mesh of `size` ranks; `size` if unset or larger."""
    text = os.environ.get("LOCAL_WORLD_SIZE", str(size))
    local = min(int(text), size) if text.isdecimal() else 0
    if local < 1 or size % local:
        raise PartitionError(
            f"LOCAL_WORLD_SIZE={text} does not divide the {size} ranks of the DeviceMesh",
            why="every host must hold as many ranks",
        )
    return local


def _of_device_type(device_type: str) -> Device:
    import torch

    if device_type == "cpu":
        return DEVICES["cpu"]
    if device_type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return _of_cuda(torch.cuda.get_device_name(), properties.total_memory)
    raise PartitionError(
        f"no device row for a DeviceMesh on {device_type!r}",
        why="CUDA finds no device here" if device_type == "cuda" else "only cpu and cuda are known",
        try_='text that names the device, such as "4x8:h100-80gb", or a Mesh with a Device of your own',
    )


def _of_cuda(name: str, memory_bytes: int) -> Device:
    """The row for the CUDA device `name`, or, with a warning, the one nearest in memory.

    Of rows with equal memory the one whose model is part of the name is taken, else the newest.
    """
    for pattern, row in _CUDA_NAMES.items():
        if re.fullmatch(pattern, name):
            return DEVICES[row]

    def distance(row: str) -> tuple[float, bool]:
        model = row.partition("-")[0]
        return abs(math.log(memory_bytes / DEVICES[row].memory_bytes)), model not in name.lower()

    nearest = min(reversed(_CUDA_NAMES.values()), key=distance)
    warnings.warn(f"unknown CUDA device {name!r}: taken for the nearest known one, {nearest}", stacklevel=5)
    return DEVICES[nearest]
