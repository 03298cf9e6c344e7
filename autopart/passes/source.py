"""A model with its batch, through the passes from trace to unfold_layers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from autopart.errors import OperatorError, PartitionError
from autopart.frontend.batch import DTYPES, Batch, outline
from autopart.frontend.layer_sampling import MixedLayers, Sample, UnlikeLayers, longer, sampled_layers
from autopart.hardware.mesh import Mesh
from autopart.ir.gc_pause import paused
from autopart.ir.graph import Traced, calls, info, show, verify
from autopart.ir.layered_graph import LayeredGraph
from autopart.passes.annotate import annotate
from autopart.passes.fold_layers import fold_layers
from autopart.passes.fuse import fuse
from autopart.passes.randomness import randomness
from autopart.passes.simplify import simplify
from autopart.passes.trace import trace
from autopart.passes.unfold_layers import unfold_layers
from autopart.plan.data import Plan


class Asked(Protocol):
    """What a request and a plan say of the trace."""

    @property
    def precision(self) -> str: ...

    @property
    def no_fuse(self) -> tuple[str, ...]: ...


@dataclass
class Source:
    """A model with its batch, traced once for every micro-batch size and type of device that is asked for.

    no_fuse   names of kernels that are left out
    prepared  (samples, type of device) -> the layered graph of a trace of every block
    planned   the same, of a trace with only the first of equal blocks
    outputs   what the program returns beside the loss, by the names of the model's outputs
    sampling  what the last trace of `planned` left out, and the lists of blocks that were traced in full, with the
              reasons; None before the first. The next micro-batch size begins with these.
    """

    model: nn.Module
    batch: Batch
    dtype: torch.dtype
    no_fuse: tuple[str, ...] = ()
    prepared: dict[tuple[int, str], LayeredGraph] = field(default_factory=dict)
    planned: dict[tuple[int, str], LayeredGraph] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    sampling: tuple[tuple[Sample, ...], dict[str, str]] | None = None

    @classmethod
    def of(cls, model: nn.Module, batch: Batch, asked: Asked) -> Source:
        """The model as a plan was asked for, or as a plan was made."""
        return cls(model, batch, DTYPES[asked.precision], tuple(asked.no_fuse))

    def full(self, samples: int, mesh: Mesh) -> LayeredGraph:
        """The layered graph of a micro-batch of `samples`, from a trace of every block."""
        key = samples, mesh.device.type
        if key not in self.prepared:
            with paused():
                self.prepared[key] = self._traced(samples, mesh)
        return self.prepared[key]

    def sampled(self, samples: int, mesh: Mesh) -> LayeredGraph:
        """The layered graph to plan with, from a trace of the first of equal blocks where these stand for all."""
        key = samples, mesh.device.type
        if key not in self.planned:
            with paused():
                self.planned[key] = self._best_sample(samples, mesh)
        return self.planned[key]

    def like(self, plan: Plan) -> LayeredGraph:
        """The smallest layered graph that a plan fits. Raises PartitionError where the plan is for another model."""
        sizes = sorted({min(2, plan.micro_batch), plan.micro_batch})
        for layered in (self.sampled(samples, plan.mesh) for samples in sizes):
            if plan.signature.hash == layered.hash:
                return layered
        layered = self.full(plan.micro_batch, plan.mesh)
        plan.check(layered)
        return layered

    def _traced(self, samples: int, mesh: Mesh, sampled: Sequence[Sample] = (), short: bool = False) -> LayeredGraph:
        """The passes from trace to unfold_layers. Whether a loss mixes samples is known only from two or more of them:
        a trace of one sample takes the answer from a trace of two, if there is one."""
        layered = prepare(
            self.model, outline(self.batch, samples), mesh, self.dtype, sampled, self.outputs, self.no_fuse, short
        )
        several = self.planned.get((2, mesh.device.type))
        if samples == 1 and several is not None:
            layered.traced.mixed_at = several.traced.mixed_at
        return layered

    def _best_sample(self, samples: int, mesh: Mesh) -> LayeredGraph:
        """A trace with as many lists of blocks sampled as possible.

        A list whose first blocks do not stand for all is sampled with more blocks if these may, then traced in full.
        Where the model cannot be traced with several lists sampled, only the longest is sampled, then none. An operator
        that is refused would be refused with more blocks too.
        """
        sampled, traced_in_full = self.sampling or (sampled_layers(self.model), {})
        while sampled:
            try:
                layered = self._traced(samples, mesh, sampled, short=True)
                self.sampling = sampled, traced_in_full
                return replace(layered, traced_in_full="; ".join(traced_in_full.values()))
            except UnlikeLayers as error:
                for unlike in (error, *error.others):
                    sampled, path = longer(sampled, unlike), unlike.sample.path
                    if all(sample.path != path for sample in sampled):
                        traced_in_full = {**traced_in_full, path: str(unlike)}
            except OperatorError:
                raise
            except PartitionError as error:
                if any(isinstance(sample, MixedLayers) for sample in sampled):
                    sampled = tuple(s.more if isinstance(s, MixedLayers) else s for s in sampled)
                    continue
                most = max(sample.blocks for sample in sampled)
                rest = tuple(sample for sample in sampled if sample.blocks == most)
                lost = sampled if rest == sampled else [sample for sample in sampled if sample not in rest]
                reasons = {sample.path: f"{sample.path}: {error.what} ({error.why})" for sample in lost}
                traced_in_full = traced_in_full | reasons
                sampled = () if rest == sampled else rest
        self.sampling = (), traced_in_full
        key = samples, mesh.device.type
        full = self.prepared.get(key) or self._traced(samples, mesh, short=True)
        if all(info(node).times == 1 for node in calls(full.traced.graph)):
            self.prepared[key] = full
        return replace(full, traced_in_full="; ".join(traced_in_full.values())) if traced_in_full else full


def prepare(
    model: nn.Module,
    batch: Batch,
    mesh: Mesh,
    dtype: torch.dtype,
    sampled: Sequence[Sample] = (),
    outputs: Sequence[str] = (),
    no_fuse: Sequence[str] = (),
    short: bool = False,
) -> LayeredGraph:
    """The passes from trace to unfold_layers.

    `outputs` and `short` are those of `trace`; `no_fuse` names kernels to leave out. If AUTOPART_DUMP names a folder,
    the graph is verified after every pass and written there. Raises UnlikeLayers where the first blocks of a list in
    `sampled` do not stand for all.
    """
    traced = _pass("trace", None, lambda: trace(model, batch, dtype, sampled, outputs, short))
    _pass("simplify", traced, lambda: simplify(traced))
    _pass("randomness", traced, lambda: randomness(traced, mesh.device.type, no_fuse))
    _pass("fuse", traced, lambda: fuse(traced, mesh.device.type, no_fuse))
    _pass("annotate", traced, lambda: annotate(traced, mesh.device.type))
    return unfold_layers(fold_layers(traced), sampled)


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
