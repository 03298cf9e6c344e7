"""fx.Graph a stage -> source text: one readable Python module per stage.

Every line is one value. Views and scalars are folded into the line that uses them. A comment behind a line says how it
is split, which collective it is, and the user's line that it is from. Equal blocks are written once, as a class, and
called in a loop.
"""

import re
from collections.abc import Mapping, Sequence

from autopart.kernels.table import KERNELS
from autopart.passes.checkpoint_cut import CheckpointCut
from autopart.passes.codegen.block_class import block_class
from autopart.passes.codegen.blocks import Block, find_blocks
from autopart.passes.codegen.module import EmitSettings, StageModule
from autopart.passes.codegen.stage_class import stage_class
from autopart.passes.stage_graph import StageGraph

WIDER_SLICES = [
    "Slices are kept in a dtype wider than the one that the model computes in (used=), and the gradients there too.",
]
SLICED = [
    "Of a weight_slice a rank keeps one of dp equal parts. gathered(...) is the whole while it is used, and again in",
    "backward, which leaves to each rank the summed gradient of its part.",
]


def emit(stage: StageGraph, modes: Sequence[str], cuts: Mapping[int, CheckpointCut], settings: EmitSettings) -> str:
    """The source of one stage's module. `modes` has the mode of every segment, of `liveness.MODES`; `cuts` has the
    cut of each segment that is recomputed and saves results, by its index."""
    module = StageModule(stage, settings)
    blocks = find_blocks(stage, modes, cuts, settings.sliced, settings.classes)
    kinds: dict[str, list[Block]] = {}
    for block in blocks.values():
        kinds.setdefault(block.kind, []).append(block)
    classes = [line for alike in kinds.values() for line in ["", "", *block_class(module, alike)]]
    body = stage_class(module, blocks)
    return _without_unused_imports("\n".join([*_header(module), *classes, "", "", *body]) + "\n")


def _header(module: StageModule) -> list[str]:
    """The docstring and the imports of the module, known once all its lines are written."""
    settings, used = module.settings, module.printer.used
    place = f"stage {module.stage.index} of {settings.stages} on {settings.mesh}"
    sliced = "weight_slice" in used
    return [
        f'"""{settings.title}, {place}. Written by autopart.',
        "",
        "Placements of a weight along an axis: S0 split along dim 0; R whole, with whole gradients; C whole, with",
        "gradients that the runtime sums over the axis at the end of a step.",
        *(SLICED if sliced else []),
        *(WIDER_SLICES if sliced and settings.master else []),
        '"""',
        "",
        "import torch",
        "from torch import nn",
        "from torch.nn import functional as F",
        "",
        *_kernel_imports(used),
        "from autopart.runtime import " + ", ".join(sorted({"Groups", *used} - KERNELS.keys())),
    ]


def _kernel_imports(used: set[str]) -> list[str]:
    modules: dict[str, list[str]] = {}
    for name in sorted(used & KERNELS.keys()):
        modules.setdefault(KERNELS[name].function.__module__, []).append(name)
    return [f"from {module} import {', '.join(names)}" for module, names in sorted(modules.items())]


def _without_unused_imports(text: str) -> str:
    code = text.replace("from torch.nn", "").replace("import torch", "")
    for line, alias in (("import torch\n", "torch."), ("from torch.nn import functional as F\n", "F.")):
        if not re.search(rf"(?<![\w.]){re.escape(alias)}", code):
            text = text.replace(line, "")
    return text
