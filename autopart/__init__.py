"""autopart: hand it a model and a mesh, get back the fastest correct way to train the model there."""

from autopart.check import Check, check
from autopart.compile import Simulated, compile, estimate, plan, simulate
from autopart.errors import PartitionError
from autopart.mesh import Mesh
from autopart.plan import Estimate, Plan
from autopart.runtime.compiled import Compiled

__all__ = [
    "Check",
    "Compiled",
    "Estimate",
    "Mesh",
    "PartitionError",
    "Plan",
    "Simulated",
    "check",
    "compile",
    "estimate",
    "plan",
    "simulate",
]
