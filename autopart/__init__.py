"""autopart: hand it a model and a mesh, get back the fastest correct way to train the model there."""

from typing import TYPE_CHECKING, Any

from autopart.ir.gc_pause import paused

with paused():
    from autopart.compile.api import compile, estimate, plan
    from autopart.compile.check import Check, check
    from autopart.compile.simulate import Simulated, simulate
    from autopart.errors import PartitionError
    from autopart.hardware.mesh import Mesh, load_hardware
    from autopart.plan.data import Plan
    from autopart.plan.estimate import Estimate
    from autopart.plan.slowed_step import SlowedStep
    from autopart.plan.stragglers import Stragglers
    from autopart.plan.timeline import Timeline, compare_stragglers, timeline
    from autopart.planner.explain.certificate import certify
    from autopart.planner.explain.memory_report import MemoryReport, memory_report
    from autopart.planner.explain.mesh_search import MeshChoice, search_mesh
    from autopart.planner.explain.price_plan import price_plan
    from autopart.planner.explain.report_extras import report_extras
    from autopart.planner.explain.why import Explanation, explain
    from autopart.planner.request import Settings
    from autopart.runtime.calibrate.run import calibrate
    from autopart.runtime.callbacks import Callback, Event, JsonLines, Trace
    from autopart.runtime.compiled import Compiled
    from autopart.runtime.lion import Lion
    from autopart.runtime.loggers import ProfilerRanges, Progress, TensorBoard, WeightsAndBiases
    from autopart.runtime.padding import pad
    from autopart.runtime.predicted import PredictedSeconds
    from autopart.runtime.profiled import profiled

if TYPE_CHECKING:
    from autopart.compile.trainer import Trainer as Trainer

__all__ = [
    "Callback",
    "Check",
    "Compiled",
    "Estimate",
    "Event",
    "Explanation",
    "JsonLines",
    "Lion",
    "MemoryReport",
    "Mesh",
    "MeshChoice",
    "PartitionError",
    "Plan",
    "PredictedSeconds",
    "ProfilerRanges",
    "Progress",
    "Settings",
    "Simulated",
    "SlowedStep",
    "Stragglers",
    "TensorBoard",
    "Timeline",
    "Trace",
    "WeightsAndBiases",
    "__version__",
    "calibrate",
    "certify",
    "check",
    "compare_stragglers",
    "compile",
    "estimate",
    "explain",
    "load_hardware",
    "memory_report",
    "pad",
    "plan",
    "price_plan",
    "profiled",
    "report_extras",
    "search_mesh",
    "simulate",
    "timeline",
]


def __getattr__(name: str) -> Any:
    """`__version__` and `Trainer`, which are looked up when they are asked for."""
    if name == "__version__":
        from importlib.metadata import version

        return version("autopart")
    if name == "Trainer":
        from autopart.compile.trainer import Trainer

        return Trainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
