"""The shell: autopart plan | mesh | estimate | show | export | report | check | emit | run | bench | calibrate."""

import gc
import os
import sys
from contextlib import suppress

# Each of these modules adds its commands to `app`, in the order of --help.
from autopart.cli import planning, show, report, training, bench, calibrate  # noqa: F401  isort: skip
from autopart.cli.shared import app


def main() -> None:
    """The entry point of the shell.

    Most commands are short: the garbage collector is off, and the process ends without Python's own clean-up, which
    would visit every object. `run`, which trains, turns the collector on.
    """
    gc.disable()
    try:
        app()
    except SystemExit as end:
        if gc.isenabled() or not isinstance(end.code, (int, type(None))):
            raise
        with suppress(BrokenPipeError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(end.code or 0)


if __name__ == "__main__":
    main()
