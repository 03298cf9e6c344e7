"""An emitted module: its text with what runs it, and its import."""

import linecache
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from autopart.plan.schedules.ops import Instruction
from autopart.runtime.groups import Groups
from autopart.runtime.torch_compile import TorchCompile, compile_blocks


@dataclass(frozen=True)
class Message:
    """A tensor that crosses a cut: its name, its shape and dtype on a rank, the stage that makes it, the stages that
    take it."""

    name: str
    producer: int
    consumers: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    grad: bool


@dataclass(frozen=True)
class Program:
    """What one stage runs.

    source        the emitted module's text
    stage         the stage's number
    instructions  the stage's instructions, in order
    messages      the tensors that cross the cuts between stages
    tied          name of a parameter that lives on several stages -> these stages
    sample_axes   mesh axes that split the samples of a batch
    """

    source: str
    stage: int
    instructions: Sequence[Instruction]
    messages: Sequence[Message]
    tied: Mapping[str, tuple[int, ...]]
    sample_axes: tuple[str, ...]


@dataclass(frozen=True)
class StageProgram:
    """An emitted stage, its instructions, and the tensors that cross the cuts between stages."""

    stage: Any
    instructions: Sequence[Instruction]
    messages: Sequence[Message]


def load_stage(program: Program, filename: str, groups: Groups, compile: TorchCompile = False) -> Any:
    """The stage of a program, as a module with this rank's shares, uninitialised. Its blocks are compiled where
    `compile` says so."""
    module = run_source(program.source, filename)
    stage = module.Stage(groups)
    compile_blocks(stage, module.__dict__, compile)
    return stage


def run_source(source: str, filename: str) -> ModuleType:
    """Import emitted source, so that tracebacks show its lines."""
    module = ModuleType(filename.removesuffix(".py"))
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), module.__dict__)
    return module
