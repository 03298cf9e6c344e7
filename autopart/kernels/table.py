"""The table of fused kernels that the compiler puts in the place of operators."""

from autopart.kernels import (
    activation,
    attention,
    clamped_experts,
    dense_router,
    expert_load,
    experts,
    gated,
    group_norm,
    layer_norm,
    linear_loss,
    optimizer,
    rms_norm,
    rotary,
    router,
    scan,
    score_router,
    softmax,
    topk_router,
)
from autopart.kernels.forms import FORMS
from autopart.kernels.kernel import Kernel

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        *rms_norm.KERNELS,
        *layer_norm.KERNELS,
        *group_norm.KERNELS,
        *rotary.KERNELS,
        *activation.KERNELS,
        *gated.KERNELS,
        router.KERNEL,
        topk_router.KERNEL,
        dense_router.KERNEL,
        score_router.KERNEL,
        experts.KERNEL,
        clamped_experts.KERNEL,
        expert_load.KERNEL,
        linear_loss.KERNEL,
        scan.KERNEL,
        softmax.KERNEL,
        attention.KERNEL,
    )
    if kernel.name in FORMS
}
"""Name -> kernel."""

STEP = optimizer.KERNEL.name
"""The kernel of the optimizer's step, which the runtime calls."""


def kernel_of(operator: str) -> Kernel | None:
    """The kernel that an operator of a graph is: ``"autopart.rms_norm"``; None for other operators."""
    family, _, name = operator.partition(".")
    return KERNELS.get(name) if family == "autopart" else None
