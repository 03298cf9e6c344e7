"""The command that a benchmark was started by, as it is kept with the results."""

from __future__ import annotations

import shlex
import sys


def command_line(module: str) -> str:
    """`python -m benchmarks.GROUP.NAME ...` with this process's arguments."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])
