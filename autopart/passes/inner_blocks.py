"""Which numbered modules inside of numbered modules are blocks of their own.

A block is the outermost numbered module, as "model.layers.3": what is numbered inside of it, such as experts, is part
of it. A pyramid of images has numbered stages of numbered blocks instead, as "encoder.stages.1.layers.3". Its stages
have other widths each, so that no two of them are of one class; the blocks of one stage are. There the inner modules
are the blocks, so that the equal ones are planned once.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import groupby

from torch import fx

from autopart.ir.graph import calls, info, update_info


def inner_blocks(graph: fx.Graph) -> None:
    """Give the nodes of every block inside of a stage the block's label, in place of the stage's.

    A list of numbered modules is one of stages if no two of its modules do the same. A stage is a row of blocks where
    the modules of one list inside of it run one after the other, with nothing in between, and two of them do the same.
    What the stage does before its blocks, or behind them, keeps the stage's label.
    """
    nodes: dict[str, list[fx.Node]] = defaultdict(list)
    for node in calls(graph):
        nodes[info(node).layer].append(node)
    lists: dict[str, list[str]] = defaultdict(list)
    for label in filter(None, nodes):
        lists[label.rpartition(".")[0]].append(label)
    stages = [label for labels in lists.values() if _unlike([nodes[label] for label in labels]) for label in labels]
    blocks = {block for stage in stages for block in _row(stage, nodes[stage])}
    for node in graph.nodes if blocks else ():
        if node.op != "output":
            record = info(node)
            path = record.module if record.kind == "op" else record.name
            inner = _inner(path, record.layer)
            if inner in blocks:
                update_info(node, layer=inner)


def _inner(path: str, label: str) -> str:
    """The outermost numbered module of a path inside of the module of this label; "" where there is none."""
    found = re.match(rf"{re.escape(label)}\.(?:.*?\.)??\d+(?=\.|$)", path) if label else None
    return found[0] if found else ""


def _unlike(bodies: Sequence[Sequence[fx.Node]]) -> bool:
    """Whether no two lists of nodes have the same operators on the same shapes."""
    return len({tuple((info(n).name, info(n).shapes) for n in nodes) for nodes in bodies}) == len(bodies)


def _row(stage: str, nodes: Sequence[fx.Node]) -> list[str]:
    """The labels of the blocks that a stage is a row of; [] where it is none."""
    inner = [_inner(info(node).module, stage) for node in nodes]
    sizes = Counter(label.rpartition(".")[0] for label in inner if label)
    if not sizes:
        return []
    stem = max(sizes, key=sizes.__getitem__)
    labelled = zip((label if label.rpartition(".")[0] == stem else "" for label in inner), nodes, strict=True)
    runs = [(label, [node for _, node in run]) for label, run in groupby(labelled, key=lambda pair: pair[0])]
    labels = [label for label, _ in runs]
    row = [(label, run) for label, run in runs if label]
    once = len(set(labels)) == len(labels) and "" not in labels[1:-1]
    return [label for label, _ in row] if once and not _unlike([run for _, run in row]) else []
