"""The architectures that other systems list, on 4 ranks against one process."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.models.families import FAMILIES, LISTED, PLANS, exact


@pytest.mark.slow
@pytest.mark.parametrize("settings", PLANS, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_it_trains_as_one_process(name: str, settings: dict[str, Any]) -> None:
    assert exact(name, settings) < 1e-6


def test_every_listed_architecture_is_in_the_table() -> None:
    assert {name for names in LISTED.values() for name in names} == set(FAMILIES)
