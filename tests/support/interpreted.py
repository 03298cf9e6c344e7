"""Kernels under Triton's interpreter, which is chosen when Triton is first imported.

One process that interprets imports torch and Triton, and for every file of tests a fork of it takes all cases.
"""

import json
import os
import runpy
import subprocess
import sys
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = {"TRITON_INTERPRET": "1", "AUTOPART_FORCE_TRITON": "1", "PYTHONPATH": str(ROOT)}


def interpreted(file: str) -> dict[str, Any]:
    """What `file`, run as a script in a process that interprets, prints: one JSON object."""
    pytest.importorskip("triton")
    with TemporaryDirectory() as folder:
        printed, errors = Path(folder, "printed"), Path(folder, "errors")
        print(file, printed, errors, sep="\0", file=_server().stdin, flush=True)
        status = _server().stdout.readline()  # type: ignore[union-attr]
        assert status == "0\n", f"exit status {status}" + errors.read_text()
        found: dict[str, Any] = json.loads(printed.read_text())
    return found


@cache
def _server() -> subprocess.Popen[str]:
    """The process whose forks run files; it ends with the process that started it."""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, __file__], env=os.environ | FLAGS, stdin=pipe, stdout=pipe, text=True)


def serve() -> None:
    """Run the file of every line of the input, and print the exit status."""
    import torch._dynamo  # noqa: F401  which opcheck imports
    from torch.testing._internal import optests  # noqa: F401  likewise

    from autopart.kernels import launch, table  # noqa: F401  brings in the kernels

    launch.register_operators()
    for line in sys.stdin:
        child = get_context("fork").Process(target=_run, args=line.rstrip("\n").split("\0"))
        child.start()
        child.join()
        print(child.exitcode, flush=True)


def _run(file: str, printed: str, errors: str) -> None:
    for descriptor, path in ((1, printed), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    runpy.run_path(file, run_name="__main__")


if __name__ == "__main__":
    serve()
