"""Seconds of a resharding."""

from typing import Any

from autopart.cost.collectives import COLLECTIVES
from autopart.cost.compute import with_launch
from autopart.cost.slowest import of_slowest
from autopart.hardware.mesh import Group
from autopart.hardware.rows import Device
from autopart.sharding.resharding import Reshard


@of_slowest
def row_seconds(row: Reshard, nbytes: Any, group: Group, grad: bool, device: Device) -> tuple[Any, Any]:
    """Seconds, forward and backward, of a resharding.

    row     the row of the table of reshardings
    nbytes  bytes of the tensor, whole along this axis; may be an array
    grad    whether gradients flow through the tensor

    A resharding without a collective still is one kernel.
    """
    pace = device.measured.pace if device.measured else 1.0
    forward, backward = (
        pace * with_launch(COLLECTIVES[name](nbytes, group), device) if name else 0.0 * nbytes
        for name in (row.forward, row.backward if grad else "")
    )
    free = not row.forward and not (grad and row.backward)
    return forward + device.launch_seconds if free else forward, backward + forward if row.regathers else backward
