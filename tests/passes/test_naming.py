"""Emitted values have the names that the model's own source gives them."""

from __future__ import annotations

import ast
import re

import pytest
import torch
from emitted import sources
from torch import Tensor, nn
from torch.nn import functional as F

import autopart
from autopart.ir.graph import Frame, info, update_info
from autopart.passes.codegen.naming import output_name
from autopart.passes.codegen.statements import statement_of
from autopart.passes.trace import trace

WIDTH = 8


class Block(nn.Module):
    """Has one statement of each kind that names a value or does not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        skipped = x
        x = self.norm(x)
        left, right = self.up(x).chunk(2, dim=-1)
        for_gate: Tensor = left * torch.sigmoid(right)
        mixed = self.down(for_gate)
        return skipped + mixed


class Turned(nn.Module):
    """One statement whose call has several outputs and uses them itself; another that gives two results."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        first, second = self.left(x), self.right(x)
        first, second = turned(first, second)
        return F.mse_loss(first * second, y)


def turned(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    low, high = first.chunk(2, dim=-1)
    first = torch.cat([-high, low], dim=-1)
    low, high = second.chunk(2, dim=-1)
    return first, torch.cat([-high, low], dim=-1)


class Model(nn.Module):
    """Equal blocks, and variables whose names emitted code uses for other things."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(depth)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        weight = self.head(x)
        list = weight.exp()
        layer = list + weight
        return F.mse_loss(layer, y)


def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(4, WIDTH), "y": torch.randn(4, WIDTH)}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    model = Model()
    plan = autopart.plan(model, "2:cpu", batch(), dp=2, micro_batch=4)
    return [sources(model, batch(), plan)[0] for _ in range(2)]


def assigned(text: str, function: str) -> list[str]:
    """The names that the lines of a class's `forward` assign, in order; `_` left out."""
    tree = ast.parse(text)
    (forward,) = (
        method
        for each in tree.body
        if isinstance(each, ast.ClassDef) and each.name == function
        for method in each.body
        if isinstance(method, ast.FunctionDef) and method.name == "forward"
    )
    return [
        name.id
        for node in ast.walk(forward)
        if isinstance(node, ast.Assign)
        for target in node.targets
        for name in ast.walk(target)
        if isinstance(name, ast.Name)
    ]


def test_variables_name_values(texts: list[str]) -> None:
    names = assigned(texts[0], "Block")
    assert names == ["norm", "left", "right", "sigmoid", "for_gate", "mixed", "x"]


def test_what_blocks_pass_on_has_one_name(texts: list[str]) -> None:
    assert re.search(r"for layer in self\.blocks:\n +(\w+) = layer\(\1\)", texts[0]), texts[0]


def test_outputs_that_a_statement_uses_are_not_its_variables() -> None:
    model = Turned()
    plan = autopart.plan(model, "1:cpu", batch(), micro_batch=4)
    (text,) = sources(model, batch(), plan)
    pair = ["split_0", "split_1"]
    assert assigned(text, "Stage")[:8] == ["left", "right", *pair, "first", *pair, "second"], text


class Chosen(nn.Module):
    """A function that picks the outputs of an operator and uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        values, places = best(self.up(x))
        return F.mse_loss(values, y[..., :2]) + (y * places.sum()).mean()


def best(scores: Tensor) -> tuple[Tensor, Tensor]:
    values, places = scores.topk(2)
    return values.square(), places


def test_outputs_that_are_picked_elsewhere() -> None:
    """As torch.export tells of some picks that it makes itself."""
    graph = trace(Chosen(), batch()).graph
    (chosen,) = (n for n in graph.nodes if n.op == "call_function" and info(n).name.startswith("aten.topk"))
    names = [output_name(chosen, 0), output_name(chosen, 1)]
    for pick in chosen.users:
        update_info(pick, frames=info(pick).frames[:1])
    assert names == [output_name(chosen, 0), output_name(chosen, 1)] == ["values", "indices"]


def test_names_shadow_nothing(texts: list[str]) -> None:
    taken = {"weight", "list", "layer", "torch", "F", "nn"}
    for name in ("Block", "Stage"):
        assert not taken & set(assigned(texts[0], name))


def test_names_are_the_same_every_time(texts: list[str]) -> None:
    assert texts[0] == texts[1]


SOURCE = """\
x = f(x)
a, (b, c), d.e = g(
    x,
    y,
)
z: int = h(x) + 1
z += a
for i in z:
    print(i)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("source") / "model.py"
    path.write_text(SOURCE)
    return str(path)


@pytest.mark.parametrize(
    ("line", "targets", "reads", "is_call"),
    [
        (1, ("x",), {"f", "x"}, True),
        (2, ("a", "", ""), {"g", "x", "y"}, True),
        (4, ("a", "", ""), {"g", "x", "y"}, True),
        (6, ("z",), {"h", "x"}, False),
        (7, ("z",), {"z", "a"}, False),
        (9, (), {"print", "i"}, True),
    ],
)
def test_statements(file: str, line: int, targets: tuple[str, ...], reads: set[str], is_call: bool) -> None:
    found = statement_of(Frame(file, line, "f"))
    assert found is not None
    assert (found.targets, found.reads, found.is_call) == (targets, reads, is_call)


def test_no_statement() -> None:
    assert statement_of(Frame("no such file", 1, "f")) is None


def test_headers_are_no_statements(file: str) -> None:
    assert statement_of(Frame(file, 8, "f")) is None
