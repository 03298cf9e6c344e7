"""Rows of devices and links from their JSON in plan files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from autopart.hardware.measured import read_measured, read_wire
from autopart.hardware.rows import Device, Host, Link, Silicon


def device_of(data: Mapping[str, Any]) -> Device:
    """The row of a device. Raises KeyError and TypeError where it is none."""
    silicon = data.get("silicon")
    if silicon is not None:
        silicon = Silicon(**{**silicon, "attention": tuple(silicon["attention"])})
    host = Host(**data["host"]) if data.get("host") else None
    return Device(**{**data, "silicon": silicon, "host": host, "measured": _tables(data, read_measured)})


def link_of(data: Mapping[str, Any]) -> Link:
    """The row of a link. Raises KeyError and TypeError where it is none."""
    return Link(**{**data, "measured": _tables(data, read_wire)})


def _tables(data: Mapping[str, Any], read: Callable[[Any], Any]) -> Any:
    given = data.get("measured")
    if given is not None and (given := read(given)) is None:
        raise TypeError("`measured` is not what autopart calibrate writes")
    return given
