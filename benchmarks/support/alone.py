"""Runs a function in a forked process of its own, so that none counts what another has cached or takes others down."""

from __future__ import annotations

import json
import os
import resource
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def cpu_seconds() -> float:
    """CPU seconds of this process, user and system."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def alone(run: Callable[[], Row], cpu_limit: int) -> Row:
    """What `run` returns, as JSON, with the process's CPU seconds ("cpu") and peak resident bytes ("peak_bytes").

    The bytes count what was imported before. A process that raises, is killed or takes more than `cpu_limit` CPU
    seconds gives {"failed": why} instead. What it prints is lost.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_limit, cpu_limit))
        try:
            row = run()
        except BaseException as error:
            places = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]
            row = {"failed": f"{type(error).__name__}: {error}", "places": places[-20:]}
        with os.fdopen(writing, "w") as pipe:
            json.dump(row, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status, usage = os.wait4(child, 0)
    cpu = usage.ru_utime + usage.ru_stime
    if text:
        row = json.loads(text)
    elif os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL) and cpu >= 0.95 * cpu_limit:
        row = {"failed": f"not done after {cpu_limit} CPU s"}
    else:
        row = {"failed": f"the process ended with status {status}"}
    return {**row, "cpu": round(cpu, 2), "peak_bytes": usage.ru_maxrss * 1024}
