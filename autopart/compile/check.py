"""Is a plan exact? One step of the plan on simulated ranks, compared with one process."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Unpack

import torch
from torch import nn

from autopart.compile.api import check_plan
from autopart.compile.simulate import simulate_plan
from autopart.frontend.batch import Batch, take
from autopart.frontend.torch_private import tree_leaves
from autopart.frontend.with_loss import Loss, with_loss
from autopart.hardware.mesh import AnyMesh, Mesh
from autopart.ir.graph import calls
from autopart.ir.random_ops import Stream
from autopart.passes.source import Source
from autopart.passes.trace import loss_of
from autopart.plan.data import Plan
from autopart.planner.make_plan import make_plan, request_of
from autopart.planner.request import Settings

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Check:
    """How far a plan's step is from one process's step.

    loss            of the plan's step
    loss_error      relative error of the loss
    gradient_error  the largest error of a gradient (see `worst_error`)
    worst           the parameter that has it
    buffer_error    the largest error of a buffer of the state dict after the step
    worst_buffer    the buffer that has it
    against         what the step is compared with: the model itself or, where it draws random numbers, its one-rank
                    program
    """

    plan: Plan
    loss: float
    loss_error: float
    gradient_error: float
    worst: str
    buffer_error: float
    worst_buffer: str
    against: str

    def __str__(self) -> str:
        loss = f"{self.loss:.6g} is the loss, off by {self.loss_error:.1e} from {self.against}"
        at, buffer = (f" ({name})" if name else "" for name in (self.worst, self.worst_buffer))
        buffers = f"; buffers by at most {self.buffer_error:.1e}{buffer}" if buffer else ""
        return f"{loss}; gradients are off by at most {self.gradient_error:.1e}{at}{buffers}"


def check(
    model: nn.Module,
    mesh: AnyMesh,
    batch: Batch,
    *,
    loss: Loss | None = None,
    plan: Plan | None = None,
    seed: int = 0,
    **settings: Unpack[Settings],
) -> Check:
    """Plan (unless a `plan` is given), run one step with every rank a thread of this process, and compare the loss, the
    gradients and the buffers with those of one process. Arguments and errors as `autopart.compile`.
    """
    mesh = Mesh.of(mesh)
    check_plan(plan, mesh)
    model = with_loss(model, loss)
    request = request_of(model, batch, **settings)
    source = Source.of(model, batch, plan or request)
    plan = plan or make_plan(source, mesh, request, to_run=True)
    batch = take(batch, plan.global_batch)
    source = replace(source, batch=batch)
    split = simulate_plan(source, plan, seed)
    graph = source.full(plan.micro_batch, plan.mesh).traced.graph
    draws = any(isinstance(argument, Stream) for node in calls(graph) for argument in node.args)
    if draws:
        request = request_of(model, batch, micro_batch=plan.micro_batch, precision=plan.precision)
        alone = make_plan(source, Mesh.of("1:cpu"), request, to_run=True)
        whole = simulate_plan(source, alone, seed)
        right, gradients, state = whole.loss, whole.gradients, whole.state
    else:
        trained = copy.deepcopy(model)
        right, gradients = one_process(trained, batch)
        state = trained.state_dict()
    error, worst = worst_error(split.gradients, gradients)
    buffer_error, worst_buffer = worst_error(*(_buffers(model, every) for every in (split.state, state)))
    off = abs(float(split.loss) - float(right)) / max(abs(float(right)), 1e-30)
    against = "its one-rank program" if draws else "the model"
    return Check(plan, float(split.loss), off, error, worst, buffer_error, worst_buffer, against)


def one_process(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and the gradients of the unmodified model after one step in this process."""
    model.zero_grad()
    with torch.enable_grad():
        output = model(**batch)
        loss = loss_of(output, tree_leaves(output), lambda value: isinstance(value, torch.Tensor) and not value.dim())
        loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _buffers(model: nn.Module, state: Tensors) -> dict[str, torch.Tensor]:
    """The buffers in a state dict of a model, as tensors that can be subtracted."""
    found = {name: state[name] for name, _ in model.named_buffers() if name in state}
    return {name: value.float() if value.dtype == torch.bool else value for name, value in found.items()}


def worst_error(found: Tensors, wanted: Tensors) -> tuple[float, str]:
    """The largest error of a tensor, and the tensor's name.

    The error of a tensor is its largest difference over max(its largest element, 1e-3 x the largest element of all
    tensors). The floor is there because some gradients are zero but for rounding, as that of a key's bias in attention,
    which softmax ignores. A tensor that one side lacks counts as zeros.
    """
    largest = {n: float(t.abs().max()) if t.numel() else 0.0 for n, t in wanted.items()}
    floor = max(1e-3 * max(largest.values(), default=0.0), torch.finfo(torch.float32).tiny)
    errors = {"": 0.0}
    for name in {*found, *wanted}:
        zeros = torch.zeros_like(found[name] if name in found else wanted[name])
        difference = found.get(name, zeros) - wanted.get(name, zeros)
        if difference.numel():
            errors[name] = float(difference.abs().max()) / max(largest.get(name, 0.0), floor)
    name = max(errors, key=lambda n: float("inf") if errors[n] != errors[n] else errors[n])
    return errors[name], name
