"""An emitted module: its text with what runs it, and its import."""

from __future__ import annotations

import linecache
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

from autopart.plan.schedules.ops import Instruction
from autopart.runtime.executor import Message


@dataclass(frozen=True)
class Program:
    """What one stage runs.

    source        the emitted module's text
    index         the stage's number
    instructions  the stage's instructions, in order
    messages      the tensors that cross the cuts between stages
    tied          name of a parameter that lives on several stages -> these stages
    axes          mesh axes that split the samples of a batch
    """

    source: str
    stage: int
    instructions: Sequence[Instruction]
    messages: Sequence[Message]
    tied: Mapping[str, tuple[int, ...]]
    sample_axes: tuple[str, ...]


def run_source(source: str, filename: str) -> ModuleType:
    """Import emitted source, so that tracebacks show its lines."""
    module = ModuleType(filename.removesuffix(".py"))
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), module.__dict__)
    return module
