"""Repeated blocks of a stage: found by structure, to be written once."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from autopart.graph import info
from autopart.stages import OWNED, Named, StageGraph


@dataclass(frozen=True)
class Block:
    """Runs of a stage that are the same program: their labels, nodes, and the values from outside."""

    name: str
    labels: tuple[str, ...]
    runs: tuple[tuple[fx.Node, ...], ...]
    outside: tuple[tuple[fx.Node, ...], ...]
    outputs: tuple[tuple[fx.Node, ...], ...]


def plural(label: str) -> str:
    return re.sub(r"\W", "_", label.rpartition(".")[0]) or "layers"


def find_blocks(stage: StageGraph, least: int, classes: Mapping[str, str]) -> list[Block]:
    """Consecutive numbered runs that are the same program, `least` or more, each with weights of its own."""
    groups: list[list[tuple[str, list[fx.Node]]]] = []
    previous: Any = None
    users = Counter(weight for _, nodes in stage.runs for weight in _weights(nodes))
    for label, nodes in stage.runs:
        alone = all(users[weight] == 1 for weight in _weights(nodes)) and not any(map(_counts_valid, nodes))
        signature = _program(label, nodes) if alone and re.search(r"\.\d+$", label) else None
        if signature is not None and signature == previous:
            groups[-1].append((label, nodes))
        elif signature is not None:
            groups.append([(label, nodes)])
        previous = signature
    blocks: list[Block] = []
    counts: Counter[str] = Counter()
    for group in groups:
        stem = plural(group[0][0])
        if len(group) < least:
            continue
        counts[stem] += 1
        if counts[stem] > 1:
            continue
        name = _class_name(classes.get(group[0][0], "Layer"), {b.name for b in blocks})
        outside: list[tuple[fx.Node, ...]] = []
        outputs: list[tuple[fx.Node, ...]] = []
        for _, nodes in group:
            inside = set(nodes)
            outside.append(
                tuple(
                    dict.fromkeys(
                        n
                        for node in nodes
                        for n in node.all_input_nodes
                        if n not in inside and info(n).kind not in OWNED
                    )
                )
            )
            outputs.append(tuple(n for n in nodes if any(u not in inside for u in n.users)))
        blocks.append(
            Block(name, tuple(g[0] for g in group), tuple(tuple(g[1]) for g in group), tuple(outside), tuple(outputs))
        )
    return blocks


def _counts_valid(node: fx.Node) -> bool:
    """Whether the node reads how many targets count, which the stage knows and its blocks do not."""
    return info(node).name in ("runtime.mean_cross_entropy", "runtime.vocab_cross_entropy")


def _weights(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    return {n for node in nodes for n in node.all_input_nodes if info(n).kind == "parameter"}


def _class_name(wanted: str, taken: set[str]) -> str:
    """The user's class name; numbered where two kinds of block go by one."""
    names = itertools.chain([wanted], (f"{wanted}{i}" for i in itertools.count(2)))
    return next(name for name in names if name not in {*taken, "Stage"})


def _program(label: str, nodes: Sequence[fx.Node]) -> tuple[Any, ...]:
    """What a run does, without its names."""
    local = {n: i for i, n in enumerate(nodes)}
    others: dict[fx.Node, int] = {}

    def token(node: fx.Node) -> str:
        if node in local:
            return f"%{local[node]}"
        record = info(node)
        if record.kind in OWNED:
            return f"{record.name.removeprefix(label)} {record.placed} {record.whole} {record.dtypes} {record.grad}"
        return f"${others.setdefault(node, len(others))}"

    lines = []
    for node in nodes:
        plain = fx.map_arg((node.args, node.kwargs), lambda n: Named(token(n)))
        used_outside = any(u not in local for u in node.users)
        lines.append((info(node).name, repr(plain), info(node).shapes, used_outside))
    return tuple(lines)
