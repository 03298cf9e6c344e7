"""Settings of the whole test suite, made before anything imports torch or transformers.

Where the time goes: CPU seconds (user and system, of a test and its children) of the dearest files, on two cores beside
little other load; children of fork servers are not counted.

   168   passes/test_gpu_graphs.py
    96   frontend/test_shortened.py
    88   cost/test_memory.py
    70   sharding/test_proof.py
    62   planner/test_brute.py
    60   compile/test_graphs.py
    58   frontend/test_short_loops.py
    54   test_examples.py
    53   compile/test_structure.py
    47   planner/test_explain.py and passes/test_matches.py
    44   runtime/test_random.py and runtime/test_variants.py
    43   passes/test_golden.py

What is dear is to import torch (2) or transformers and autopart (3 more), to trace a model (0.2 to 2 for each dtype and
micro-batch size, twice that where `frontend/functionalize.py` leaves it to torch: of a test that compiles a program,
nine tenths), and to start ranks. So trace once for many plans: `support/models.py` keeps what any test has traced of
its models, and under the fixture `traced_once` equal models, of all files with it, are traced once. Fork ranks, and
whatever needs a process of its own, from the server that has imported what they need, and traced a model
(`support/ranks.py`), and share what was traced and planned before; commands are forks too (`support/commands.py`).
Kernels are interpreted by forks too (`support/interpreted.py`): 60 CPU seconds for all files, and no more 4 for the
imports of each. A test of more than about 2 CPU seconds is `slow`, so that `make quick` leaves it out.
Where AUTOPART_EXAMPLES is set, to a number of random models, tests that take a sample by default, of random models or
of the rows of a table, try all they have.
"""

import gc
import os
import random
import sys
from collections import defaultdict
from collections.abc import Iterator

import pytest

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # half of what collection takes is to compile tests
sys.dont_write_bytecode = False
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

SAMPLE = 1
"""Cases of a parametrised test that --quick runs."""
LONGEST = """test_gpu_graphs test_proof test_short_loops test_explain test_golden test_memory test_families
    test_shortened test_check test_random test_solvers test_graph test_structure test_exporting test_certify
    test_functional test_reserved test_estimates test_plan""".split()
"""Files in the order in which they start: tests of one file run on one worker."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option of `make quick`."""
    parser.addoption("--quick", action="store_true", help=f"no slow tests, of every table {SAMPLE} case")


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


@pytest.fixture(scope="module")
def traced_once() -> Iterator[None]:
    """For the tests of a file: what a file with this fixture has traced, no other such file traces anew."""
    from traces import traced_once

    with traced_once():
        yield


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """After the last test of a file take what is left, traces mostly, out of the collector's sight. Otherwise every
    walk over a worker's growing heap takes longer than the one before, up to 11 CPU seconds."""
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()
        gc.get_freeze_count = lambda: 1  # which counts them one by one, whenever autopart has made a graph


def _quick(items: list[pytest.Item]) -> set[pytest.Item]:
    """Tests without the markers `slow` and `processes`; of every test's cases a few, always the same. Tests of a file
    with as many cases take the same ones, for which they share what is planned and traced."""
    tables: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if not any(map(item.get_closest_marker, ("slow", "processes", "gpu"))):
            tables[item.nodeid.partition("[")[0]].append(item)
    return {item for name, cases in tables.items() for item in _some(name.partition("::")[0], cases)}


def _some(file: str, cases: list[pytest.Item]) -> list[pytest.Item]:
    return cases if len(cases) <= SAMPLE else random.Random(file).sample(cases, SAMPLE)
