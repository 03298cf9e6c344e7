"""Lines of the user's, out of stack traces."""

from __future__ import annotations

import os
import re
import traceback

import torch
import torch.utils.checkpoint

PACKAGES = (
    os.path.dirname(torch.__file__) + os.sep,
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep,
)
"""Where lines that are not the user's come from."""


PYTHON = os.path.dirname(os.__file__) + os.sep
"""Where Python's own modules lie, and inside of it the packages that are installed."""


def user_line(frames: traceback.StackSummary) -> str:
    """The innermost line that is neither torch's, Python's nor autopart's, "model.py:88: y = f(x)"."""
    own = [f for f in frames if not f.filename.startswith((*PACKAGES, "<")) and not _is_pythons(f.filename)]
    return f"{os.path.basename(own[-1].filename)}:{own[-1].lineno}: {own[-1].line}" if own else "?"


def _is_pythons(filename: str) -> bool:
    return filename.startswith(PYTHON) and "site-packages" not in filename


def source_line(stack: str) -> str:
    """The innermost line of a stack trace that is the model's own, "modeling_llama.py:88"."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', stack)
    own = [f for f in frames if not f[0].startswith((*PACKAGES, "<"))]
    return f"{os.path.basename(own[-1][0])}:{own[-1][1]}" if own else ""
