"""One rank's failure ends all of them, soon and with its name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from autopart.errors import PartitionError
from autopart.runtime.heartbeat import FAILED, RUNNING, Heartbeat, last_known
from autopart.runtime.launch import _cause, _Death, launch

pytestmark = pytest.mark.timeout(120)
"""gloo would wait for half an hour."""

# Rank 1 fails at step 5 in the way that argv[1] names; all append their process id to argv[2].
SCRIPT = """
import os, signal, sys, time
from types import SimpleNamespace
import torch, torch.distributed as dist
from autopart.runtime.watchdog import {names}

def fail(how):
    time.sleep(1)  # until the others have heard of step 5
    open(sys.argv[2] + ".failed", "w").close()
    if how == "raise":
        raise ValueError("no such token\\nand more")
    if how == "exit":
        os._exit(3)
    if how != "nothing":
        os.kill(os.getpid(), getattr(signal, how))

def train(at):
    for step in range(8):
        at.doing = f"step {{step}}"
        dist.all_reduce(torch.ones(4))
        if step == 5 and dist.get_rank() == 1:
            fail(sys.argv[1])

with open(sys.argv[2], "a") as file:
    file.write(f"{{os.getpid()}}\\n")
dist.init_process_group("gloo")
at = SimpleNamespace(doing="starting")
{body}
print(f"rank {{dist.get_rank()}} done")
dist.destroy_process_group()
"""
WATCHED = SCRIPT.format(names="watched", body="with watched(at, patience=3.0): train(at)")
STARTED = SCRIPT.format(names="start_watchdog", body="start_watchdog(lambda: at.doing, patience=3.0)\ntrain(at)")
LAUNCH = """
import sys
from autopart.runtime.launch import launch
sys.exit(launch(sys.argv[1:], 3))
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3")


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs 3 ranks, all of which are checked to be gone: their status and output."""

    def run(how: str, script: str = WATCHED, launcher: tuple[str, ...] = ()) -> tuple[int, str]:
        file, ids = tmp_path / "train.py", tmp_path / "ids"
        file.write_text(script)
        capfd.readouterr()
        if launcher:
            command = [sys.executable, *launcher, str(file), how, str(ids)]
            status = subprocess.run(command, env=ENVIRONMENT, timeout=120, check=False).returncode
        else:
            status = launch([sys.executable, str(file), how, str(ids)], 3, ENVIRONMENT)
        output = "".join(capfd.readouterr())
        print(output)
        processes = ids.read_text().split()
        assert len(processes) == 3
        assert not [process for process in processes if Path("/proc", process).exists()]
        return status, output

    return run


@pytest.mark.processes
@pytest.mark.parametrize("script", [WATCHED, STARTED], ids=["watched", "started"])
def test_no_failure(run: Run, script: str) -> None:
    status, output = run("nothing", script)
    assert status == 0
    assert all(f"rank {rank} done" in output for rank in range(3))
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
@pytest.mark.parametrize("script", [WATCHED, STARTED], ids=["watched", "started"])
def test_an_error_is_named_with_its_message(run: Run, script: str) -> None:
    status, output = run("raise", script)
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
    status, output = run(how, launcher=TORCHRUN)
    assert status == 1
    if how == "SIGKILL":
        # Torchrun's own words, in its report on the rank that failed first.
        assert "(local_rank: 1)" in output.split("Root Cause")[1]
    else:
        assert "rank 1 failed while at step 5: ValueError: no such token" in output


@pytest.mark.processes
def test_the_loss_of_the_launcher_ends_the_ranks(tmp_path: Path) -> None:
    file, ids = tmp_path / "train.py", tmp_path / "ids"
    file.write_text(WATCHED.replace("range(8)", "range(10**9)"))
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, sys.executable, str(file), "nothing", str(ids)],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not Path(f"{ids}.failed").exists():
        time.sleep(0.1)
    launcher.kill()
    _, output = launcher.communicate(timeout=60)  # Returns once no rank holds the pipe any more.
    assert "the store is gone with the launcher" in output


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
