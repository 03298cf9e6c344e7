"""Settings of the whole test suite, made before anything imports torch or transformers.

Where the time goes: CPU seconds (user and system, of the test and its children) of a whole run on two cores with
nothing beside, 2,387 in 22 minutes:

    200  runtime/test_exact.py, of which four ranks of GPT-2 124
    160  cost/test_memory.py
    160  planner/test_explain.py, of which what fits where nothing does 70
    156  sharding/test_proof.py, of which aten.mm 22 and the wrong rows 22
    130  runtime/test_failure.py: three ranks import torch in each of ten tests
    108  cli/test_cli.py: four tests start processes
    87   frontend/test_shortened.py, families of models
    82   compile/test_graphs.py, of which 24 random models in groups of their own
    75   planner/test_brute.py, in 30 groups; runtime/test_random.py; compile/test_zoo.py: ten architectures
    73   planner/test_solvers.py
    65   compile/test_check.py; runtime/test_memory_saving.py

What is dear is to import torch (2 to 4), to trace a transformer (0.5 to 2 for each dtype and micro-batch size, twice
that where `frontend/functionalize.py` leaves it to torch) and to start ranks. Trace once for many plans; fork ranks
from a process that has imported, traced and planned (`support/ranks.py`). A test of more than about 2 CPU seconds is
`slow`, so that `make quick` leaves it out. Where AUTOPART_EXAMPLES is set, to a number of random models, tests that
take a sample by default try all they have.
"""

import os
import random
from collections import defaultdict

import pytest

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

SAMPLE = 2
"""Cases of a parametrised test that --quick runs at most."""
LONGEST = """test_proof test_memory test_explain test_shortened test_exporting test_check test_certify test_structure
    test_graph test_reserved test_rules test_estimates test_kernels test_batch_sizes test_accuracy""".split()
"""Files in the order in which they start: tests of one file run on one worker."""


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
    """The tests that start processes come first, then the longest files, then files with slow tests: a long group that
    starts last would leave the other worker idle."""
    if config.getoption("quick"):
        kept = _quick(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
    long = {item.path for item in items if item.get_closest_marker("slow")}
    place = {name: number for number, name in enumerate(LONGEST)}

    def turn(item: pytest.Item) -> tuple[bool, int, bool]:
        start = place.get(item.path.stem, len(place))
        return item.get_closest_marker("processes") is None, start, item.path not in long

    items.sort(key=turn)


def _quick(items: list[pytest.Item]) -> set[pytest.Item]:
    """Tests without the markers `slow` and `processes`; of every test's cases a few, always the same."""
    tables: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if not any(map(item.get_closest_marker, ("slow", "processes", "gpu"))):
            tables[item.nodeid.partition("[")[0]].append(item)
    return {item for name, cases in tables.items() for item in _some(name, cases)}


def _some(name: str, cases: list[pytest.Item]) -> list[pytest.Item]:
    return cases if len(cases) <= SAMPLE else random.Random(name).sample(cases, SAMPLE)
