"""The numbered blocks of a stage that are written as classes. Blocks with equal programs share a class."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from autopart.ir.graph import info
from autopart.passes.checkpoint_cut import CheckpointCut
from autopart.passes.codegen.scope import RESERVED, Scope, free_name
from autopart.passes.stage_graph import OWNED, Named, StageGraph


@dataclass(frozen=True)
class Block:
    """A segment of a stage that is written as the call of a module.

    kind       name of the class, which blocks with equal programs share
    label      path of the module in the model
    recompute  checkpointing mode, one of `liveness.MODES`
    nodes      of the segment, in order
    outside    values that the block takes, among them weights that other segments read too
    outputs    values that the block gives
    cut        the saved and the recomputed nodes, where the mode saves results; equal for all blocks of a class
    """

    kind: str
    label: str
    recompute: str
    nodes: tuple[fx.Node, ...]
    outside: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    cut: CheckpointCut | None = None

    @property
    def path(self) -> str:
        """The path of the list that the block is in: ``model.layers`` for ``model.layers.3``."""
        return self.label.rpartition(".")[0]


@dataclass(frozen=True)
class BlockList:
    """The blocks of a stage that are in one list of the model.

    attribute  of the stage that holds their modules, such as ``model_layers``
    table      global name of their paths in the model, such as ``MODEL_LAYERS``
    members    the blocks, in order
    """

    attribute: str
    table: str
    members: tuple[Block, ...]


def find_lists(blocks: Mapping[int, Block], scope: Scope) -> dict[str, BlockList]:
    """Path of a list of the model -> its blocks. `scope`: of the stage that holds them."""
    members: dict[str, list[Block]] = {}
    for block in blocks.values():
        members.setdefault(block.path, []).append(block)
    lists: dict[str, BlockList] = {}
    taken = {*RESERVED, *(block.kind for block in blocks.values())}
    for path, mine in members.items():
        attribute = scope.attribute(path)
        table = free_name(attribute.upper(), taken)
        taken.add(table)
        lists[path] = BlockList(attribute, table, tuple(mine))
    return lists


def find_blocks(
    stage: StageGraph,
    modes: Sequence[str],
    cuts: Mapping[int, CheckpointCut],
    sliced: bool,
    classes: Mapping[str, str],
) -> dict[int, Block]:
    """Index of a segment -> its block.

    modes    checkpointing mode of every segment
    cuts     as in `emit`
    sliced   whether weights lie in slices over dp (ZeRO 3)
    classes  path of a module of the model -> name of its class

    A numbered segment is a block if another segment has an equal program, if the segment is recomputed, or if it
    gathers weights from slices. A class that saves results of a recomputed block also stands for blocks with an equal
    program that are not recomputed.
    """
    users = Counter(weight for _, nodes in stage.segments for weight in _weights(nodes))
    shared = {weight for weight, count in users.items() if count > 1}
    programs = {
        index: _program(label, nodes, shared)
        for index, (label, nodes) in enumerate(stage.segments)
        if re.search(r"\.\d+$", label) and not any(map(_counts_valid, nodes))
    }
    times = Counter(programs.values())
    saved = {i: tuple(k for k, n in enumerate(stage.segments[i][1]) if n in cut.saved) for i, cut in cuts.items()}
    variants = {program: saved[index] for index, program in reversed(programs.items()) if index in saved}
    kinds: dict[Any, str] = {}
    blocks: dict[int, Block] = {}
    for index, program in programs.items():
        label, nodes = stage.segments[index]
        gathers = sliced and bool(_weights(nodes) - shared)
        if times[program] < 2 and modes[index] == "none" and not gathers:
            continue
        variant = program, variants.get(program, ()) if modes[index] == "none" else saved.get(index, ())
        if variant not in kinds:
            kinds[variant] = free_name(classes.get(label, "Layer"), {*kinds.values(), *RESERVED, "Stage"}, "")
        inside = set(nodes)
        outside = tuple(
            dict.fromkeys(
                n
                for node in nodes
                for n in node.all_input_nodes
                if n not in inside and (n in shared or info(n).kind not in OWNED)
            )
        )
        outputs = tuple(n for n in nodes if any(u not in inside for u in n.users))
        blocks[index] = Block(kinds[variant], label, modes[index], tuple(nodes), outside, outputs, cuts.get(index))
    return blocks


def loops(blocks: Mapping[int, Block]) -> list[list[int]]:
    """The blocks in rows, as indices of their segments.

    The blocks of a row are neighbours in one list, with one checkpointing mode and with equal numbers of inputs and of
    outputs.
    """
    rows: list[list[int]] = []
    for index, block in blocks.items():
        before = blocks.get(index - 1)
        alike = before is not None and (
            (before.path, before.recompute, len(before.outside), len(before.outputs))
            == (block.path, block.recompute, len(block.outside), len(block.outputs))
        )
        if alike:
            rows[-1].append(index)
        else:
            rows.append([index])
    return rows


LOSSES = ("mean_cross_entropy", "vocab_cross_entropy", "mean_linear_loss", "vocab_linear_loss")
"""Functions of `autopart.runtime` that divide by the number of valid targets."""


def _counts_valid(node: fx.Node) -> bool:
    """Whether the node divides by the number of valid targets, which only the stage's module has."""
    return info(node).name.removeprefix("runtime.") in LOSSES


def _weights(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    return {n for node in nodes for n in node.all_input_nodes if info(n).kind == "parameter"}


def _program(label: str, nodes: Sequence[fx.Node], shared: set[fx.Node]) -> tuple[Any, ...]:
    """What a segment computes, with local numbers in place of names. One class can stand for equal programs."""
    local = {n: i for i, n in enumerate(nodes)}
    others: dict[fx.Node, int] = {}

    def token(node: fx.Node) -> str:
        if node in local:
            return f"%{local[node]}"
        record = info(node)
        if record.kind in OWNED and node not in shared:
            return f"{record.name.removeprefix(label)} {record.placed} {record.whole} {record.dtypes} {record.grad}"
        return f"${others.setdefault(node, len(others))}"

    lines = []
    for node in nodes:
        plain = fx.map_arg((node.args, node.kwargs), lambda n: Named(token(n)))
        used_outside = any(u not in local for u in node.users)
        lines.append((info(node).name, repr(plain), info(node).shapes, used_outside))
    return tuple(lines)
