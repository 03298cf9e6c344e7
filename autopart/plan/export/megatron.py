"""A plan as Megatron-LM's arguments, in a shell array.

Names are those of ``megatron/training/arguments.py`` and of ``megatron/core``'s `ModelParallelConfig` and
`PipelineParallelLayerLayout`, Megatron Core 0.16 (github.com/NVIDIA/Megatron-LM), whose command line has a flag for
every field; the sharding strategies are those of its Parallelism Strategies Guide.
"""

import shlex
from collections.abc import Iterator
from itertools import takewhile

from autopart.plan.data import Plan
from autopart.plan.export.facts import (
    TOKEN_EMBEDDING,
    Exported,
    blocks,
    comments,
    common_differences,
    families,
    modes,
    sequence,
    size,
    splits_sequence,
    tp_differences,
    uneven,
)

Flags = Iterator[tuple[str, ...]]

PRECISIONS: dict[str, tuple[str, ...]] = {"float32": (), "bfloat16": ("--bf16",), "float16": ("--fp16",)}
OPTIMIZERS = {"adam": "adam", "adamw": "adam", "sgd": "sgd", "momentum": "sgd"}
FSDP_STRATEGIES = {2: "optim_grads", 3: "optim_grads_params"}
"""ZeRO level -> `--data-parallel-sharding-strategy` of Megatron's FSDP. Level 1 is the distributed optimizer."""
FFN = r".*\.(?:up_proj|gate_proj|c_fc|fc1|dense_h_to_4h|intermediate\.dense)\.weight"
POSITION_EMBEDDING = r"(?:.*\.)?(?:wpe|embed_positions|position_embeddings)\.weight"
HEAD = r"(?:.*\.)?(?:lm_head|embed_out)\.weight"


FULL = (("--recompute-granularity", "full"), ("--recompute-method", "uniform"), ("--recompute-num-layers", "1"))


def megatron(plan: Plan) -> Exported:
    """The plan as the shell array MEGATRON_ARGS."""
    differences = [*common_differences(plan)]
    by_hand = ["--num-attention-heads (and --group-query-attention --num-query-groups), which shapes do not tell",
               "the data, the tokenizer and the learning rate"]  # fmt: skip
    flags = [
        *_model(plan, by_hand),
        *_degrees(plan, differences),
        *_batch(plan, by_hand),
        *_pipeline(plan, differences),
        *_recompute(plan, differences),
        *_training(plan, differences),
    ]
    notes = tuple(differences), tuple(by_hand)
    lines = [*comments(plan, "Megatron-LM", *notes), "MEGATRON_ARGS=(", *(f"    {shlex.join(f)}" for f in flags), ")"]
    return Exported("\n".join(lines) + "\n", *notes)


def _model(plan: Plan, by_hand: list[str]) -> Flags:
    """The sizes of the model that the shapes of its parameters tell."""
    if len(families(plan)) == 1:
        yield "--num-layers", str(sum(map(len, blocks(plan))))
    else:
        by_hand.append("the numbers of layers: the model is not one stack of numbered blocks")
    words, wide, learned = (size(plan, pattern) for pattern in (TOKEN_EMBEDDING, FFN, POSITION_EMBEDDING))
    if len(words) != 2:
        by_hand.append("--hidden-size, --ffn-hidden-size and --vocab-size: no embedding of words was found")
        return
    vocabulary, hidden = words
    yield "--hidden-size", str(hidden)
    yield "--vocab-size", str(vocabulary)
    if len(wide) == 2:
        yield "--ffn-hidden-size", str(wide[0] if wide[1] == hidden else wide[1])
    longest = learned[0] if learned else sequence(plan)
    yield "--position-embedding-type", "learned_absolute" if learned else "rope"
    if longest is not None:
        yield "--max-position-embeddings", str(longest)
    if size(plan, HEAD):
        yield ("--untie-embeddings-and-output-weights",)
    if size(plan, r".*\.gate_proj\.weight"):
        yield ("--swiglu",)
    if not size(plan, FFN.replace("weight", "bias")):
        yield ("--disable-bias-linear",)
    by_hand.append("--normalization and the activation, unless they are Megatron's defaults")


