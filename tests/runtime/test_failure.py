"""One rank's failure ends all of them, soon and with its name."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from failure_worker import launch_forks, launch_scripts, torchrun
from ranks import run_apart, start_apart
from torch import nn

import autopart
from autopart.errors import PartitionError
from autopart.runtime.heartbeat import FAILED, FINISHED, RUNNING, Heartbeat, hung, last_known
from autopart.runtime.launch import _cause, _Death, launch

pytestmark = pytest.mark.timeout(120)
"""gloo would wait for half an hour."""

Launcher = Callable[[Sequence[str], int, Path], None]
Run = Callable[..., tuple[int, str]]
WATCHES: list[tuple[str, int, Launcher]] = [("watched", 3, launch_forks), ("started", 2, launch_scripts)]
"""The watchdog around a block of code, and until the interpreter exits; number of ranks; how they are launched."""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs ranks, all of which are checked to be gone: their status and output."""

    def run(how: str, watch: str = "watched", ranks: int = 3, launcher: Launcher = launch_forks) -> tuple[int, str]:
        ids = tmp_path / "ids"
        status = run_apart(launcher, (watch, how, str(ids)), ranks, tmp_path / "output")
        output = (tmp_path / "output").read_text()
        print(output)
        assert len(ids.read_text().split()) == ranks
        assert not alive(ids)
        return status, output

    return run


def alive(ids: Path) -> list[str]:
    """The ranks that have not ended."""
    return [process for process in ids.read_text().split() if Path("/proc", process).exists()]


@pytest.mark.processes
@pytest.mark.parametrize(("watch", "ranks", "launcher"), WATCHES)
def test_no_failure(run: Run, watch: str, ranks: int, launcher: Launcher) -> None:
    status, output = run("nothing", watch, ranks, launcher)
    assert status == 0
    assert all(f"rank {rank} done" in output for rank in range(ranks))
    assert "autopart:" not in output


@pytest.mark.processes
def test_a_killed_rank_is_named(run: Run) -> None:
    status, output = run("SIGKILL")
    assert status == 128 + 9
    assert "rank 1 was killed by SIGKILL while at step 5, when last heard; ending the other 2 ranks" in output


@pytest.mark.processes
def test_a_rank_that_leaves_without_a_word_is_named(run: Run) -> None:
    status, output = run("exit")
    assert status == 3
    assert "rank 1 failed with exit status 3 while at step 5, when last heard; ending" in output


@pytest.mark.processes
@pytest.mark.parametrize(("watch", "ranks", "launcher"), WATCHES)
def test_an_error_is_named_with_its_message(run: Run, watch: str, ranks: int, launcher: Launcher) -> None:
    status, output = run("raise", watch, ranks, launcher)
    assert status == 1
    # The status is told where the rank was quick to end.
    assert re.search("rank 1 failed( with exit status 1)? while at step 5: ValueError: no such token; ending", output)
    assert "Traceback" in output


@pytest.mark.processes
def test_a_stopped_rank_is_named(run: Run) -> None:
    status, output = run("SIGSTOP")
    assert status == 1
    assert "rank 1 fell silent while at step 5, when last heard; ending the other 2 ranks" in output


@pytest.mark.processes
@pytest.mark.parametrize("how", ["SIGKILL", "raise"])
def test_under_torchrun(run: Run, how: str) -> None:
    status, output = run(how, ranks=2, launcher=torchrun)
    assert status == 1
    if how == "SIGKILL":
        # Torchrun's own words, in its report on the rank that failed first.
        assert "(local_rank: 1)" in output.split("Root Cause")[1]
    else:
        assert "rank 1 failed while at step 5: ValueError: no such token" in output


@pytest.mark.processes
def test_the_loss_of_the_launcher_ends_the_ranks(tmp_path: Path) -> None:
    ids, output = tmp_path / "ids", tmp_path / "output"
    launcher = start_apart(launch_forks, ("watched", "forever", str(ids)), 3, output)
    while not Path(f"{ids}.failed").exists():
        time.sleep(0.1)
    launcher.kill()
    launcher.join()
    while alive(ids):
        time.sleep(0.1)
    assert "the store is gone with the launcher" in output.read_text()


def test_launch_needs_a_process() -> None:
    with pytest.raises(PartitionError, match="0 processes"):
        launch([sys.executable], 0)


def test_the_death_behind_the_others() -> None:
    told = {
        0: Heartbeat(9, FAILED, "a", "closed", 2),
        1: Heartbeat(9, RUNNING, "b"),
        2: Heartbeat(9, FAILED, "c", "bad", 1),
    }
    assert _cause([_Death(0, 1, 5.0), _Death(1, -9, 5.1)], told).rank == 1
    assert _cause([_Death(0, 1, 5.0), _Death(2, 1, 5.1)], told).rank == 2
    assert _cause([_Death(0, 1, 5.0), _Death(1, 3, 5.1)], told).rank == 1
    assert _cause([_Death(2, 1, 5.0), _Death(1, -6, 5.4)], told).rank == 2


def test_what_a_rank_last_said() -> None:
    assert last_known(None) == "before its watchdog said anything"
    assert last_known(Heartbeat(3, RUNNING, "step 1")) == "while at step 1, when last heard"
    assert last_known(Heartbeat(3, FAILED, "step 1", "OSError: x", 1)) == "while at step 1: OSError: x"


def test_the_rank_for_which_the_others_wait() -> None:
    def beat(seconds: float, blocked: bool = False, idle: bool = False, state: str = RUNNING) -> Heartbeat:
        return Heartbeat(1, state, "x", seconds=seconds, blocked=blocked, idle=idle)

    computes, waits, loads = beat(9.0), beat(9.5, blocked=True), beat(9.2, idle=True)
    assert hung({0: waits, 1: computes, 2: waits}, 9.0) == (1, "hung")
    assert hung({0: waits, 1: waits, 2: loads}, 9.0) == (2, "hung")
    assert hung({0: waits, 1: beat(9.6, blocked=True)}, 9.0) == (1, "hung")
    assert hung({0: waits, 1: computes, 2: beat(0.0, state=FINISHED)}, 9.0) == (1, "hung")
    # One gets on, none is in a step, one has failed, no limit, no rank.
    assert hung({0: waits, 1: computes, 2: beat(8.9)}, 9.0) is None
    assert hung({0: loads, 1: loads}, 9.0) is None
    assert hung({0: waits, 1: computes, 2: beat(0.0, state=FAILED)}, 9.0) is None
    assert hung({0: waits, 1: computes}, None) is None
    assert hung({}, 9.0) is None


def test_a_hang_timeout_is_positive() -> None:
    with pytest.raises(PartitionError, match="hang_timeout=0 is not positive"):
        autopart.compile(nn.Linear(2, 2), "1:cpu", {}, hang_timeout=0)
