"""How much faster a rank computes while others of its host wait in a pipeline's bubble."""

from dataclasses import replace

from autopart.hardware.rows import Device, Slowest, kinds_of


def pace(device: Device, stages: int, micro_batches: int) -> float:
    """`Measured.pace` in a pipeline of so many stages and micro-batches.

    Where ranks share cores (see `Measured.alone`), those that wait in the bubble leave theirs to others. Of the
    (m + p - 1) turns that a step takes each rank computes m, so that m / (m + p - 1) of the ranks are busy at a
    time, and each is as much faster than all are together, though none faster than alone. 1 for a device that was not
    measured, and of devices of several kinds the largest.
    """
    busy = micro_batches / (micro_batches + stages - 1)
    tables = [kind.measured for kind in kinds_of(device)]
    return max(min(1.0, max(busy, 1 / measured.alone)) if measured else 1.0 for measured in tables)


def busy_device(device: Device, stages: int, micro_batches: int) -> Device:
    """The device at its pace in such a pipeline; one that was not measured is returned as it is."""
    if isinstance(device, Slowest):
        return replace(device, kinds=tuple(busy_device(kind, stages, micro_batches) for kind in device.kinds))
    factor = pace(device, stages, micro_batches)
    measured = device.measured
    return device if factor == 1 or not measured else replace(device, measured=replace(measured, pace=factor))
