"""A model with its batch, through the passes from trace to fold_layers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from autopart.errors import PartitionError
from autopart.frontend.batch import Batch, outline
from autopart.frontend.layer_sampling import SampledLayers, UnlikeLayers, longer, shortenable
from autopart.hardware.mesh import Mesh
from autopart.ir.gc_pause import paused
from autopart.ir.graph import Traced, show, verify
from autopart.ir.layered_graph import LayeredGraph
from autopart.passes.annotate import annotate_costs
from autopart.passes.fold_layers import fold
from autopart.passes.fuse import fuse
from autopart.passes.randomness import draw
from autopart.passes.simplify import simplify
from autopart.passes.trace import trace
from autopart.passes.unfold_layers import repeat
from autopart.plan.data import Plan

if TYPE_CHECKING:
    pass


@dataclass
class Source:
    """A model with its batch, traced once for every micro-batch size and kind of device that is asked for."""

    model: nn.Module
    batch: Batch
    dtype: torch.dtype
    prepared: dict[tuple[int, str], LayeredGraph] = field(default_factory=dict)
    planned: dict[tuple[int, str], LayeredGraph] = field(default_factory=dict)
    """Those of which only the first of equal blocks were traced."""

    def at(self, samples: int, mesh: Mesh) -> LayeredGraph:
        """The folded graph of a micro-batch of `samples`."""
        key = samples, mesh.device.type
        if key not in self.prepared:
            with paused():
                self.prepared[key] = self._traced(samples, mesh)
        return self.prepared[key]

    def short(self, samples: int, mesh: Mesh) -> LayeredGraph:
        """The same to plan with, whose graph has only the first of equal blocks where they stand for all."""
        key = samples, mesh.device.type
        if key not in self.planned:
            with paused():
                self.planned[key] = self._shortest(samples, mesh)
        return self.planned[key]

    def like(self, plan: Plan) -> LayeredGraph:
        """The smallest graph that a plan is for. Raises PartitionError where it is for none of this model's."""
        sizes = sorted({min(2, plan.micro_batch), plan.micro_batch})
        for folded in (self.short(samples, plan.mesh) for samples in sizes):
            if plan.signature.hash == folded.hash:
                return folded
        folded = self.at(plan.micro_batch, plan.mesh)
        plan.check(folded)
        return folded

    def _traced(self, samples: int, mesh: Mesh, shortened: Sequence[SampledLayers] = ()) -> LayeredGraph:
        """What samples do with each other is told by two of them: one has nobody to do it with."""
        folded = prepare(self.model, outline(self.batch, samples), mesh, self.dtype, shortened)
        several = self.planned.get((2, mesh.device.type))
        if samples == 1 and several is not None:
            folded.traced.mixed_at = several.traced.mixed_at
        return folded

    def _shortest(self, samples: int, mesh: Mesh) -> LayeredGraph:
        """With as many lists shortened as can be; where the model does not run so, the longest alone, then none."""
        shortened = shortenable(self.model)
        walked: dict[str, str] = {}
        while shortened:
            try:
                folded = self._traced(samples, mesh, shortened)
                return replace(folded, walked="; ".join(walked.values()))
            except UnlikeLayers as unlike:
                shortened, path = longer(shortened, unlike.short), unlike.short.path
                if all(short.path != path for short in shortened):
                    walked[path] = str(unlike)
            except PartitionError as error:
                most = max(short.blocks for short in shortened)
                rest = tuple(short for short in shortened if short.blocks == most)
                lost = shortened if rest == shortened else [short for short in shortened if short not in rest]
                walked |= {short.path: f"{short.path}: {error.what} ({error.why})" for short in lost}
                shortened = () if rest == shortened else rest
        full = self.at(samples, mesh)
        return replace(full, walked="; ".join(walked.values())) if walked else full


def prepare(
    model: nn.Module, batch: Batch, mesh: Mesh, dtype: torch.dtype, shortened: Sequence[SampledLayers] = ()
) -> LayeredGraph:
    """Trace to fold, each pass verified and, if AUTOPART_DUMP names a folder, written there. Raises Unlike where the
    first blocks of a list in `shortened` do not stand for all."""
    traced = _pass("trace", None, lambda: trace(model, batch, dtype, shortened))
    _pass("simplify", traced, lambda: simplify(traced))
    _pass("draw", traced, lambda: draw(traced))
    _pass("fuse", traced, lambda: fuse(traced))
    _pass("annotate", traced, lambda: annotate_costs(traced, mesh.device.type))
    return repeat(fold(traced), shortened)


def _pass(name: str, before: Traced | None, run: Callable[[], Traced]) -> Traced:
    folder = os.environ.get("AUTOPART_DUMP")
    if not folder:
        return run()
    old = show(before.graph) if before else ""
    started = time.monotonic()
    traced = run()
    taken = time.monotonic() - started
    verify(traced.graph)
    new = show(traced.graph)
    Path(folder).mkdir(parents=True, exist_ok=True)
    number = len(list(Path(folder).glob("*.txt")))
    mark = " (unchanged)" if new == old else ""
    (Path(folder) / f"{number:03d}_{name}.txt").write_text(f"# {name}: {taken:.3f} s{mark}\n{new}\n")
    return traced
