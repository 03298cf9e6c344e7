"""Settings of the whole test suite, made before anything imports torch or transformers.

Where the time goes: CPU seconds (user and system, of a test and its children) of a whole run on two slow cores, 2,064
in all and 19 minutes, before equal models were traced once and processes were forks. Two cores that import torch in 1.3
seconds and do nothing else take 10 minutes and 30 seconds for all, with the tests of kernels.

    122  sharding/test_proof.py
    115  planner/test_explain.py
    112  runtime/test_exact.py, of which four ranks of GPT-2 69
    104  runtime/test_chaos.py
    82   compile/test_graphs.py and cost/test_memory.py
    71   compile/test_trainer.py and frontend/test_shortened.py
    59   cli/test_cli.py
    54   runtime/test_random.py and runtime/test_variants.py
    48   runtime/test_weights.py, runtime/test_checkpoint.py and planner/test_brute.py
    44   compile/test_check.py
    42   compile/test_structure.py and planner/test_solvers.py
    36   runtime/test_failure.py, sharding/test_rules.py, planner/test_plan.py, frontend/test_exporting.py and others

What is dear is to import torch (2) or transformers and autopart (3 more), to trace a model (0.2 to 2 for each dtype and
micro-batch size, twice that where `frontend/functionalize.py` leaves it to torch: of a test that compiles a program,
nine tenths), and to start ranks. So trace once for many plans: `support/models.py` keeps what any test has traced of
its models, and under the fixture `traced_once` equal models of a file are traced once. Fork ranks, and whatever needs a
process of its own, from the server that has imported what they need (`support/ranks.py`), and share what was traced and
planned before. Kernels are interpreted by forks too (`support/interpreted.py`): 60 CPU seconds for all files, and no
more 4 for the imports of each. A test of more than about 2 CPU seconds is `slow`, so that `make quick` leaves it out.
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

SAMPLE = 2
"""Cases of a parametrised test that --quick runs at most."""
LONGEST = """test_explain test_proof test_memory test_shortened test_check test_random test_solvers test_graph
    test_structure test_exporting test_certify test_functional test_reserved test_estimates test_plan""".split()
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
    """Tests without the markers `slow` and `processes`; of every test's cases a few, always the same."""
    tables: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if not any(map(item.get_closest_marker, ("slow", "processes", "gpu"))):
            tables[item.nodeid.partition("[")[0]].append(item)
    return {item for name, cases in tables.items() for item in _some(name, cases)}


def _some(name: str, cases: list[pytest.Item]) -> list[pytest.Item]:
    return cases if len(cases) <= SAMPLE else random.Random(name).sample(cases, SAMPLE)
