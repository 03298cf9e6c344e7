"""Resources of kernels: the committed table, and occupancy."""

from __future__ import annotations

import json

import pytest

from autopart.kernels.ahead import Usage
from benchmarks.figures import RESULTS
from benchmarks.kernels.resources import LIMITS, layers, occupancy, records

FOUND = json.loads((RESULTS / "kernel_resources.json").read_text())
HELD = {(row["kernel"], tuple(row["models"]), row["capability"]) for row in FOUND["rows"]}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", records())
def test_every_layer_of_a_kernel_is_in_the_table(kernel: str) -> None:
    """`python -m benchmarks.kernels.resources --json benchmarks/results/kernel_resources.json` renews it."""
    missing = [(m, c) for m in layers(records()[kernel]) for c in LIMITS if (kernel, m, c) not in HELD]
    assert not missing


def test_no_kernel_of_the_table_spills_or_does_not_fit() -> None:
    assert not [row for row in FOUND["rows"] if row["spills"] or not row["occupancy"]]


@pytest.mark.parametrize(
    ("usage", "capability", "expected"),
    [
        (Usage(32, 0, 0, 4), 80, 1.0),
        (Usage(33, 0, 0, 4), 80, 0.75),  # 1,280 registers a warp: 51 warps, 48 by fours
        (Usage(255, 0, 0, 8), 90, 0.125),  # 8,192 registers a warp
        (Usage(16, 0, 0, 1), 90, 0.5),  # 32 blocks of a warp
        (Usage(32, 0, 48 * 1024, 4), 80, 3 / 16),  # three blocks of 49 KiB in 164
        (Usage(32, 0, 48 * 1024, 4), 90, 0.25),  # four in 228
        (Usage(32, 0, 164 * 1024, 4), 80, 0.0),
    ],
)
def test_occupancy(usage: Usage, capability: int, expected: float) -> None:
    assert occupancy(usage, capability) == expected
