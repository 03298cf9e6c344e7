"""transformers' own tensor parallelism: a checkpoint loaded with the `tp_plan` of its model class."""

from __future__ import annotations

import tempfile

import torch.distributed as dist

from autopart.compile.bench.setting import NotExpressibleError, Setting, Step
from benchmarks.harness.adapters.dtensor import dtensor_step


def build(setting: Setting) -> tuple[Step, str]:
    """`from_pretrained` with tp_plan="auto" over all ranks. Raises NotExpressibleError where the class has no plan."""
    from transformers.distributed import DistributedConfig

    if not getattr(setting.model, "supports_tp_plan", False):
        raise NotExpressibleError(f"{type(setting.model).__name__} has no tp_plan in transformers")
    with tempfile.TemporaryDirectory() as own:
        folders = [own]
        dist.broadcast_object_list(folders, 0)
        (folder,) = folders
        if setting.rank == 0:
            setting.model.save_pretrained(folder)
        dist.barrier()
        config = DistributedConfig(tp_plan="auto", tp_size=setting.size)
        model = type(setting.model).from_pretrained(folder, distributed_config=config)
        dist.barrier()  # rank 0 deletes the folder
    return dtensor_step(model.train(), setting), f"tp={setting.size}, tp_plan of {type(setting.model).__name__}"
