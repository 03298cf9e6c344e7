"""Kernels under Triton's interpreter, which is chosen when Triton is first imported: a child takes all cases."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = {"TRITON_INTERPRET": "1", "AUTOPART_FORCE_TRITON": "1", "PYTHONPATH": str(ROOT)}


def interpreted(file: str) -> dict[str, Any]:
    """What `file`, run as a script in a child that interprets, prints: one JSON object."""
    pytest.importorskip("triton")
    child = subprocess.run([sys.executable, file], env=os.environ | FLAGS, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    found: dict[str, Any] = json.loads(child.stdout)
    return found
