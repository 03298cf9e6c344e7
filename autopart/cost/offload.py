"""Bytes and seconds of optimizer states in the memory of the host, as in ZeRO-Offload (Ren et al., arXiv 2101.06840).

Once a step a rank copies the gradients of what it trains to its host, whose cores step the optimizer, and copies the
new parameters back. Of a parameter of p bytes on the device, m in the master dtype (m = p without one), with k
optimizer states, a rank of d data-parallel ranks has on its host

    (2 + k) m        bytes at ZeRO 0:            a copy of the parameter, its gradient, its states
    (2 + k) m / d    bytes from ZeRO 1 on
"""

from autopart.hardware.rows import Host

OFFLOADS = ("none", "optimizer")
"""What lies on the host: nothing; or the optimizer's states and its copy of the parameters."""

HOST_PASSES = {"sgd": 3, "momentum": 5, "adagrad": 5, "rmsprop": 13, "adam": 7, "adamw": 7}
"""Optimizer -> tensors of a parameter's size that its step on a CPU reads and writes. torch's fused steps pass over
memory once: gradient, parameter and states are read, all but the gradient written. RMSprop has none; its tensors are
those of `training_state.STEP_PASSES`."""

FUSED_ON_HOST = frozenset(HOST_PASSES) - {"rmsprop"}
"""Optimizers of which torch has a fused step on CPUs: it allocates nothing."""


def host_bytes(master_bytes: float, states: int) -> float:
    """Bytes on the host of a rank that trains `master_bytes` of parameters, in the master dtype."""
    return (2 + states) * master_bytes


def host_seconds(optimizer: str, nbytes: float, master_bytes: float, share: Host) -> float:
    """Seconds of a step on the host, for a rank that trains `nbytes` of parameters, `master_bytes` in the master dtype.

        master_bytes / link                      the gradient down
        HOST_PASSES master_bytes / bandwidth     the optimizer's step
        (master_bytes + nbytes) / bandwidth      the parameter in the device's dtype, where that is another
        nbytes / link                            the parameter up

    share  what a device has of its host (`Device.host_share`). Copies and steps do not overlap.
    """
    cast = master_bytes + nbytes if master_bytes > nbytes else 0.0
    moved = HOST_PASSES[optimizer] * master_bytes + cast
    return (master_bytes + nbytes) / (share.link * share.copied) + moved / (share.bandwidth * share.updated)
