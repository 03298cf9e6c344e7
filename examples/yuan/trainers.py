"""Every trainer of the harness on one model and one batch: autopart, its forced plans, PyTorch's ways, and other
systems."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import autopart
from autopart.compile.bench import report, rounds
from autopart.compile.bench.setting import Setting
from benchmarks.harness.systems import systems
from examples.yuan.config import TrainerConfig


def names(ranks: int) -> list[str]:
    """The names of all trainers of so many ranks."""
    return list(systems(ranks))


def chosen(config: TrainerConfig) -> list[str]:
    """The trainers of a configuration. Raises ValueError for a name that is not known."""
    known = names(config.ranks)
    asked = known if config.names == "all" else [name.strip() for name in config.names.split(",")]
    if strange := [name for name in asked if name not in known]:
        raise ValueError(f"there is no trainer {strange[0]!r}; known are {', '.join(known)}")
    return asked


def start() -> torch.device:
    """Join the other ranks; this rank's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    rounds.start(device.type)
    return device


def train(
    config: TrainerConfig, model: nn.Module, batch: Mapping[str, Tensor], device: torch.device,
    say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """The record of all chosen trainers, as the harness makes it: losses, seconds of a step, and whether the losses are
    those of the unmodified model on one process."""
    mesh = init_device_mesh(device.type, (config.ranks,), mesh_dim_names=("dp",))
    where = replace(autopart.Mesh.of(mesh), axes=())
    setting = Setting(model, dict(batch), device, where, config.micro_batches, config.optimizer, config.lr)
    ours = {name: system for name, system in systems(config.ranks).items() if name in chosen(config)}
    measured = rounds.measure(setting, ours, config.steps, config.warm_up, say)
    return {"command": "python -m examples.yuan", **report.record(setting, measured)}
