"""The user's own lines, found in stack traces."""

import os
import re
import traceback
from functools import lru_cache

import torch

from autopart.ir.graph import Frame

PACKAGES = (
    os.path.dirname(torch.__file__) + os.sep,
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep,
)
"""The folders of torch and of autopart, whose lines are not the user's."""

PYTHON = os.path.dirname(os.__file__) + os.sep
"""The folder of Python's own modules; installed packages are inside of it, in `site-packages`."""

FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


def user_line(frames: traceback.StackSummary) -> str:
    """The innermost line that is neither torch's nor Python's nor autopart's: ``"model.py:88: y = f(x)"``."""
    own = [f for f in frames if not f.filename.startswith((*PACKAGES, "<")) and not _is_pythons(f.filename)]
    return f"{os.path.basename(own[-1].filename)}:{own[-1].lineno}: {own[-1].line}" if own else "?"


def _is_pythons(filename: str) -> bool:
    return filename.startswith(PYTHON) and "site-packages" not in filename


@lru_cache(maxsize=2**12)
def own_frames(stack: str) -> tuple[Frame, ...]:
    """The frames of a stack trace, given as text, that are neither torch's nor autopart's; the innermost is last."""
    frames = (Frame(file, int(line), function) for file, line, function in FRAME.findall(stack))
    return tuple(frame for frame in frames if not frame.file.startswith((*PACKAGES, "<")))


def source_line(stack: str) -> str:
    """The innermost frame of `own_frames` as ``"modeling_llama.py:88"``; "" where there is none."""
    own = own_frames(stack)
    return f"{os.path.basename(own[-1].file)}:{own[-1].line}" if own else ""
