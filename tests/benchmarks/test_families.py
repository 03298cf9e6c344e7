"""The architectures that other systems list, on 4 ranks against one process."""

from __future__ import annotations

import os
from typing import Any

import pytest

from benchmarks.models.families import FAMILIES, LISTED, PLANS, exact

ALL = [(name, settings) for name in FAMILIES for settings in PLANS]
EACH = [(name, PLANS[number % len(PLANS)]) for number, name in enumerate(FAMILIES)]
"""Every family once, under the plans by turns: five of them are in `tests/runtime/test_exact.py` under more plans."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), ALL if "AUTOPART_EXAMPLES" in os.environ else EACH, ids=str)
def test_it_trains_as_one_process(name: str, settings: dict[str, Any]) -> None:
    assert exact(name, settings) < 1e-6


def test_every_listed_architecture_is_in_the_table() -> None:
    assert {name for names in LISTED.values() for name in names} == set(FAMILIES)
