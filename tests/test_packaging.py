"""What is installed elsewhere: the locked versions, and the wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from itertools import chain
from pathlib import Path
from shutil import copytree, ignore_patterns
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

import autopart
from autopart.plan.data import Plan

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
USERS_MODEL = """
from torch import nn, randn

class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 4)

    def forward(self, x):
        return self.inner(x).square().mean()

def model():
    return Line(), {"x": randn(4, 8)}
"""


@pytest.mark.parametrize("name", ["locked", "oldest"])
def test_locked_versions_are_within_the_bounds(name: str) -> None:
    lines = (ROOT / "constraints" / f"{name}.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.lstrip().startswith("#")]
    assert all(str(pin.specifier).startswith("==") for pin in pins)
    versions = {pin.name: str(pin.specifier).removeprefix("==") for pin in pins}
    for text in chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        asked = Requirement(text)
        assert versions[asked.name] in asked.specifier, f"make lock: {name} has {asked.name} {versions[asked.name]}"


def test_the_version_is_the_projects() -> None:
    assert autopart.__version__ == PROJECT["version"]
    with pytest.raises(AttributeError, match="no attribute 'version'"):
        _ = autopart.version


@pytest.mark.processes
def test_the_wheel_plans_and_emits_from_an_empty_folder(tmp_path: Path) -> None:
    """Dependencies are those of the environment that tests: a .pth names its folder, whose own .pth files, and so a
    checkout that is installed there, go unread."""
    source, elsewhere, home = tmp_path / "source", tmp_path / "environment", tmp_path / "home"
    copytree(ROOT / "autopart", source / "autopart", ignore=ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        (source / file).write_bytes((ROOT / file).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    _run(*pip, "wheel", source, "--wheel-dir", tmp_path, "--no-deps", "--no-build-isolation")
    (wheel,) = tmp_path.glob("*.whl")
    files = {f"{f.relative_to(ROOT)}" for f in (ROOT / "autopart").rglob("*") if f.is_file() and f.suffix != ".pyc"}
    assert {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name} == files

    venv.create(elsewhere)
    python = elsewhere / "bin" / "python"
    _run(*pip, "--python", python, "install", wheel, "--no-deps", "--no-index")
    (site,) = elsewhere.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    home.mkdir()
    (home / "users.py").write_text(USERS_MODEL)
    _run(elsewhere / "bin" / "autopart", "emit", "users:model", "2:h100-80gb", "--dp", 2, "--to", "out", cwd=home)
    assert Plan.load(home / "out" / "plan.json").dp == 2 and (home / "out" / "run.py").exists()


def _run(*command: object, cwd: Path | None = None) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    ended = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
