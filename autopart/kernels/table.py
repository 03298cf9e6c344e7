"""The table of fused kernels that the compiler puts in the place of operators."""

from autopart.kernels import linear_loss, rms_norm
from autopart.kernels.kernel import Kernel

KERNELS: dict[str, Kernel] = {k.name: k for k in (rms_norm.KERNEL, linear_loss.KERNEL)}
"""Name -> kernel."""


def kernel_of(operator: str) -> Kernel | None:
    """The kernel that an operator of a graph is: ``"autopart.rms_norm"``; None for other operators."""
    family, _, name = operator.partition(".")
    return KERNELS.get(name) if family == "autopart" else None
