"""The unmodified model on rank 0 alone, with all cores of the host; the other ranks wait."""

import torch
import torch.distributed as dist

from autopart.compile.bench.setting import Setting, Step, plain_step
from autopart.runtime.launch import cores_here


def build(setting: Setting) -> tuple[Step, str]:
    """Rank 0 trains on the whole batch and broadcasts the loss."""
    cores, threads = cores_here(), torch.get_num_threads()
    if setting.rank:
        return lambda: _received(setting.device), "one process"
    model = setting.copy_of_model()
    step = plain_step(model, setting.whole_batch(), setting.optimizer_of(model.parameters()))

    def step_on_all_cores() -> torch.Tensor:
        torch.set_num_threads(cores)
        try:
            loss = step().float()
        finally:
            torch.set_num_threads(threads)
        dist.broadcast(loss, 0)
        return loss

    return step_on_all_cores, f"one process, {cores} threads"


def _received(device: torch.device) -> torch.Tensor:
    loss = torch.zeros((), device=device)
    dist.broadcast(loss, 0)
    return loss
