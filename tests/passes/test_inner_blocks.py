"""Stages of blocks: where the numbered modules inside of numbered modules are what is planned once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import autopart
from autopart.hardware.mesh import Mesh
from autopart.passes.source import Source

WIDTHS = (8, 12, 16)
BATCH = {"x": torch.rand(8, 4, WIDTHS[0])}


class Block(nn.Module):
    """A layer beside a sum."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Stage(nn.Module):
    """Blocks of one width, with a layer in front of them or behind them that changes the width."""

    def __init__(self, width: int, to: int, inner: Sequence[int], front: bool = False, back: bool = True) -> None:
        super().__init__()
        self.front = nn.Linear(width, width) if front else nn.Identity()
        self.blocks = nn.ModuleList(Block(width, i) for i in inner)
        self.back = nn.Linear(width, to) if back else nn.Identity()

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.run(self.front(x)))  # type: ignore[no-any-return]


class Between(Stage):
    """Does something between its blocks."""

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.sin(block(x))
        return x


class Pyramid(nn.Module):
    def __init__(self, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x.square().mean()


def pyramid(make: Callable[[int, int], nn.Module], widths: Sequence[int] = WIDTHS) -> nn.Module:
    torch.manual_seed(0)
    return Pyramid([make(*pair) for pair in zip(widths, [*widths[1:], widths[-1]], strict=True)])


ALIKE = (16, 16, 16)
OPENED: dict[str, tuple[Callable[[int, int], nn.Module], bool]] = {
    "a layer behind": (lambda width, to: Stage(width, to, ALIKE), True),
    "the first block unlike": (lambda width, to: Stage(width, to, (24, 16, 16)), True),
    "a layer on both sides": (lambda width, to: Stage(width, to, ALIKE, front=True), False),
    "no two blocks alike": (lambda width, to: Stage(width, to, (16, 20, 24)), False),
    "something in between": (lambda width, to: Between(width, to, ALIKE), False),
}


def labels(model: nn.Module) -> list[str]:
    layered = Source(model, BATCH, torch.float32).sampled(2, Mesh.of("4:cpu"))
    return [label for label in layered.labels if label.startswith("stages")]


@pytest.mark.parametrize("name", OPENED)
def test_the_blocks_of_a_stage_are_segments(name: str) -> None:
    make, opened = OPENED[name]
    rows = [[f"stages.{s}.blocks.{b}" for b in range(3)] if opened else [] for s in range(3)]
    assert labels(pyramid(make)) == [label for s, row in enumerate(rows) for label in (*row, f"stages.{s}")]


def test_stages_that_do_the_same_are_the_segments() -> None:
    equal = pyramid(lambda width, to: Stage(width, to, ALIKE), widths=(8, 8, 8, 8))
    assert labels(equal) == [f"stages.{s}" for s in range(4)]


def test_equal_blocks_of_a_stage_are_one_class() -> None:
    model = pyramid(OPENED["the first block unlike"][0])
    layered = Source(model, BATCH, torch.float32).sampled(2, Mesh.of("4:cpu"))
    classes = dict(zip(layered.labels, (layered.segments[i].segment_class for i in layered.sequence), strict=True))
    first, second, third = (classes[f"stages.1.blocks.{i}"] for i in range(3))
    assert second == third != first
    assert second != classes["stages.2.blocks.1"]


@pytest.mark.parametrize("settings", [{"pp": 2, "tp": 2}, {"pp": 2, "dp": 2, "recompute": "full"}])
def test_a_program_of_stages_gives_what_one_process_gives(settings: dict[str, object]) -> None:
    model = pyramid(OPENED["a layer behind"][0])
    report = autopart.check(model, "4:cpu", BATCH, global_batch=8, **settings)  # type: ignore[arg-type]
    assert max(report.loss_error, report.gradient_error) < 1e-5, report
