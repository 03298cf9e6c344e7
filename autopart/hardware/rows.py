"""What is known of a device and of a link: the rows of the tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

DTYPES = ("float64", "float32", "tf32", "float16", "bfloat16", "float8")
"""The dtypes a device may have a peak for."""


@dataclass(frozen=True)
class Device:
    """One kind of device, and the host it usually sits in.

    flops             dense peak FLOP/s by dtype, of DTYPES; a dtype the device does not support is absent. The rate is
                      that of matrix products, hence of tensor cores where the type has them
    memory_bytes      capacity in bytes: the datasheet's, at 1e9 bytes to the GB
    bandwidth         bytes/s of device memory
    launch_seconds    fixed overhead of one kernel, in seconds
    link              name of the link between devices of one host
    source            where the numbers are from
    inter             name of the link between hosts, where the user names none
    devices_per_host  how many such devices a usual host has, and
    nics_per_host     how many network cards for them; hosts of another size have as many a device. The defaults are
                      one card for each device
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


@dataclass(frozen=True)
class Link:
    """One kind of link.

    bandwidth        bytes/s, one direction, of one device; between hosts, of one network card
    latency_seconds  of a message, in seconds
    source           where the numbers are from
    """

    name: str
    bandwidth: float
    latency_seconds: float
    source: str
