"""Seconds of a step that a device, or its host, spends on gradients and parameters without messages: to add up the
gradients of micro-batches, and to update."""

from autopart.cost.collectives import measured_seconds
from autopart.cost.compute import stream_rate_seconds
from autopart.cost.offload import host_seconds
from autopart.cost.slowest import of_slowest
from autopart.cost.training_state import OPTIMIZER_STATES, Training
from autopart.hardware.rows import Device


@of_slowest
def update_seconds(nbytes: float, grad: bool, over_dp: bool, training: Training, device: Device) -> float:
    """Seconds of a step to add up the gradients of micro-batches and to update a parameter of `nbytes`, or the rank's
    slice of it.

    On a device with measured tables: by these. An optimizer that was not measured has the seconds of a measured one:
    of that with the fewest states among those with at least as many, else of that with the most.
    On a device with `silicon`: bytes moved (`summing_seconds`, `step_bytes`) / memory bandwidth.
    On another device: 0.
    Where the states are on a host that is known, the step takes `host_seconds`.
    """
    if not grad:
        return 0.0
    master_bytes, slices = nbytes * training.widening, training.slices(over_dp)
    measured, share = device.measured, device.host_share if training.offload else None
    on_host = host_seconds(training.optimizer, nbytes / slices, master_bytes / slices, share) if share else 0.0
    if measured is None:
        if device.silicon is None:
            return on_host
        step = 0.0 if share else stream_rate_seconds(training.step_bytes(nbytes, over_dp), device)
        return summing_seconds(nbytes, training, device) + step + on_host
    seconds = (training.micro_batches - 1) * measured_seconds(master_bytes, measured.accumulate)
    if share:
        return float(seconds * measured.pace + on_host)
    if training.offload:  # to the host and back, in the same memory
        seconds += 2 * measured_seconds(master_bytes / slices, measured.accumulate)
    more = {name: OPTIMIZER_STATES[name] - OPTIMIZER_STATES[training.optimizer] for name in measured.updates}
    stands_for = min(more, key=lambda name: (name != training.optimizer, more[name] < 0, abs(more[name])), default="")
    rows = measured.updates.get(stands_for, ((1.0, 0.0, 0.0),))
    return float(seconds * measured.pace + measured_seconds(master_bytes / slices, rows))


def summing_seconds(nbytes: float, training: Training, device: Device) -> float:
    """Seconds of a step to add up the gradients of a parameter of `nbytes` over micro-batches, on a device with
    `silicon`. For each micro-batch but the first, the gradient is read, and the sum is read and written. The gradient
    of the first is the sum; with a master copy it is read, and written in the master dtype."""
    master_bytes = nbytes * training.widening
    first = nbytes + master_bytes if training.widening > 1 else 0.0
    return stream_rate_seconds(first + (training.micro_batches - 1) * (nbytes + 2 * master_bytes), device)
