"""Losses before seconds: a system that trains something else than the unmodified model is shown and not ranked."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from autopart.compile.bench.own import OWN

FIRST_TOLERANCE = 1e-4
LATER_TOLERANCE = 1e-3
"""By how much a loss may differ from the unmodified model's, at the first step and after it, relative to that loss
where it is above 1."""

Row = dict[str, Any]


def judge(rows: Iterable[Row], reference: Sequence[float]) -> None:
    """Mark the rows whose losses, step by step, are not those of the unmodified model on one process."""
    for row in rows:
        if row["status"] != "ok":
            continue
        gaps = [abs(a - b) / max(1.0, abs(b)) for a, b in zip(row["losses"], reference, strict=True)]
        row["first_gap"], row["later_gap"] = gaps[0], max(gaps[1:], default=0.0)
        # A loss that is no number has no gap within any tolerance.
        if not (gaps[0] <= FIRST_TOLERANCE and all(gap <= LATER_TOLERANCE for gap in gaps[1:])):
            row["status"] = f"differs: losses off by {gaps[0]:.1e} at first, {max(gaps[1:], default=0.0):.1e} later"


def shows_gradients(reference: Sequence[float]) -> bool:
    """Whether the losses change by so much that wrong gradients would be seen."""
    return max(abs(loss - reference[0]) for loss in reference) > 10 * LATER_TOLERANCE * max(1.0, abs(reference[0]))


def compare(rows: Mapping[str, Row]) -> None:
    """Ratios over the rounds, of a right system's seconds over autopart's and over its plan of the same degrees: above
    1 where autopart is faster. The median is of the ratios round by round, in which both met the same load."""
    for row in rows.values():
        for key, other in (("to_autopart", OWN), ("to_like", row["like"])):
            if not other or not _ranked(row) or not _ranked(rows.get(other, {})):
                continue
            ratios = [a / b for a, b in zip(row["seconds"], rows[other]["seconds"], strict=True)]
            row[key] = statistics.median(ratios)
            row[f"{key}_spread"] = quartiles(ratios)


def _ranked(row: Mapping[str, Any]) -> bool:
    return row.get("status") == "ok" and "seconds" in row


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third quartile."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third
