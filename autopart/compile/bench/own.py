"""autopart itself as a system: the planner's own plan, and plans that are forced to each uniform configuration."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from autopart.compile.api import compile
from autopart.compile.bench.setting import OPTIMIZERS, NotExpressibleError, Setting, Step, System, micro_batches_text
from autopart.frontend.batch import Batch, samples_of
from autopart.plan.data import Plan
from autopart.runtime.compiled import Compiled

OWN = "autopart"
"""The name of the planner's own plan."""


@dataclass(frozen=True)
class PlannedStep:
    """A step of a compiled plan."""

    compiled: Compiled
    batch: Batch

    def __call__(self) -> Tensor:
        return self.compiled.step(self.batch)


def build(setting: Setting, pipeline: bool = False, **settings: Any) -> tuple[Step, str]:
    """autopart under `settings` of `autopart.compile`; a `pipeline` gets the setting's number of micro-batches, or
    as many as leave each data-parallel rank a sample."""
    if pipeline:
        samples, dp = samples_of(setting.batch), settings["dp"]
        parts = min(setting.micro_batches, max(samples // dp, 1))
        if samples % (parts * dp):
            raise NotExpressibleError(f"{samples} samples do not divide by {micro_batches_text(parts)} of dp={dp}")
        settings = {**settings, "micro_batch": samples // parts}
    compiled = compile(
        copy.deepcopy(setting.model), setting.mesh, setting.batch, **{"optimizer": setting.optimizer, **settings}
    )
    compiled.optimizer(OPTIMIZERS[setting.optimizer], lr=setting.lr)
    return PlannedStep(compiled, setting.whole_batch()), _note(compiled.plan)


def _note(plan: Plan) -> str:
    degrees = " ".join(f"{axis}={n}" for axis in ("pp", "dp", "tp") if (n := getattr(plan, axis)) > 1)
    pipeline = [plan.schedule] * (plan.pp > 1)
    extras = [f"zero {plan.zero}"] * bool(plan.zero) + ["recompute"] * (plan.recompute != "none")
    return ", ".join([degrees or "one rank", *pipeline, micro_batches_text(plan.micro_batches), *extras])


def name_of(pp: int = 1, dp: int = 1, tp: int = 1, schedule: str = "1f1b", zero: int = 0) -> str:
    """The name of the plan that is forced to these degrees."""
    degrees = [f"{axis}={n}" for axis, n in (("pp", pp), ("dp", dp), ("tp", tp)) if n > 1] or ["dp=1"]
    return " ".join([OWN, *degrees, *[schedule] * (pp > 1), *[f"zero={zero}"] * bool(zero)])


def uniform(ranks: int) -> Mapping[str, System]:
    """Name -> autopart forced to degrees of pipeline, data and tensor parallelism that fill `ranks` ranks.

    Pipelines run 1F1B, those without other axes also GPipe; data parallelism without other axes also runs ZeRO 1 to 3.
    """
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    found: dict[str, System] = {}
    for pp, tp in ((pp, tp) for pp in divisors for tp in divisors if ranks % (pp * tp) == 0):
        dp = ranks // (pp * tp)
        schedules = ("1f1b", "gpipe") if pp == ranks > 1 else ("1f1b",)
        levels = (0, 1, 2, 3) if dp == ranks > 1 else (0,)
        for schedule, zero in ((s, z) for s in schedules for z in levels):
            forced: dict[str, Any] = {"pp": pp, "dp": dp, "tp": tp, "zero": zero}
            forced |= {"schedule": schedule, "pipeline": True} if pp > 1 else {}
            found[name_of(pp, dp, tp, schedule, zero)] = System(partial(build, **forced))
    return found
