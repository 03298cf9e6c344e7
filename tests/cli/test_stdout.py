"""Stdout holds what was asked for and nothing else, whatever the libraries underneath print."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_apart

import autopart
from autopart.cli.main import app, main

MODEL = """
import torch
from examples.tiny import Regressor

def model():
    return Regressor(8, 1), {"x": torch.randn(4, 8), "y": torch.randn(4)}
"""
COMMANDS = {
    "plan": ["plan", "small.py:model", "2:cpu", "--save", "plan.json"],
    "show": ["show", "plan.json"],
    "show --why": ["show", "plan.json", "--why", "--why-not", "tp=2", "--prices"],
    "show --timeline": ["show", "plan.json", "--timeline"],
    "show --memory": ["show", "plan.json", "--memory"],
    "show --missing": ["show", "plan.json", "--missing"],
    "report": ["report", "plan.json", "--why"],
    "estimate": ["estimate", "small.py:model", "2:cpu", "--dp", "2"],
    "estimate again": ["estimate", "plan.json"],
    "mesh": ["mesh", "small.py:model", "--devices", "2:cpu"],
    "check": ["check", "small.py:model", "2:cpu", "--tp", "2"],
    "emit": ["emit", "small.py:model", "2:cpu", "--to", "emitted"],
    "export": ["export", "plan.json", "--to", "torchtitan"],
    "run": ["run", "small.py:model", "1:cpu", "--steps", "2", "--report", "report.html"],
}
"""Arguments of a command that prints JSON. `bench` and `calibrate` start processes: they are in tests/benchmarks and in
tests/runtime."""


def run_each(lines: list[list[str]], folder: Path) -> None:
    """Run every line of arguments in a process of its own, which is forked when all is imported, but the solver has not
    been started: it greets once a process. No arguments: a program that plans."""
    os.chdir(folder)
    sys.path.insert(0, ".")
    model, batch = importlib.import_module("small").model()
    torch.export.export(model, (), batch)
    for number, line in enumerate(lines):
        read, write = os.pipe()
        if not os.fork():
            os.dup2(write, 1)
            if line:
                sys.argv = ["autopart", *line]
                main()
            else:
                autopart.plan(model, "2:cpu", batch)
            os._exit(0)
        os.close(write)
        with open(f"{number}.txt", "wb") as file, open(read, "rb") as pipe:
            file.write(pipe.read())
        _, status = os.wait()
        assert status == 0, line


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each command wrote to its file descriptor 1, and `a program`."""
    folder = tmp_path_factory.mktemp("stdout")
    (folder / "small.py").write_text(MODEL)
    lines = [*([*line, "--json"] for line in COMMANDS.values()), []]
    assert run_apart(run_each, lines, folder) == 0
    return {name: (folder / f"{n}.txt").read_text() for n, name in enumerate([*COMMANDS, "a program"])}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_json_is_all_of_stdout(name: str, told: dict[str, str]) -> None:
    assert json.loads(told[name]) is not None


@pytest.mark.slow
def test_a_program_that_plans_prints_nothing(told: dict[str, str]) -> None:
    assert told["a program"] == ""


def test_no_command_is_left_out() -> None:
    assert {c.name for c in app.registered_commands} == {line[0] for line in COMMANDS.values()} | {"bench", "calibrate"}
