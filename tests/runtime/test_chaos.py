"""Whatever happens to one rank, all ranks end, the rank is named with what it did, and training can go on.

Cases are drawn: a kind of failure, an instruction, a plan and a rank. Ranks mostly wait, so that several cases run at
once: a case takes 0.8 CPU seconds.
"""

from __future__ import annotations

import json
import os
import random
import re
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from chaos_worker import MESSAGES, OPS, PLANS, Case, prepare, run_case
from ranks import run_apart, start_apart

KINDS: dict[str, tuple[str, ...]] = {
    "kill": (*OPS, "save", "load"),
    "exit0": (*OPS, "save", "load"),
    "raise": (*OPS, "save", "load"),
    "hang": (*OPS, "save", "load"),
    "full": ("save",),
    "exit3": (*OPS, "save", "load"),
    "shape": ("forward",),
    "memory": ("forward", "backward", "step", "save", "load"),
    "truncated": ("load",),
    "slow": (*OPS, "save", "load"),
    "flipped": ("load",),
}
"""Kind of failure -> at which instructions it can happen."""
ENDS = {
    "kill": "was killed by SIGKILL while at {doing}, when last heard;",
    "exit0": "left with exit status 0 while at {doing}, when last heard;",
    "exit3": "failed with exit status 3 while at {doing}, when last heard;",
    "hang": "hung while at {doing}, when last heard;",
}
"""What the launcher says of a rank that failed without an error."""
ERRORS = {
    "raise": "RuntimeError: no such token",
    "memory": "OutOfMemoryError: Tried to allocate",
    "full": "OSError: [Errno 28] No space left on device",
}


def draw(rounds: int) -> list[Case]:
    """Cases, the kinds by turns; what happens at one instruction alone in every other round."""
    random_ = random.Random(0)
    cases: list[Case] = []
    for kind in [k for turn in range(rounds) for k, ops in KINDS.items() if len(ops) > 1 or turn % 2 == 0]:
        plan = random_.choice([name for name in PLANS if name != "one"])
        op = random_.choice([op for op in KINDS[kind] if op not in MESSAGES or "pp" in plan])
        # A batch is held against rank 0's.
        rank = random_.randrange(kind == "shape", PLANS[plan][0])
        cases.append(Case(kind, op, plan, rank, len(cases)))
    return cases


CASES = draw(6 if "AUTOPART_EXAMPLES" in os.environ else 3)
AT_ONCE = 4


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with a folder of results for each case that was asked for, and with the emitted plans."""
    folder = tmp_path_factory.mktemp("chaos")
    assert run_apart(prepare, folder / "plans") == 0
    asked = {item.name for item in request.session.items if item.path == request.path}
    running: list[BaseProcess] = []
    for case in [case for case in CASES if any(f"[{case}]" in name for name in asked)]:
        if len(running) == AT_ONCE:
            wait([process.sentinel for process in running])
            running = [process for process in running if process.is_alive()]
        (folder / str(case)).mkdir()
        running.append(start_apart(run_case, folder / "plans", folder / str(case), case))
    for process in running:
        process.join()
    return folder


@pytest.mark.processes
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_rank_fails(folder: Path, case: Case) -> None:
    plans, folder = folder / "plans", folder / str(case)
    output = (folder / "output").read_text()
    print(output)
    ids = (folder / "ids").read_text().split()
    assert len(ids) == PLANS[case.plan][0]
    assert not [process for process in ids if Path("/proc", process).exists()]
    result = json.loads((folder / "result.json").read_text())
    check_report(case, output, result["status"], folder)
    # The last good checkpoint is the second where it was saved before anything happened, and is not what was damaged.
    good = 2 if (case.op == "load" and case.kind not in ("truncated", "flipped")) or case.kind == "slow" else 1
    losses = json.loads((plans / "losses.json").read_text())
    assert result["position"] == good
    assert result["loss"] == pytest.approx(losses[good], rel=1e-4)


def check_report(case: Case, output: str, status: int, folder: Path) -> None:
    """The launcher's line names the rank, what it was doing, and the first cause."""
    if case.kind == "slow":
        assert status == 0 and "autopart: rank" not in output
        return
    assert status != 0
    (line,) = re.findall(r"^autopart: (rank .*; ending the other .*)$", output, re.MULTILINE)
    assert line.endswith("ranks" if PLANS[case.plan][0] > 2 else "rank")
    if case.kind in ("truncated", "flipped"):
        assert re.search("while at loading .*: PartitionError: .*step-00000002 is damaged", line)
        return
    doing = (folder / "doing").read_text()
    if case.kind in ENDS:
        assert line.startswith(f"rank {case.rank} {ENDS[case.kind].format(doing=doing)}")
    elif case.kind == "shape":
        known = f"rank {case.rank} got other rows than rank 0" in line
        assert known or re.match(rf"rank {case.rank} failed.* while at {doing}: PartitionError: ", line)
    elif case.op in OPS:
        # The status is told where the rank was quick to end.
        how = rf"rank {case.rank} failed( with exit status 1)? while at {re.escape(doing)}: "
        assert re.match(how + re.escape(ERRORS[case.kind]), line)
    else:  # of which all ranks raise an error that names the rank
        assert f"rank {case.rank}: {ERRORS[case.kind]}" in line
