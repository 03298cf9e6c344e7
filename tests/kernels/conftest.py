"""Tests of kernels call the registered operators.

By default kernels are compiled ahead for one capability: `tests/benchmarks/test_resources.py` holds the table of all of
them. Where AUTOPART_EXAMPLES is set they are compiled for each.
"""

import importlib.util
import os

import pytest

from autopart.kernels import table  # noqa: F401  brings in the kernels
from autopart.kernels.launch import register_operators

USUAL = 90


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out kernels that are compiled for other capabilities than the usual one."""
    if "AUTOPART_EXAMPLES" in os.environ:
        return
    given = [getattr(item, "callspec", None) for item in items]
    others = [i for i, spec in zip(items, given, strict=True) if spec and spec.params.get("capability", USUAL) != USUAL]
    items[:] = [item for item in items if item not in set(others)]
    config.hook.pytest_deselected(items=others)


def pytest_itemcollected(item: pytest.Item) -> None:
    """What waits for a child that interprets is slow, as is what compiles."""
    if "interpreted" in getattr(item, "fixturenames", ()) or "compile" in item.name:
        item.add_marker("slow")


@pytest.fixture(autouse=True)
def _registered() -> None:
    if importlib.util.find_spec("triton"):
        register_operators()
