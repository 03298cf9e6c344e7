"""What autopart writes for people, word for word. AUTOPART_GOLDEN=renew writes it anew: read the difference."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest
from models import build

import autopart
from autopart.compile.programs import sources
from autopart.plan.text import describe
from autopart.runtime.emitted import run_source

GOLDEN = Path(__file__).with_name("golden")


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def texts(request: pytest.FixtureRequest) -> dict[str, str]:
    """File name -> text: the plan and the module of either stage."""
    model, batch = build(request.param, layers=4)
    plan = autopart.plan(model, "4:cpu", batch, tp=2, pp=2, micro_batch=4)
    text = re.sub(r", planned in \S+ s", "", describe(plan, 120)) + "\n"
    modules = {f"{request.param}_stage{i}.py.txt": s for i, s in enumerate(sources(model, batch, plan))}
    return {f"{request.param}_plan.txt": text, **modules}


def test_texts_are_the_golden_ones(texts: dict[str, str]) -> None:
    if os.environ.get("AUTOPART_GOLDEN") == "renew":
        GOLDEN.mkdir(exist_ok=True)
        for name, text in texts.items():
            (GOLDEN / name).write_text(text)
    for name, text in texts.items():
        assert without_lines((GOLDEN / name).read_text()) == without_lines(text), f"{name}: see `make golden`"


def without_lines(text: str) -> str:
    """Without the line numbers of other packages' sources, which differ between their versions."""
    return re.sub(r"(\w+\.py):\d+", r"\1", text)


def test_modules_import(texts: dict[str, str]) -> None:
    modules = [run_source(text, name) for name, text in texts.items() if ".py" in name]
    assert len(modules) == 2 and all(callable(m.Stage) for m in modules)


def test_texts_are_clean(texts: dict[str, str]) -> None:
    for name, text in texts.items():
        for number, line in enumerate(text.splitlines(), 1):
            where = f"{name}:{number}: {line}"
            assert not re.search(r"(?<![\w.)\]])/\w+/", line), f"an absolute path: {where}"
            assert line == line.rstrip() and "\t" not in line, where
        if ".py" in name:
            assert ast.get_docstring(ast.parse(text)), f"{name} does not say what it is"
