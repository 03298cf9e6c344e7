"""Settings of the whole test suite, made before anything imports torch or transformers.

Where the time goes: CPU seconds (user and system, of the test and its children), measured with other programs on the
same two cores. On idle cores they are about half.

    25 a worker   import torch and transformers, collect 6,600 tests
    50            runtime/test_exact.py, two ranks of gpt2 and llama that are started one by one
    17            runtime/test_exact.py, two forked ranks: mlp and vit
    250           runtime/test_exact.py, four forked ranks: llama and vit 88, gpt2 68, t5 63, bert 32, mlp 21
    about 190     planner/test_brute.py
    108           runtime/test_failure.py: three ranks import torch in each of ten tests
    80            compile/test_zoo.py: ten architectures traced once, four forked ranks
    76            cli/test_cli.py: four tests start processes
    74            compile/test_check.py
    50            frontend/test_shortened.py, planning of whole families

What is dear is to import torch (4), to trace a model (2 to 6 for each dtype and micro-batch size) and to start ranks.
Trace once for many plans; fork ranks from a process that has imported, traced and planned (`support/ranks.py`). A test
of more than about 2 CPU seconds is `slow`, so that `make quick` leaves it out.
"""

import os
import random
from collections import defaultdict

import pytest

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

SAMPLE = 2
"""Cases of a parametrised test that --quick runs at most."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option of `make quick`."""
    parser.addoption("--quick", action="store_true", help=f"no slow tests, at most {SAMPLE} cases of every table")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Skip gpu tests without a GPU; keep the tests that start processes on one worker, and those of a file, which share
    what they plan and trace."""
    import torch

    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if not item.get_closest_marker("xdist_group"):
        processes = item.get_closest_marker("processes")
        item.add_marker(pytest.mark.xdist_group("processes" if processes else item.path.stem))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The tests that start processes come first, then files with slow tests: a long group that starts last would leave
    the other worker idle."""
    if config.getoption("quick"):
        kept = _quick(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.get_closest_marker("processes") is None, item.path not in long))


def _quick(items: list[pytest.Item]) -> set[pytest.Item]:
    """Tests without the markers `slow` and `processes`; of every test's cases a few, always the same."""
    tables: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if not any(map(item.get_closest_marker, ("slow", "processes", "gpu"))):
            tables[item.nodeid.partition("[")[0]].append(item)
    return {item for name, cases in tables.items() for item in _some(name, cases)}


def _some(name: str, cases: list[pytest.Item]) -> list[pytest.Item]:
    return cases if len(cases) <= SAMPLE else random.Random(name).sample(cases, SAMPLE)
