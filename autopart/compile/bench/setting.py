"""What every system of a benchmark is given, and what a system is."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from autopart.frontend.batch import Batch, samples_of
from autopart.frontend.torch_private import tree_leaves
from autopart.hardware.mesh import Mesh
from autopart.passes.trace import loss_of

OPTIMIZERS: Mapping[str, Any] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}

Step = Callable[[], Tensor]
"""A training step on the setting's batch: forward, backward and optimizer; the loss of the whole batch."""


class NotExpressibleError(Exception):
    """A system has no way to train this model on these ranks."""


@dataclass(frozen=True)
class Setting:
    """What every system is given.

    model          on the CPU, in training mode; systems train copies
    batch          of all ranks, on the CPU
    device         of this rank
    mesh           of autopart; the names of its devices price the plans
    micro_batches  of every pipeline
    optimizer, lr  a name of OPTIMIZERS and its learning rate
    """

    model: nn.Module
    batch: Batch
    device: torch.device
    mesh: Mesh
    micro_batches: int = 1
    optimizer: str = "sgd"
    lr: float = 0.1

    @property
    def rank(self) -> int:
        """This process's rank."""
        return dist.get_rank()

    @property
    def size(self) -> int:
        """The number of ranks."""
        return dist.get_world_size()

    def copy_of_model(self) -> nn.Module:
        """The model on the device, for one system to train."""
        return copy.deepcopy(self.model).to(self.device).train()

    def whole_batch(self) -> dict[str, Any]:
        """The batch of all ranks, on the device."""
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in self.batch.items()}

    def share_of_batch(self) -> dict[str, Any]:
        """This rank's samples where ranks split the batch. Raises NotExpressibleError where they do not divide."""
        samples = samples_of(self.batch)
        if samples % self.size:
            raise NotExpressibleError(f"{samples} samples do not divide by {self.size} ranks")
        return {k: v.chunk(self.size)[self.rank] if isinstance(v, Tensor) else v for k, v in self.whole_batch().items()}

    def optimizer_of(self, parameters: Any) -> torch.optim.Optimizer:
        """The optimizer of every system, over parameters or groups of them."""
        return OPTIMIZERS[self.optimizer](parameters, lr=self.lr)

    def device_mesh(self, *axes: tuple[str, int]) -> DeviceMesh:
        """PyTorch's mesh over all ranks with these names and degrees of axes."""
        names, degrees = zip(*axes, strict=True)
        return init_device_mesh(self.device.type, degrees, mesh_dim_names=names)


@dataclass(frozen=True)
class System:
    """A way to train.

    build  makes a step, and says in words what was chosen; raises NotExpressibleError, ImportError or what the system
           raises where it cannot
    like   the name of autopart's plan of the same degrees, if there is one
    """

    build: Callable[[Setting], tuple[Step, str]]
    like: str = ""


def plain_step(model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer) -> Step:
    """A training step as one writes it for a single process; the loss is that of `batch`."""

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_from(model(**batch))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def loss_from(output: Any) -> Tensor:
    """The loss among what a model returns. Raises NotExpressibleError where there is none."""
    if isinstance(output, Tensor):
        return output
    found = loss_of(output, tree_leaves(output), lambda value: isinstance(value, Tensor) and not value.dim())
    if not isinstance(found, Tensor):
        raise NotExpressibleError("the model returns no loss")
    return found


def mean_over_ranks(loss: Tensor) -> Tensor:
    """The loss of the whole batch from those of the ranks' equal shares."""
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def micro_batches_text(number: int) -> str:
    """A number of micro-batches in words."""
    return f"{number} micro-batch{'es' * (number > 1)}"
