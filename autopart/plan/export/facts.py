"""What exports need to know of a plan: its stages' blocks by name, and where its shardings leave the usual scheme.

The usual scheme is Megatron's. Of two products in a row, the first is split by its output features ("n", columns of the
weight), the second by its input features ("k", rows). Between such pairs values are whole on every rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from autopart.ir.labels import is_block
from autopart.plan.data import Plan
from autopart.sharding.notation import Strategy


@dataclass(frozen=True)
class Exported:
    """Another system's settings.

    text         of the file: TOML, a shell array or JSON; a format with comments has the differences and by_hand in it
    differences  what the plan says and the system would do otherwise
    by_hand      what the system takes from elsewhere: from code, or from the model's own settings
    """

    text: str
    differences: tuple[str, ...]
    by_hand: tuple[str, ...]


ROLES = (
    (r"(embed_tokens|wte|word_embeddings?|tok_embeddings|embed_in|shared)", "v"),
    (r"([qkv]|qkv|gate|up|gate_up|in)_proj|query|key|value|query_key_value|c_attn|c_fc|fc1|fc_in|w[13qkv]|Wqkv", "n"),
    (r"dense_h_to_4h|intermediate\.dense|lin1|[qkv]_lin|wi(_[01])?|lm_head|embed_out|\w+Attention\.[qkv]", "n"),
    (r"(o|out|down)_proj|c_proj|fc2|fc_out|w2|wo|dense_4h_to_h|(output|attention)\.dense", "k"),
    (r"out_lin|lin2|\w+Attention\.o", "k"),
    (r"wpe|embed_positions|position_embeddings|token_type_embeddings", "C"),
)  # fmt: skip
"""The end of a module's name, and the letter by which the usual scheme splits its operator; C where it is whole."""
WORDS = "(?:.*[.])?(?:" + ROLES[0][0] + ")[.]weight"
"""Names of the embedding of words."""
WHOLE = "whole on every rank"
PRODUCTS = ("linear", "matmul", "mm", "addmm", "embedding")
NORMS = ("layer_norm", "rms_norm", "autopart.rms_norm", "autopart.layer_norm")


def comments(plan: Plan, system: str, differences: tuple[str, ...], by_hand: tuple[str, ...]) -> list[str]:
    """The comments at the top of a file."""
    return [
        f"# autopart: {plan.model} on {plan.mesh}, {plan.degrees}, for {system}",
        *(f"# differs: {line}" for line in differences),
        *(f"# by hand: {line}" for line in by_hand),
    ]


def sequence(plan: Plan) -> int | None:
    """Tokens of a sample; None where the inputs have none."""
    return next((shape[1] for shape in plan.signature.inputs.values() if len(shape) == 2), None)


def labels(plan: Plan) -> list[list[str]]:
    """The labels of every stage's segments."""
    return [[label for segment in stage.segments for label in segment.labels if label] for stage in plan.stages]


def blocks(plan: Plan) -> list[list[str]]:
    """The numbered blocks of every stage."""
    return [[label for label in stage if is_block(label)] for stage in labels(plan)]


def modes(plan: Plan) -> list[list[str]]:
    """What every block of every stage saves for backward. Segments that a stage computes once, in front, have no
    mode."""
    found = []
    for stage in plan.stages:
        names = [label for segment in stage.segments for label in segment.labels]
        pairs = zip(reversed(names), reversed(stage.recompute), strict=False)
        found.append([mode for label, mode in pairs if is_block(label)][::-1])
    return found


def families(plan: Plan) -> list[str]:
    """The names of the numbered blocks without their number: one name for a single stack of blocks."""
    return list(dict.fromkeys(label.rpartition(".")[0] for stage in blocks(plan) for label in stage))


def operators(plan: Plan, axis: str, names: tuple[str, ...]) -> Iterator[tuple[str, str, Strategy]]:
    """The operators of these names along an axis, with their module and strategy, for every way stages are split."""
    for splits in plan.splits:
        for key, strategy in splits.get(axis, {}).items():
            module, slash, name = key.rpartition("/")
            if slash and name.partition("#")[0] in names:
                yield module, name, strategy


def products(plan: Plan) -> dict[str, Strategy]:
    """The operators with a weight of their own, by module, with their strategy along tp."""
    return {
        module: strategy
        for module, _, strategy in operators(plan, "tp", PRODUCTS)
        if f"{module}.weight" in plan.signature.parameters
    }


def weight_of(plan: Plan, module: str) -> Strategy | None:
    """How a module's weight is laid out along tp."""
    return next((w for s in plan.splits if (w := s.get("tp", {}).get(f"{module}.weight")) is not None), None)


def usual(module: str) -> str:
    """The letter by which the usual scheme splits a module's operator; "" where the name does not tell."""
    return next((letter for names, letter in ROLES if re.fullmatch(rf"(.*\.)?({names})", module)), "")


def otherwise(plan: Plan) -> list[str]:
    """The operators that are split along tp in another way than the usual scheme, in words."""
    found: dict[tuple[str, str], list[str]] = {}
    for module, strategy in products(plan).items():
        here, there = said(strategy), usual(module)
        if here != (f"split by {there}" if there != "C" else WHOLE):
            found.setdefault((here, there), []).append(module)
    return [
        f"{', '.join(modules)}: {here} in the plan, "
        + {"": "and its name does not tell what it is there", "C": f"{WHOLE} there"}.get(
            there, f"split by {there} there"
        )
        for (here, there), modules in found.items()
    ]


def said(strategy: Strategy) -> str:
    """A strategy in words."""
    return f"split by {strategy.name}" if strategy.shards_work else WHOLE


def splits_sequence(plan: Plan) -> bool | None:
    """Whether each norm along tp works on a part of the sequence; None where only some do."""
    shares = {s.outputs[0].kind == "S" and s.outputs[0].dim == 1 for _, _, s in operators(plan, "tp", NORMS)}
    return shares.pop() if len(shares) == 1 else None if shares else False


def splits_loss(plan: Plan) -> bool:
    """Whether the loss is computed from logits that are split along the vocabulary."""
    losses = ("cross_entropy_loss", "autopart.cross_entropy_loss")
    return any(s.name == "v" for _, _, s in operators(plan, "tp", losses))


def everywhere(plan: Plan) -> list[str]:
    """Differences from every system that treats all stages, and data parallelism, alike."""
    lines = []
    if len({stage.splits for stage in plan.stages}) > 1:
        ways = ", ".join(str(stage.splits) for stage in plan.stages)
        lines.append(f"stages are split in different ways ({ways}); there, all are split in one")
    data = {key for s in plan.splits for key, w in s.get("dp", {}).items()
            if key in plan.signature.parameters and any(o.kind in "SM" for o in w.outputs)}  # fmt: skip
    if data:
        lines.append(f"along dp, {', '.join(sorted(data))} are split by the plan; there, dp splits the batch alone")
    return lines


def uneven(plan: Plan) -> bool:
    """Whether stages have different numbers of blocks."""
    return len({len(stage) for stage in blocks(plan)}) > 1


def size(plan: Plan, pattern: str) -> tuple[int, ...]:
    """The shape of the first parameter whose name has the pattern; () where none has."""
    parameters: Mapping[str, tuple[int, ...]] = plan.signature.parameters
    return next((tuple(shape) for name, shape in parameters.items() if re.fullmatch(pattern, name)), ())
