"""autopart: hand it a model and a mesh, get back the fastest correct way to train the model there."""

from autopart.compile import compile, estimate, plan
from autopart.errors import PartitionError
from autopart.mesh import Mesh
from autopart.plan import Estimate, Plan
from autopart.runtime.compiled import Compiled

__all__ = ["Compiled", "Estimate", "Mesh", "PartitionError", "Plan", "compile", "estimate", "plan"]
