"""The rows of the tables of devices and links."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .measured import Measured, Wire

DTYPES = ("float64", "float32", "tf32", "float16", "bfloat16", "float8")
"""The dtypes a device may have a peak for."""


RAMP = 120.0
"""Elements of k whose time the start and the end of a tile of a product take. Fitted on 183 products of an A100 80GB
PCIe and used for all devices; on the others the formula errs as little:
`benchmarks/data/simumax_gemm_sdp_efficiency.csv`."""

FEED = 60.0
"""Intensity tm tn / (tm + tn) of the tile that is fed half as fast as an infinitely large tile computes. Fitted with
RAMP."""

MEMORY = 0.813
"""Share of the memory bandwidth that streaming kernels reach. Fitted on 4768 operators of a V100 and used for all
devices: `benchmarks/data/aceso_v100_gpt_op_profile.csv`."""

KERNEL_SECONDS = 2.8e-6
"""Seconds of an empty kernel on the device. Fitted with MEMORY."""


OVERLAPPED, SEQUENTIAL = 1.189, 1.102
"""Seconds of steps whose messages are hidden behind computing / seconds of the computing alone; seconds of the same
steps with computing and messages one after the other / those with messages hidden. Means over A100, H100, MI210 and
MI250 of Lee et al., Characterizing Compute-Communication Overlap, arXiv 2507.03114."""

OVERLAP_SLOWDOWN = (OVERLAPPED * SEQUENTIAL - 1) / (OVERLAPPED * SEQUENTIAL - OVERLAPPED)
"""Factor by which a GPU computes slower while a collective runs, 2.6: the messages take OVERLAPPED x SEQUENTIAL - 1 of
the seconds of computing, and OVERLAPPED - 1 of these are lost."""


@dataclass(frozen=True)
class Silicon:
    """Physical constants of a device, from which `autopart.cost.kernel_efficiency` computes the seconds of kernels.

    processors      number of multiprocessors
    issue           share of the peak FLOP/s that the inner loop of the largest tile reaches
    sustained       share of the peak that all multiprocessors together sustain under the power limit
    attention       share of `issue` that fused attention reaches, forward and backward; exponentials run between its
                    products
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


COPIED = 0.78
"""Share of a PCIe link that copies between pinned host memory and a device reach. Assumption: 25 GB/s of PCIe Gen4 x16,
as `bandwidthTest` of CUDA's samples commonly prints."""

UPDATED = 0.5
"""Share of the host's memory bandwidth that an optimizer's step on its cores reaches. Assumption."""


@dataclass(frozen=True)
class Host:
    """The usual host of a device, whose memory and links `Device.devices_per_host` devices share in equal parts.

    memory_bytes  of the host
    bandwidth     bytes/s of the host's memory
    link          bytes/s, one direction, between the host's memory and one device while all devices copy
    source        where the numbers are from
    copied        share of `link` that copies reach;  updated: share of `bandwidth` that an optimizer's step reaches
    """

    memory_bytes: int
    bandwidth: float
    link: float
    source: str
    copied: float = COPIED
    updated: float = UPDATED


@dataclass(frozen=True)
class Device:
    """One kind of device, and the host it usually sits in.

    flops             dtype of DTYPES -> dense peak FLOP/s of matrix products, on tensor cores where the device has them
                      for the dtype; a dtype that the device does not support is absent
    memory_bytes      capacity in bytes: the datasheet's, at 1e9 bytes to the GB
    bandwidth         bytes/s of device memory
    launch_seconds    overhead of a kernel launch, in seconds. Without `silicon` it is added to every kernel; with
                      `silicon` it is the least that a kernel takes, because a queue of kernels hides launches behind
                      longer kernels
    link              name of the link between devices of one host
    source            where the numbers are from
    inter             name of the link between hosts, where the user names none
    devices_per_host  number of devices of a usual host
    nics_per_host     number of network cards of such a host; hosts of another size have as many for each device
    silicon           constants of its kernels; None: seconds are those of a plain roofline
    measured          tables that `autopart.calibrate` measured; where given, all seconds are from these tables
    overlap           factor by which computing is slower while gradients are summed at the same time; 0: gradients are
                      summed after the backward. None: the factor that was measured, else OVERLAP_SLOWDOWN, but 0 on
                      CPUs, whose cores move the messages
    host              the memory of its host, for optimizer states that lie there; None: it is not known, or is the
                      device's own, as on CPUs
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
    host: Host | None = None

    @property
    def type(self) -> str:
        """What torch calls such devices: "cpu" or "cuda". A row without measured tables is of a CPU where its name is
        "cpu" or begins with "cpu-"."""
        return self.measured.type if self.measured else "cpu" if self.name.partition("-")[0] == "cpu" else "cuda"

    @property
    def overlapped_share(self) -> float:
        """Share of a collective's seconds that computing hides: 1 / `overlap`, or 0 where nothing overlaps."""
        usual = 0.0 if self.type == "cpu" else self.measured.overlap if self.measured else OVERLAP_SLOWDOWN
        times = usual if self.overlap is None else self.overlap
        return 1 / max(1.0, times) if times else 0.0

    @property
    def host_share(self) -> Host | None:
        """Of the host, what each of its devices has while all use it alike; None where the host is not known."""
        if self.host is None:
            return None
        n = self.devices_per_host
        return replace(self.host, memory_bytes=self.host.memory_bytes // n, bandwidth=self.host.bandwidth / n)

    @property
    def usable_host_bytes(self) -> float:
        """Bytes of host memory that a plan may use for each device: 80 % of its share, since the model's own weights,
        data loaders and the system take some too. Infinite where the host is not known."""
        return self.host_share.memory_bytes * 0.8 if self.host_share else float("inf")


@dataclass(frozen=True)
class Slowest(Device):
    """What ranks on devices of several kinds have together: the least of each capacity and rate, and the dtypes that
    all of them compute in. Seconds are never those of this row, but the longest of any kind (`autopart.cost.slowest`).

    kinds  the devices, all of one `type`
    """

    kinds: tuple[Device, ...] = ()

    @property
    def type(self) -> str:
        """That of the kinds."""
        return self.kinds[0].type


def kinds_of(device: Device) -> tuple[Device, ...]:
    """The devices that a row stands for: itself alone, but for `Slowest`."""
    return device.kinds if isinstance(device, Slowest) else (device,)


KINDS = ("nvlink", "pci", "network", "host", "gloo")
"""Kinds of links: the three that NCCL has protocols for, "host", which has no protocol, and "gloo", for CPUs of one
host."""

SPINE = "spine"
"""The kind of "network" links between pods of hosts, which no row has: `autopart.hardware.pods.spine_of` makes it."""


@dataclass(frozen=True)
class Link:
    """One kind of link.

    bandwidth        bytes/s, one direction, of one device; between hosts, of one network card
    latency_seconds  of a message, in seconds
    source           where the numbers are from
    kind             of KINDS: the first three have the latencies of NCCL's protocols (see `autopart.cost.collectives`),
                     "host" and "gloo" have their own for every message
    share            share of the bandwidth that rings reach
    exchange         share of the bandwidth that an all-to-all reaches
    wired            number of devices that are wired to each other without a switch; a group of p of them has
                     log p / log wired of a device's links. 0: there is a switch
    measured         tables that `autopart.calibrate` measured inside a host; where given, seconds of groups inside a
                     host and of messages are from these tables
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