def _degrees(plan: Plan, differences: list[str]) -> Flags:
    yield "--tensor-model-parallel-size", str(plan.tp)
    yield "--pipeline-model-parallel-size", str(plan.pp)
    if plan.tp > 1:
        differences += tp_differences(plan)
        shared = splits_sequence(plan)
        if shared:
            yield ("--sequence-parallel",)
        elif shared is None:
            differences.append("some norms work on a share of the sequence; --sequence-parallel is all or nothing")
    if plan.offload != "none":
        differences.append("the optimizer's states are on the host; Megatron has --optimizer-cpu-offload, not set here")
    if plan.dp > 1 and plan.zero == 1:
        yield ("--use-distributed-optimizer",)
        if plan.shard_size:
            yield "--num-distributed-optimizer-instances", str(plan.dp // plan.shard_size)
    elif plan.dp > 1 and plan.zero in FSDP_STRATEGIES:
        yield ("--use-megatron-fsdp",)
        yield "--data-parallel-sharding-strategy", FSDP_STRATEGIES[plan.zero]
        if plan.shard_size:
            yield "--num-distributed-optimizer-instances", str(plan.dp // plan.shard_size)
            yield "--outer-dp-sharding-strategy", "no_shard"


def _batch(plan: Plan, by_hand: list[str]) -> Flags:
    yield "--micro-batch-size", str(plan.micro_batch // plan.dp)
    yield "--global-batch-size", str(plan.global_batch)
    tokens = sequence(plan)
    if tokens is None:
        by_hand.append("--seq-length: the plan's inputs are no tokens")
    else:
        yield "--seq-length", str(tokens)


def _pipeline(plan: Plan, differences: list[str]) -> Flags:
    if plan.pp == 1:
        return
    if plan.schedule != "1f1b":
        differences.append(f"schedule {plan.schedule}; Megatron runs one forward, one backward (1f1b)")
    if len(families(plan)) != 1:
        differences.append(
            f"blocks are in several stacks ({', '.join(families(plan)) or 'none is numbered'}); Megatron places one"
        )
    elif uneven(plan):
        yield "--pipeline-model-parallel-layout", _layout(plan)


def _layout(plan: Plan) -> str:
    """`--pipeline-model-parallel-layout`: stages between bars; E is the embedding, t a block, L the loss."""
    stages = ["t" * len(stage) for stage in blocks(plan)]
    return f"E{'|'.join(stages)}L"


def _recompute(plan: Plan, differences: list[str]) -> Flags:
    if plan.recompute == "none":
        return
    if plan.recompute in ("selective", "mincut"):
        saved = {"selective": "the outputs of products", "mincut": "the values of a minimum cut"}[plan.recompute]
        differences.append(f"recompute of all but {saved}; Megatron recomputes attention alone")
        yield "--recompute-granularity", "selective"
        return
    flags = FULL if plan.recompute == "full" else _first(plan)
    if not flags:
        differences.append(
            "recompute differs from block to block; Megatron recomputes the first blocks of every stage, as many in "
            "each, or all: this recomputes all"
        )
    yield from flags or FULL


def _first(plan: Plan) -> tuple[tuple[str, str], ...]:
    """Flags that recompute the first n blocks of every stage; () where the plan recomputes others."""
    counts = {sum(1 for _ in takewhile(lambda mode: mode == "full", stage)) for stage in modes(plan)}
    others = {mode for stage in modes(plan) for mode in stage[min(counts) :]}
    if len(counts) > 1 or others - {"none"}:
        return ()
    count = str(counts.pop())
    return (("--recompute-granularity", "full"), ("--recompute-method", "block"), ("--recompute-num-layers", count))


def _training(plan: Plan, differences: list[str]) -> Flags:
    if plan.precision in PRECISIONS:
        yield from ((flag,) for flag in PRECISIONS[plan.precision])
    else:
        differences.append(f"precision {plan.precision}; Megatron has {', '.join(PRECISIONS)}")
    if plan.precision in ("bfloat16", "float16") and plan.master != "float32":
        differences.append(
            f"all states are {plan.master or plan.precision}; Megatron keeps float32 copies of parameters and gradients"
        )
    if plan.precision == "float16" and plan.master:
        yield ("--accumulate-allreduce-grads-in-fp32",)
    if plan.optimizer in OPTIMIZERS:
        yield "--optimizer", OPTIMIZERS[plan.optimizer]
    else:
        differences.append(f"optimizer {plan.optimizer}; Megatron has adam and sgd")
    if plan.optimizer in ("sgd", "momentum"):
        yield "--sgd-momentum", "0.0" if plan.optimizer == "sgd" else "0.9"
