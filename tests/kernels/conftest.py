"""Tests of kernels call the registered operators.

By default kernels are compiled ahead for one capability, and of other parameters so many cases that each value occurs:
`tests/benchmarks/test_resources.py` holds the table of all. Where AUTOPART_EXAMPLES is set all are compiled.
"""

import importlib.util
import os
from collections import defaultdict
from collections.abc import Sequence

import pytest

from autopart.kernels import table  # noqa: F401  brings in the kernels
from autopart.kernels.launch import register_operators

USUAL = {"capability": 90}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out kernels that are compiled for other capabilities than the usual one, and other pairs of values."""
    if "AUTOPART_EXAMPLES" in os.environ:
        return
    tables: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if "compile" in item.name and hasattr(item, "callspec"):
            tables[item.nodeid.partition("[")[0]].append(item)
    others = {item for cases in tables.values() for item in set(cases) - set(_every_value(cases))}
    items[:] = [item for item in items if item not in others]
    config.hook.pytest_deselected(items=list(others))


def _every_value(cases: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Few of a table's cases, in which every value of every parameter occurs; of `USUAL` ones that value alone."""
    given = {item: item.callspec.params for item in cases}  # type: ignore[attr-defined]
    left = {
        item: {f"{name}={value}" for name, value in params.items()}
        for item, params in given.items()
        if all(params.get(name, usual) == usual for name, usual in USUAL.items())
    }
    kept: list[pytest.Item] = []
    while any(left.values()):
        kept.append(max(left, key=lambda item: len(left[item])))
        seen = left[kept[-1]]
        left = {item: values - seen for item, values in left.items()}
    return kept


def pytest_itemcollected(item: pytest.Item) -> None:
    """What waits for a child that interprets is slow, as is what compiles."""
    if "interpreted" in getattr(item, "fixturenames", ()) or "compile" in item.name:
        item.add_marker("slow")


@pytest.fixture(autouse=True)
def _registered() -> None:
    if importlib.util.find_spec("triton"):
        register_operators()
