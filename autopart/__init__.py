"""autopart: hand it a model and a mesh, get back the fastest correct way to train the model there."""

from autopart.collector import paused

with paused():
    from autopart.calibrate.run import calibrate
    from autopart.certify import certify
    from autopart.check import Check, check
    from autopart.compile import Simulated, compile, estimate, plan, simulate
    from autopart.errors import PartitionError
    from autopart.estimates import Estimate
    from autopart.explain import Explanation, explain
    from autopart.mesh import Mesh, load_hardware
    from autopart.meshes import MeshChoice, search_mesh
    from autopart.plan import Plan
    from autopart.reprice import reprice
    from autopart.runtime.compiled import Compiled
    from autopart.tenants import Tenants, tenants
    from autopart.timeline import Timeline, timeline

__all__ = [
    "Check",
    "Compiled",
    "Estimate",
    "Explanation",
    "Mesh",
    "MeshChoice",
    "PartitionError",
    "Plan",
    "Simulated",
    "Tenants",
    "Timeline",
    "calibrate",
    "certify",
    "check",
    "compile",
    "estimate",
    "explain",
    "load_hardware",
    "plan",
    "reprice",
    "search_mesh",
    "simulate",
    "tenants",
    "timeline",
]
