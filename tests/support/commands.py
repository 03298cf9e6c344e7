"""Commands of Python as forks, which share what the server of forks has imported.

A command and the ranks that it starts would import torch and transformers each, for 6 CPU seconds a process.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from ranks import Fork, redirect, start_apart

from autopart.runtime import watchdog

ROOT = Path(__file__).resolve().parents[2]


class Command:
    """`subprocess.Popen` of `python LINE`, as a fork of the server.

    line    a file with its arguments, or -m, a module and its arguments
    folder  where it runs
    env     variables besides those of the server; a variable that is None is taken away
    """

    def __init__(self, line: Sequence[object], folder: Path, env: Mapping[str, str | None] | None = None) -> None:
        self.line = [str(word) for word in line]
        self.told = TemporaryDirectory()
        self.files = [Path(self.told.name, name) for name in ("stdout", "stderr")]
        self.process: BaseProcess = start_apart(_command, self.line, folder, dict(env or {}), *self.files)

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Its end; what it and all processes that it started have printed."""
        self.process.join()
        assert self.process.exitcode is not None
        stdout, stderr = (file.read_text() for file in self.files)
        return subprocess.CompletedProcess(self.line, self.process.exitcode, stdout, stderr)


def run(line: Sequence[object], folder: Path = ROOT, env: Mapping[str, str | None] | None = None) -> str:
    """What a command prints on stdout; fails where the command does."""
    done = Command(line, folder, env).wait()
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _command(line: Sequence[str], folder: Path, env: Mapping[str, str | None], stdout: Path, stderr: Path) -> None:
    redirect(stdout, stderr)
    os.chdir(folder)
    for name, value in env.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    with mock.patch("subprocess.Popen", partial(_popen, subprocess.Popen)):
        _python(line)


def _popen(popen: Any, line: Sequence[str], *given: Any, env: Mapping[str, str] | None = None, **options: Any) -> Any:
    """A process that a command starts: a fork, if it is one of this Python, as ranks are."""
    if list(line[:1]) != [sys.executable] or line[1] == "-c" or given or options:
        return popen(line, *given, env=env, **options)
    return Fork(partial(_python, line[1:]), line, os.environ if env is None else env)


def _python(line: Sequence[str]) -> None:
    """Run a file or, behind -m, a module in this process, as Python does: what leaves it passes through its hook."""
    module = line[1] if line[0] == "-m" else None
    sys.argv = list(line[1:] if module else line)
    sys.path.insert(0, os.getcwd() if module else str(Path(line[0]).resolve().parent))
    try:
        if module:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(line[0], run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        sys.exit(1)
    finally:
        watchdog.finish()
