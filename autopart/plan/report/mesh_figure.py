"""The mesh: hosts with their ranks, and which stage, which samples and which shards each rank holds."""

from autopart.plan.fields import PlanFields
from autopart.plan.report.drawing import WIDTH, Figure

SHOWN = 16
"""Hosts that are drawn; of more, the first ones."""
SHADES = 8
"""Number of shades of stages; stages that follow each other differ."""
CELL, GAP = 40, 5


def place(plan: PlanFields, rank: int) -> tuple[int, int, int]:
    """(stage, place along dp, place along tp) of a rank: neighbouring ranks share a tensor-parallel group."""
    return rank // (plan.dp * plan.tp), rank // plan.tp % plan.dp, rank % plan.tp


def mesh_figure(plan: PlanFields) -> Figure:
    """A box for each host with a box for each rank, in the shade of its stage."""
    mesh, figure = plan.mesh, Figure("The mesh: the stage, and the places along dp and tp, of every rank")
    width = 102.0
    across = max(1, min(mesh.devices_per_host, int((WIDTH - 88) / (width + GAP))))
    host_width = 72 + across * (width + GAP) + GAP
    per_row = max(1, int((WIDTH + 10) / (host_width + 12)))
    lines = -(-mesh.devices_per_host // across)
    height = lines * (CELL + GAP) + GAP
    for host in range(min(mesh.hosts, SHOWN)):
        x, y = host % per_row * (host_width + 10) + 1, host // per_row * (height + 10) + 1
        figure.rect("host", x, y, host_width, height)
        figure.text(x + 8, y + height / 2 + 4, f"host {host}", "strong")
        for device in range(mesh.devices_per_host):
            rank = host * mesh.devices_per_host + device
            stage, dp, tp = place(plan, rank)
            left = x + 70 + device % across * (width + GAP) + GAP
            top = y + GAP + device // across * (CELL + GAP)
            title = f"rank {rank}: stage {stage}{plan.device_text(stage)}, place {dp} of dp={plan.dp}, "
            title += f"place {tp} of tp={plan.tp}"
            figure.rect(f"box shade-{stage % SHADES}", left, top, width, CELL, title)
            figure.text(left + 6, top + 16, f"rank {rank}", "on-shade", width - 34)
            figure.text(left + width - 6, top + 16, f"st {stage}", "end strong on-shade", 46)
            figure.text(left + 6, top + 33, f"dp {dp}  tp {tp}", "small on-shade", width + 12)
        figure.height = max(figure.height, y + height + 1)
    return figure


def ranks_of(plan: PlanFields, stage: int) -> str:
    """The ranks of a stage: ``"4 to 7"``."""
    each = plan.dp * plan.tp
    return f"{stage * each}" if each == 1 else f"{stage * each} to {(stage + 1) * each - 1}"
