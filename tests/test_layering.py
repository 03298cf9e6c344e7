"""Which module may import what. The tables say it; the rest of the file enforces them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

# Lowest first: a room of autopart/ imports from itself and from the rooms before it.
ROOMS = (
    "errors",
    "hardware",
    "kernels",
    "sharding",
    "ir",
    "cost",
    "frontend",
    "plan",
    "runtime",
    "passes",
    "planner",
    "compile",
    "cli",
    "__init__",
)
# (import, the only files that may have it), both regular expressions.
ONLY_IN = (
    (r"highspy\b", r"passes/(solve(_stages)?|warm_starts)\.py"),
    (r"pulp\b", r"passes/ilp(_solvers)?\.py"),
    (r"triton\b", r"kernels/.*"),
    (r"accelerate\b", r"compile/trainer/.*"),
    (r"torch\.(.*\.)?_(?!_)", r"frontend/torch_private\.py"),
)
# (import, files that may not have it): emitted code runs without any planning, and trains without tracing.
NEVER_IN = ((r"autopart\.(passes|planner)\b", r"runtime/.*"), (r"autopart\.(kernels|runtime)\b", r"planner/.*"))
# (import, the only files that may have it outside of functions and of `if TYPE_CHECKING`): what takes long to load.
ONLY_INSIDE_FUNCTIONS = ((r"triton\b", r""), (r"autopart\.passes\.ilp(_solvers)?\b", r"passes/ilp_solvers\.py"))

PACKAGE = Path(__file__).parents[1] / "autopart"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
LEVEL = {room: level for level, room in enumerate(ROOMS)}


def imports(file: str, tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """Every name a file imports, in full: `from a import b` gives a.b."""
    package = ("autopart", *Path(file).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            prefix = ".".join((*base, *filter(None, [node.module])))
            yield from ((f"{prefix}.{alias.name}", node) for alias in node.names)


def reasons(file: str, name: str, inside_function: bool) -> Iterator[str]:
    """Why `file` may not import `name`; nothing if it may."""
    for pattern, files in ONLY_IN:
        if re.match(pattern, name) and not re.fullmatch(files, file):
            yield f"only {files} may"
    for pattern, files in NEVER_IN:
        if re.match(pattern, name) and re.fullmatch(files, file):
            yield f"{files} may not"
    for pattern, files in ONLY_INSIDE_FUNCTIONS:
        if re.match(pattern, name) and not inside_function and not re.fullmatch(files, file):
            yield "only inside functions"

    root, *parts = name.split(".")
    if root != "autopart":
        return
    own = Path(file).with_suffix("").parts
    target = parts[0] if parts and parts[0] in LEVEL else "__init__"
    if LEVEL[target] > LEVEL[own[0]]:
        yield f"the room {target} stands above {own[0]}"


def violations(file: str, source: str) -> list[str]:
    if Path(file).with_suffix("").parts[0] not in LEVEL:
        return [f"autopart/{file}: in no room of tests/test_layering.py"]
    tree = ast.parse(source)
    deferred = {node for block in ast.walk(tree) if _runs_later(block) for node in ast.walk(block)}
    return [
        f"autopart/{file}:{node.lineno}: imports {name}: {reason}"
        for name, node in imports(file, tree)
        for reason in reasons(file, name, node in deferred)
    ]


def _runs_later(node: ast.AST) -> bool:
    """Whether what a node of a module holds does not run as the module is imported."""
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def test_imports_respect_the_layers() -> None:
    found = [line for file in FILES for line in violations(file, (PACKAGE / file).read_text())]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("file", "source", "name"),
    [
        ("hardware/mesh.py", "from autopart.plan.data import Plan", "autopart.plan.data.Plan"),
        ("hardware/mesh.py", "from .. import plan", "autopart.plan"),
        ("plan/data.py", "import autopart", "autopart"),
        ("plan/data.py", "def f():\n    from ..passes.solve import solve", "autopart.passes.solve.solve"),
        ("passes/another.py", "from autopart.planner import request", "autopart.planner.request"),
        ("passes/another.py", "from ..planner.request import Request", "autopart.planner.request.Request"),
        ("passes/another.py", "import pulp", "pulp"),
        ("planner/another.py", "from autopart.passes.ilp import state", "autopart.passes.ilp.state"),
        ("compile/another.py", "def f():\n    import triton.language", "triton.language"),
        ("kernels/another.py", "import triton", "triton"),
        ("runtime/another.py", "from autopart.passes import Pass", "autopart.passes.Pass"),
        ("planner/another.py", "from autopart.runtime.groups import Groups", "autopart.runtime.groups.Groups"),
        ("sharding/rules/another.py", "from torch._ops import OpOverload", "torch._ops.OpOverload"),
        ("sharding/rules/another.py", "from torch import _C", "torch._C"),
        ("sharding/another.py", "import torch.testing._internal.common_utils", "torch.testing._internal.common_utils"),
    ],
)
def test_a_violation_is_found(file: str, source: str, name: str) -> None:
    found = violations(file, source)
    assert found
    assert all(line.startswith(f"autopart/{file}:") and f"imports {name}: " in line for line in found)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("passes/solve.py", "import highspy\nfrom autopart.passes import Pass\nfrom ..plan.data import Plan"),
        ("passes/__init__.py", "from .solve import solve"),
        ("passes/ilp.py", "import pulp"),
        ("planner/another.py", "def f():\n    from autopart.passes.ilp import state"),
        ("kernels/another.py", "def f():\n    import triton"),
        ("frontend/torch_private.py", "from __future__ import annotations\nfrom torch._C import Graph"),
        ("cli/main.py", "from autopart import compile, runtime\nfrom torch import __version__"),
    ],
)
def test_no_violation_is_made_up(file: str, source: str) -> None:
    assert not violations(file, source)


def test_a_file_in_no_room_is_found() -> None:
    assert violations("unheard_of.py", "") == ["autopart/unheard_of.py: in no room of tests/test_layering.py"]
