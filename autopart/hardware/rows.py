"""What is known of a device and of a link: the rows of the tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .measured import Measured, Wire

DTYPES = ("float64", "float32", "tf32", "float16", "bfloat16", "float8")
"""The dtypes a device may have a peak for."""


RAMP = 120.0
"""Elements of k that starting and finishing a tile of a product costs. Fitted on 183 products of an A100 80GB PCIe, and
held for all other devices, on which the form then errs as little:
`benchmarks/data/simumax_gemm_sdp_efficiency.csv`."""

FEED = 60.0
"""Intensity tm tn / (tm + tn) of the tile that is fed half as fast as an endless one computes. Fitted with RAMP."""

MEMORY = 0.813
"""Share of the memory bandwidth that streaming kernels reach. Fitted on 4768 operators of a V100, and held for all
other devices: `benchmarks/data/aceso_v100_gpt_op_profile.csv`."""

KERNEL_SECONDS = 2.8e-6
"""Of a kernel that does nothing, on the device. Fitted with MEMORY."""


BESIDE = 1.189
"""How many times as long a GPU takes to compute while a collective is on its way: the mean over A100, H100, MI210 and
MI250 of Lee et al., Characterizing Compute-Communication Overlap, arXiv 2507.03114."""


@dataclass(frozen=True)
class Silicon:
    """The physical constants by which `autopart.cost.kernel_efficiency` tells the seconds of kernels.

    processors      multiprocessors
    issue           share of the peak that the inner loop of the largest tile reaches
    sustained       share of the peak that all multiprocessors together sustain under the power limit
    attention       share of `issue` that fused attention reaches, forward and backward: its exponentials run between
                    its products
    source          where the numbers are from
    rows            queries that one block of fused attention takes
    ramp, feed, memory, kernel_seconds
                    see RAMP, FEED, MEMORY and KERNEL_SECONDS
    """

    processors: int
    issue: float
    sustained: float
    attention: tuple[float, float]
    source: str
    rows: int = 128
    ramp: float = RAMP
    feed: float = FEED
    memory: float = MEMORY
    kernel_seconds: float = KERNEL_SECONDS


@dataclass(frozen=True)
class Device:
    """One kind of device, and the host it usually sits in.

    flops             dense peak FLOP/s by dtype, of DTYPES; a dtype the device does not support is absent. The rate is
                      that of matrix products, hence of tensor cores where the type has them
    memory_bytes      capacity in bytes: the datasheet's, at 1e9 bytes to the GB
    bandwidth         bytes/s of device memory
    launch_seconds    fixed overhead of one kernel, in seconds: without `silicon` every kernel's, on top; with it what
                      a kernel takes at least, because a queue of kernels hides the launches behind longer ones
    link              name of the link between devices of one host
    source            where the numbers are from
    inter             name of the link between hosts, where the user names none
    devices_per_host  how many such devices a usual host has, and
    nics_per_host     how many network cards for them; hosts of another size have as many a device. The defaults are
                      one card for each device
    silicon           constants of its kernels; None where nothing was fitted: then a plain roofline tells their seconds
    measured          what `autopart.calibrate` measured of it, which then tells all seconds instead
    overlap           how many times as long it computes while gradients are summed beside it; 0: they are summed after
                      the backward. None: as was measured, else BESIDE; on CPUs, whose cores move the messages, 0
    """

    name: str
    flops: Mapping[str, float] = field(hash=False)
    memory_bytes: int
    bandwidth: float
    launch_seconds: float
    link: str
    source: str
    inter: str = "ethernet"
    devices_per_host: int = 1
    nics_per_host: int = 1
    silicon: Silicon | None = None
    measured: Measured | None = None
    overlap: float | None = None

    @property
    def type(self) -> str:
        """What torch calls such devices: "cpu" or "cuda"."""
        return self.measured.type if self.measured else "cpu" if self.name == "cpu" else "cuda"

    @property
    def beside(self) -> float:
        """How much of a second of a collective is hidden where the device computes beside it: 1 / `overlap`, 0 where it
        does not."""
        usual = 0.0 if self.type == "cpu" else self.measured.overlap if self.measured else BESIDE
        times = usual if self.overlap is None else self.overlap
        return 1 / max(1.0, times) if times else 0.0


KINDS = ("nvlink", "pci", "network", "host")
"""Kinds of links: those that NCCL tells apart, and what it does not drive."""


@dataclass(frozen=True)
class Link:
    """One kind of link.

    bandwidth        bytes/s, one direction, of one device; between hosts, of one network card
    latency_seconds  of a message, in seconds
    source           where the numbers are from
    kind             of KINDS: the first three have the latencies of NCCL's protocols (see `autopart.cost.collectives`),
                     "host" has its own for every message
    share            share of the bandwidth that rings reach
    exchange         share that an all-to-all reaches
    wired            devices that are wired to each other without a switch, a group of p of which has log p / log wired
                     of a device's links; 0 behind a switch
    measured         what `autopart.calibrate` measured of it inside a host: the seconds of those groups and of messages
    """

    name: str
    bandwidth: float
    latency_seconds: float
    source: str
    kind: str = "host"
    share: float = 1.0
    exchange: float = 1.0
    wired: int = 0
    measured: Wire | None = None
