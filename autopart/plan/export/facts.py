"""What exports read off a plan: the blocks of its stages by name, and where its tp sharding is not Megatron-LM's.

Megatron-LM (Shoeybi et al., arXiv 1909.08053, section 3) splits the first of two products by its output features
(letter "n": column-parallel), the second by its input features ("k": row-parallel). The values between two such pairs
are whole on every rank.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from autopart.ir.labels import is_block
from autopart.plan.data import Plan
from autopart.sharding.notation import Strategy


@dataclass(frozen=True)
class Exported:
    """The settings of another system.

    text         the file: TOML, a shell array or JSON; with `differences` and `by_hand` where it may have comments
    differences  where the system would run otherwise than the plan says
    by_hand      settings that the plan does not tell: the system takes them from code or from the model's config
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
"""(pattern of the end of a module's name, letter by which Megatron-LM splits the module's operator; C: not split)."""
TOKEN_EMBEDDING = "(?:.*[.])?(?:" + ROLES[0][0] + ")[.]weight"
"""Pattern of the name of the token embedding's weight."""
WHOLE = "whole on every rank"
PRODUCTS = ("linear", "matmul", "mm", "addmm", "embedding")
NORMS = ("layer_norm", "rms_norm", "autopart.rms_norm", "autopart.layer_norm")


def comments(plan: Plan, system: str, differences: tuple[str, ...], by_hand: tuple[str, ...]) -> list[str]:
    """The lines of comment at the top of a file."""
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
    """[stages][blocks]: the checkpointing mode. The prelude, a stage's first segment, has no mode."""
    found = []
    for stage in plan.stages:
        names = [label for segment in stage.segments for label in segment.labels]
        pairs = zip(reversed(names), reversed(stage.recompute), strict=False)
        found.append([mode for label, mode in pairs if is_block(label)][::-1])
    return found


def families(plan: Plan) -> list[str]:
    """The names of stacks of blocks: "model.layers" for "model.layers.3"."""
    return list(dict.fromkeys(label.rpartition(".")[0] for stage in blocks(plan) for label in stage))


def operators(plan: Plan, axis: str, names: tuple[str, ...]) -> Iterator[tuple[str, str, Strategy]]:
    """(module, operator, strategy along the axis) of all operators of these names, in each of the plan's `splits`."""
    for splits in plan.splits:
        for key, strategy in splits.get(axis, {}).items():
            module, slash, name = key.rpartition("/")
            if slash and name.partition("#")[0] in names:
                yield module, name, strategy


def products(plan: Plan) -> dict[str, Strategy]:
    """Module -> strategy along tp of its product, for products whose weight is a parameter of the module."""
    return {
        module: strategy
        for module, _, strategy in operators(plan, "tp", PRODUCTS)
        if f"{module}.weight" in plan.signature.parameters
    }


def weight_of(plan: Plan, module: str) -> Strategy | None:
    """The strategy of a module's weight along tp; None where the plan has none."""
    return next((w for s in plan.splits if (w := s.get("tp", {}).get(f"{module}.weight")) is not None), None)


def megatron_letter(module: str) -> str:
    """The letter by which Megatron-LM splits a module's operator (ROLES); "" where no pattern matches."""
    return next((letter for names, letter in ROLES if re.fullmatch(rf"(.*\.)?({names})", module)), "")


def tp_differences(plan: Plan) -> list[str]:
    """In words: the operators that the plan splits along tp otherwise than Megatron-LM."""
    found: dict[tuple[str, str], list[str]] = {}
    for module, strategy in products(plan).items():
        here, there = in_words(strategy), megatron_letter(module)
        if here != (f"split by {there}" if there != "C" else WHOLE):
            found.setdefault((here, there), []).append(module)
    return [
        f"{', '.join(modules)}: {here} in the plan, "
        + {"": "and its name does not tell what it is there", "C": f"{WHOLE} there"}.get(
            there, f"split by {there} there"
        )
        for (here, there), modules in found.items()
    ]


def in_words(strategy: Strategy) -> str:
    """A strategy in words."""
    return f"split by {strategy.name}" if strategy.shards_work else WHOLE


def splits_sequence(plan: Plan) -> bool | None:
    """Whether norms split the sequence along tp (sequence parallelism); None where only some of them do."""
    shares = {s.outputs[0].kind == "S" and s.outputs[0].dim == 1 for _, _, s in operators(plan, "tp", NORMS)}
    return shares.pop() if len(shares) == 1 else None if shares else False


def splits_loss(plan: Plan) -> bool:
    """Whether the cross-entropy takes logits that are split along the vocabulary."""
    losses = ("cross_entropy_loss", "autopart.cross_entropy_loss")
    return any(s.name == "v" for _, _, s in operators(plan, "tp", losses))


def common_differences(plan: Plan) -> list[str]:
    """In words: differences from any system that shards all stages alike and splits the batch alone along dp."""
    lines = []
    if len({stage.splits for stage in plan.stages}) > 1:
        splits = ", ".join(str(stage.splits) for stage in plan.stages)
        lines.append(f"stages are split in different ways ({splits}); there, all are split in one")
    data = {key for s in plan.splits for key, w in s.get("dp", {}).items()
            if key in plan.signature.parameters and any(o.kind in "SM" for o in w.outputs)}  # fmt: skip
    if data:
        lines.append(f"along dp, {', '.join(sorted(data))} are split by the plan; there, dp splits the batch alone")
    return lines


def uneven(plan: Plan) -> bool:
    """Whether stages have different numbers of blocks."""
    return len({len(stage) for stage in blocks(plan)}) > 1


def size(plan: Plan, pattern: str) -> tuple[int, ...]:
    """The shape of the first parameter whose name matches the pattern; () where none does."""
    parameters: Mapping[str, tuple[int, ...]] = plan.signature.parameters
    return next((tuple(shape) for name, shape in parameters.items() if re.fullmatch(pattern, name)), ())
