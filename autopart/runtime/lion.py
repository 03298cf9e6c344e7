"""Lion (Chen et al., arXiv 2302.06675) as an optimizer of torch's, by one kernel on GPUs."""

from collections.abc import Callable
from typing import Any

import torch

from autopart.errors import PartitionError
from autopart.kernels.lion import Rates, lion_together, reference
from autopart.kernels.many_tensors import Shard, kernels_apply


class Lion(torch.optim.Optimizer):
    """Steps by the sign of a mean of gradients: half the states of AdamW.

    A parameter w with gradient g and mean m is updated as

        w = (1 - lr weight_decay) w - lr sign(beta1 m + (1 - beta1) g),   m = beta2 m + (1 - beta2) g

    On GPUs one kernel steps all float32 parameters; elsewhere torch's operators do the same.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        """Settings of each group, as of torch's optimizers. Raises PartitionError for numbers out of range."""
        if not (lr >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise PartitionError(f"Lion has lr={lr}, betas={betas}, weight_decay={weight_decay}", try_="lr=1e-4")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Returns what `closure` does, which is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rates, (beta1, beta2) = Rates(float(group["lr"]), group["weight_decay"]), group["betas"]
            together = []
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                gradient, mean = parameter.grad, state["exp_avg"]
                shard = Shard(gradient, (parameter, mean), None)
                if kernels_apply(shard):
                    together.append(shard)
                else:
                    reference(gradient, parameter, mean, None, None, rates.lr, beta1, beta2, rates.decay)
            if together:
                lion_together(together, [rates] * len(together), None, beta1, beta2)
        return loss
