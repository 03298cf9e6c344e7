"""The step of torch.optim.AdamW and Adam in one pass over memory, by the kernel of `autopart.kernels.optimizer`.

The optimizer stays torch's: its groups are read in every step, its states are changed where they lie, and its own
`step` runs too, of the parameters that the kernel does not take. So that schedulers, state dicts and checkpoints see
what they see without the kernel, whose states go on with torch's step and the other way round.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from autopart.frontend.torch_private import post_hooks_of_all_optimizers, pre_hooks_of_all_optimizers
from autopart.kernels.many_tensors import Shard, kernels_apply
from autopart.kernels.optimizer import Rates, adamw_together

Optimizer = torch.optim.Optimizer
TAKEN = (torch.optim.AdamW, torch.optim.Adam)
OFF = ("amsgrad", "maximize", "capturable", "differentiable")
"""Settings that the kernel lacks."""
LEFT_OPEN = ("foreach", "fused")
"""Settings by which a user chooses an implementation."""
STATES = {"step", "exp_avg", "exp_avg_sq"}


def step(optimizer: Optimizer, factor: Tensor | float = 1.0, weights: Mapping[Any, Tensor] | None = None) -> set[Any]:
    """Step the parameters that the kernel takes, with their gradients times a factor, and write them into `weights`,
    parameter -> the tensor that has it in another dtype. Returns the parameters."""
    groups: dict[tuple[float, float, float], list[tuple[Any, Shard, Rates]]] = defaultdict(list)
    for group in optimizer.param_groups if _is_plain(optimizer) else ():
        if _has_kernel(group):
            for parameter in group["params"]:
                if (shard := _shard(optimizer, parameter, (weights or {}).get(parameter))) is not None:
                    count = optimizer.state[parameter]["step"].add_(1)
                    own = Rates(count.item(), group["lr"], group["weight_decay"])
                    groups[(*group["betas"], group["eps"])].append((parameter, shard, own))
    for constants, members in groups.items():
        shards, rates = [shard for _, shard, _ in members], [own for _, _, own in members]
        adamw_together(shards, rates, _on(shards[0].gradient.device, factor), *constants)
    return {parameter for members in groups.values() for parameter, _, _ in members}


@contextmanager
def without_gradients(parameters: Collection[Any]) -> Iterator[None]:
    """In this context parameters have no gradients: an optimizer's step leaves them as they are."""
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


def _is_plain(optimizer: Optimizer) -> bool:
    """Whether an optimizer's step is torch's own, and no hook of a user's is called before or after it: it would see
    gradients without the factor. The one hook of every optimizer here is that of `Compiled.optimizer`."""
    replaced = vars(optimizer).get("step")
    hooks = (
        *optimizer._optimizer_step_post_hooks,
        *list(optimizer._optimizer_step_pre_hooks)[1:],
        *pre_hooks_of_all_optimizers,
        *post_hooks_of_all_optimizers,
    )
    by_scheduler = replaced is None or hasattr(replaced, "_wrapped_by_lr_sched")
    return type(optimizer) in TAKEN and by_scheduler and not hooks


def _has_kernel(group: Mapping[str, Any]) -> bool:
    """Whether the kernel computes what the settings of a group ask for: the decay apart from the gradient."""
    numbers = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
    return (
        (group.get("decoupled_weight_decay", False) or group["weight_decay"] == 0)
        and not any(group[name] for name in OFF)
        and all(group[name] is None for name in LEFT_OPEN)
        and not any(isinstance(number, Tensor) for number in numbers)
    )


def _shard(optimizer: Optimizer, parameter: Any, weight: Tensor | None) -> Shard | None:
    """A parameter with its gradient and states, which are made as torch makes them; None where the kernel does not take
    them."""
    gradient = parameter.grad
    if gradient is None or not kernels_apply(Shard(gradient, (parameter,), weight)):
        return None
    state = optimizer.state[parameter]
    if not state:
        wide = torch.get_default_dtype() == torch.float64
        state["step"] = torch.tensor(0.0, dtype=torch.float64 if wide else torch.float32)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    if set(state) != STATES or state["step"].device.type != "cpu":
        return None
    shard = Shard(gradient, (parameter, state["exp_avg"], state["exp_avg_sq"]), weight)
    return shard if kernels_apply(shard) else None


def _on(device: torch.device, factor: Tensor | float) -> Tensor | None:
    """A factor on a device; None for 1."""
    if isinstance(factor, Tensor):
        return factor.to(device)
    return None if factor == 1.0 else torch.full((), factor, dtype=torch.float64, device=device)
