"""What the functions behind `emit` share while they write the module of one stage."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from autopart.ir.graph import info
from autopart.passes.codegen.spelling import Printer
from autopart.passes.stage_graph import StageGraph


@dataclass(frozen=True)
class EmitSettings:
    """What the modules of all stages of a plan have in common.

    title    name of the model's class
    mesh     the mesh as text, ``"mesh(pp=2, dp=1, tp=2)"``
    stages   number of stages
    sliced   whether a rank holds only a slice of every weight that dp does not split (ZeRO 3)
    master   dtype of the slices, where it is wider than that of the weights; else None
    classes  path of a module of the model -> name of its class
    """

    title: str
    mesh: str
    stages: int
    sliced: bool
    master: str | None
    classes: Mapping[str, str]


@dataclass
class StageModule:
    """The module of one stage while it is written.

    printer  writes expressions, and collects the functions of `autopart.runtime` that these call
    """

    stage: StageGraph
    settings: EmitSettings
    printer: Printer = field(init=False)

    def __post_init__(self) -> None:
        self.printer = Printer(set(re.findall(r"(\w+)=", self.settings.mesh)))

    def is_sliced(self, node: fx.Node) -> bool:
        """Whether a rank holds only a slice of this weight."""
        record = info(node)
        return self.settings.sliced and record.kind == "parameter" and record.grad and ("dp", "C") in record.placed
