"""Simulated ranks, each with a model of its own, or all with the same."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from threading import Lock
from typing import Any

from torch import Tensor, nn

from autopart.compile.programs import programs
from autopart.compile.variants import variant
from autopart.frontend.batch import DTYPES, outline
from autopart.hardware.mesh import Mesh
from autopart.ir.layered_graph import LayeredGraph
from autopart.passes.source import Source
from autopart.planner.make_plan import make_plan, request_of
from autopart.runtime.compiled import Compiled
from autopart.runtime.groups import Groups
from autopart.runtime.parameters import tensors_of
from autopart.runtime.simulated import run_simulated


def split_by(weight: str) -> list[dict[str, Any]]:
    """Settings of every way to train on two ranks, and of tp x pp, as the table in docs/usage.md has them; `weight` is
    what tensor parallelism must split."""
    tensor = {"tp": 2, "constraints": [f"split {weight}"]}
    return [
        {"pp": 1},
        tensor,
        {"pp": 2, "micro_batch": 2},
        *({"dp": 2, "zero": zero} for zero in range(4)),
        {**tensor, "pp": 2},
        {"dp": 2, "zero": 3, "master": "float64"},
    ]


PLANNED: dict[str, Any] = {}
TRACED: dict[str, LayeredGraph] = {}


class Shared(Source):
    """A source whose traces serve all models of a class."""

    def _traced(self, samples: int, *arguments: Any, **how: Any) -> LayeredGraph:
        batch = {name: value.shape for name, value in outline(self.batch, samples).items()}
        about = type(self.model), self.model, self.model.training, batch, self.dtype, self.outputs, arguments, how
        key = str(about)
        if key not in TRACED:
            TRACED[key] = super()._traced(samples, *arguments, **how)
        return TRACED[key]


def on_ranks(models: list[nn.Module], x: Tensor, run: Any, same: bool = False, **settings: Any) -> list[Any]:
    """Call `run` with the program of every simulated rank, of which each has a model of its own.

    same  whether all models of this class have the same graph: traced once, and planned once for the same settings
    """
    key = f"{type(models[0])} {len(models)} {x.shape} {settings}"
    if not same or key not in PLANNED:
        request = request_of(models[0], {"x": x}, **settings)
        source = (Shared if same else Source)(models[0], {"x": x}, DTYPES[request.precision])
        plan = make_plan(source, Mesh.of(f"{len(models)}:cpu"), request, to_run=True)
        layered = source.full(plan.micro_batch, plan.mesh)
        PLANNED[key] = source, plan, programs(layered, plan), layered, {}
    source, plan, stages, layered, variants = PLANNED[key]
    traced, lock = layered.traced, Lock()

    def other(model: nn.Module, groups: Groups, batch: Any, rows: int, mode: Any) -> Any:
        """`variant`, one rank after the other while no rank computes: traces are not made for threads."""
        stage = groups.pp.rank
        form = stage, rows, mode, *(tuple(value.shape[1:]) for value in batch.values())
        groups.host.gather(None)
        with lock:
            if form not in variants:
                ranks = groups.size_over(stages[stage].sample_axes)
                mine = replace(source, model=model)
                variants[form] = variant(mine, plan, layered, ranks, stage, lambda make: make(), batch, rows, mode)
        groups.host.gather(None)
        return variants[form]

    def one(groups: Groups) -> Any:
        model = models[groups.rank]
        buffers = {
            n: b if n not in dict(model.named_buffers()) else model.get_buffer(n) for n, b in traced.buffers.items()
        }
        program, make = stages[groups.pp.rank], partial(other, model, groups)
        compiled = Compiled(model, plan, groups, program, traced.aliases, buffers, {"x": x}, variant=make)
        compiled.load_rank_zero(tensors_of(model, buffers))
        compiled.check_batches = True
        return run(compiled)

    return run_simulated(plan.pp, plan.dp, plan.tp, one, plan.shard_size)
