"""Stages of a pipeline on a mesh whose hosts may be of several kinds, as 2 hosts of A100 beside 2 of H100.

A stage is a block of neighbouring ranks. Where all its ranks are of one kind, it has the devices and links of that
kind. Where it spans kinds, its ranks wait for each other at every collective: it has the slowest of the devices, the
least of their memory, and the slowest links.
"""

from collections.abc import Callable

from autopart.hardware.mesh import Mesh, MixedMesh, joined


def views_of(mesh: Mesh) -> tuple[Mesh, ...]:
    """The mesh as different stages may have it: each of the same size, all devices and links as those of a stage. A
    mesh of one kind has one view, itself."""
    return mesh.views if isinstance(mesh, MixedMesh) else (mesh,)


def view_of(mesh: Mesh, stage: int, stages: int) -> int:
    """The index in `views_of` of what the ranks of a stage have, in a pipeline of so many stages."""
    return mesh.view(stage, stages) if isinstance(mesh, MixedMesh) else 0


def of_stage(mesh: Mesh, stage: int, stages: int) -> Mesh:
    """The mesh as the ranks of a stage have it, in a pipeline of so many stages."""
    return views_of(mesh)[view_of(mesh, stage, stages)]


def parts_of(mesh: Mesh) -> tuple[Mesh, ...]:
    """The meshes of equal hosts that a mesh consists of; of one kind, itself alone."""
    return mesh.parts if isinstance(mesh, MixedMesh) else (mesh,)


def peak_flops(mesh: Mesh, dtype: str) -> float:
    """FLOP/s of all devices together for matrix products in a dtype."""
    return sum(part.size * part.device.flops[dtype] for part in parts_of(mesh))


def changed(mesh: Mesh, change: Callable[[Mesh], Mesh]) -> Mesh:
    """The mesh after a change of its devices or links; of several kinds, after the change of each part."""
    parts = parts_of(mesh)
    return joined(map(change, parts), mesh.axes) if len(parts) > 1 else change(mesh)
