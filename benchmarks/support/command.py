"""The command that a benchmark was started by, as it is kept with the results."""

from __future__ import annotations

import shlex
import sys


def command_line() -> str:
    """`python -m benchmarks.GROUP.NAME ...` of this process."""
    return shlex.join(["python", "-m", sys.modules["__main__"].__spec__.name, *sys.argv[1:]])
