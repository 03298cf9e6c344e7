"""The bytes of messages of gradients and of weights."""

from autopart.cost.collectives import runs_on_gloo
from autopart.hardware.mesh import Group

BUCKET_BYTES, HOST_BUCKET_BYTES = 64 * 2**20, 8 * 2**20
"""The most bytes of a message of several tensors over the data-parallel axis, on GPUs and on CPUs.
A larger tensor is a message of its own. Memory of a CPU comes back to the next message where the message is smaller
than glibc's mmap threshold, 32 MiB at most (mallopt(3)); a larger one is mapped and cleared anew each time."""


def bucket_bytes(group: Group) -> int:
    """The most bytes of a message of several tensors among the ranks of a group."""
    return HOST_BUCKET_BYTES if runs_on_gloo(group) else BUCKET_BYTES
