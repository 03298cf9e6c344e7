"""A plan as DeepSpeed's JSON.

Names are those of deepspeed.ai's "DeepSpeed Configuration JSON" page, of the AutoTP chapter of its training manual
(`tensor_parallel`, `partition_config`) and of ``deepspeed/runtime/pipe/module.py``, DeepSpeed 0.19.8
(github.com/deepspeedai/DeepSpeed). Pipelines are not configured but built in code, as a `PipelineModule`.
"""

import json
import re
from typing import Any

from autopart.plan.data import Plan
from autopart.plan.export.facts import (
    Exported,
    blocks,
    common_differences,
    in_words,
    modes,
    operators,
    products,
    splits_loss,
    uneven,
    weight_of,
)
from autopart.sharding.notation import R, Strategy

PRECISIONS = {"float32": "", "bfloat16": "bf16", "float16": "fp16"}
OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW"}
TYPES = {"n": "column", "k": "row"}
"""Letter that splits a product -> AutoTP's partition type."""
HEADS = ("lm_head", "embed_out")
"""Names of modules that AutoTP takes for the head, the product before the loss."""


def deepspeed(plan: Plan) -> Exported:
    """The plan as JSON."""
    differences: list[str] = [*common_differences(plan)]
    by_hand: list[str] = []
    data: dict[str, Any] = {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch // plan.dp,
        "gradient_accumulation_steps": plan.micro_batches,
        "zero_optimization": _zero(plan, differences),
        **_optimizer(plan, by_hand),
        **_precision(plan, differences),
        **_tensor(plan, differences),
        **_recompute(plan, by_hand),
    }
    _pipeline(plan, differences, by_hand)
    return Exported(json.dumps(data, indent=2) + "\n", tuple(differences), tuple(by_hand))


def _zero(plan: Plan, differences: list[str]) -> dict[str, Any]:
    level = plan.zero
    if plan.shard_size:
        differences.append(
            f"ZeRO divides among {plan.shard_size} of dp={plan.dp} ranks; DeepSpeed does so at level 3, by "
            "deepspeed.zero.MiCS_Init (mics_shard_size), not set here"
        )
    if plan.pp > 1 and plan.zero > 1:
        differences.append(f"zero {plan.zero} with a pipeline; DeepSpeed has levels 0 and 1 there, and this says 1")
        level = 1
    if plan.offload == "none":
        return {"stage": level}
    if level == 0:
        differences.append(
            "the optimizer is on the host without ZeRO; DeepSpeed offloads from level 1 on, and this says 1"
        )
    return {"stage": max(level, 1), "offload_optimizer": {"device": "cpu", "pin_memory": True}}


def _optimizer(plan: Plan, by_hand: list[str]) -> dict[str, Any]:
    if plan.optimizer in OPTIMIZERS:
        by_hand.append("the learning rate, in optimizer.params")
        return {"optimizer": {"type": OPTIMIZERS[plan.optimizer], "params": {}}}
    by_hand.append(f"the optimizer, {plan.optimizer}: torch's own, given to deepspeed.initialize")
    return {}


def _precision(plan: Plan, differences: list[str]) -> dict[str, Any]:
    if plan.precision not in PRECISIONS:
        differences.append(f"precision {plan.precision}; DeepSpeed has {', '.join(PRECISIONS)}")
        return {}
    section = PRECISIONS[plan.precision]
    if not section:
        return {}
    if plan.master != "float32":
        states = plan.master or plan.precision
        differences.append(f"all states are {states}; DeepSpeed keeps float32 copies of the parameters too")
        return {section: {"enabled": True}}
    return {section: {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}


def _tensor(plan: Plan, differences: list[str]) -> dict[str, Any]:
    """AutoTP, with the plan's splits of products. AutoTP leaves other operators whole."""
    if plan.tp == 1:
        return {}
    if plan.pp > 1:
        differences.append(f"tp={plan.tp} inside a pipeline; there the layers' own code splits them (an mpu with "
                           "PipeModelDataParallelTopology), so tensor_parallel is left out")  # fmt: skip
        return {}
    specs: dict[str, dict[str, Any]] = {}
    doubts: dict[str, list[str]] = {}
    for module, strategy in products(plan).items():
        spec, doubt = _spec(module, strategy, weight_of(plan, module))
        if spec["partition_type"] == "column" and _is_head(module) and not splits_loss(plan):
            spec["gather_output"] = True
        if specs.setdefault(spec["patterns"][0], spec) != spec:
            doubt = "other blocks' module of that name is split otherwise, and AutoTP splits both as the first"
        if doubt:
            doubts.setdefault(doubt, []).append(module)
    differences += [f"{', '.join(modules)}: {doubt}" for doubt, modules in doubts.items()]
    config = {"use_default_specs": False, "layer_specs": list(specs.values())}
    head = {"vocab_parallel_lm_head": True} if _splits_head(plan, differences) else {}
    return {"tensor_parallel": {"autotp_size": plan.tp, **head, "partition_config": config}}


def _is_head(module: str) -> bool:
    return module.rpartition(".")[2] in HEADS


def _splits_head(plan: Plan, differences: list[str]) -> bool:
    """Whether to set `vocab_parallel_lm_head`: the plan's cross-entropy takes logits split along the vocabulary."""
    if not splits_loss(plan):
        return False
    heads = [module for module, _, _ in operators(plan, "tp", ("linear",)) if _is_head(module)]
    if not heads:
        differences.append(f"the loss is taken of split logits; AutoTP does so behind {' or '.join(HEADS)} alone")
    elif f"{heads[0]}.weight" not in plan.signature.parameters:
        differences.append("the embedding of words shares its weight with the head; AutoTP splits both by words")
    return bool(heads)


def _spec(module: str, strategy: Strategy, weight: Strategy | None) -> tuple[dict[str, Any], str]:
    """AutoTP's spec of one weight in all blocks; in words, where AutoTP splits otherwise than the plan. A fused weight,
    such as that of q, k and v, is split part by part."""
    pattern = r"(.*\.)?" + re.sub(r"(?<=\\.)\d+(?=\\.)", r"\\d+", re.escape(f"{module}.weight")) + "$"
    kind = TYPES.get(strategy.split, "skip")
    spec: dict[str, Any] = {"patterns": [pattern], "partition_type": kind}
    if kind == "skip":
        return spec, f"{in_words(strategy)} in the plan; AutoTP leaves it whole" if strategy.shards_work else ""
    placement = weight.outputs[0] if weight is not None else R
    if placement.kind != "S":
        return spec, "the weight is whole where its product is split; AutoTP splits the weight"
    if placement.dim != (kind == "row"):
        return spec, "the weight is stored transposed; AutoTP's columns and rows are those of nn.Linear"
    if placement.parts:
        sizes = len(placement.parts) if len(set(placement.parts)) == 1 else list(placement.parts)
        spec |= {"shape": [sizes, -1], "partition_dim": placement.dim}
    return spec, ""


def _recompute(plan: Plan, by_hand: list[str]) -> dict[str, Any]:
    if plan.recompute == "none":
        return {}
    told = {
        "full": "of every block: gradient_checkpointing_enable(), or PipelineModule(activation_checkpoint_interval=1)",
        "selective": "of all but products: torch.utils.checkpoint with a policy that keeps the outputs of products",
        "mincut": "of all but a minimum cut: torch.utils.checkpoint with a policy that keeps the values of the cut",
        "mixed": "block by block: " + "; ".join(",".join(stage) for stage in modes(plan)),
    }
    by_hand.append(f"recompute {told[plan.recompute]}; activation_checkpointing only says how")
    return {"activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False}}


def _pipeline(plan: Plan, differences: list[str], by_hand: list[str]) -> None:
    if plan.pp == 1:
        return
    if plan.schedule != "1f1b":
        differences.append(f"schedule {plan.schedule}; DeepSpeed's pipelines run one forward, one backward (1f1b)")
    numbers = ", ".join(str(len(stage)) for stage in blocks(plan))
    by_hand.append(f'PipelineModule(layers, num_stages={plan.pp}, partition_method="type:CLASS"), CLASS being the '
                   f"blocks' class")  # fmt: skip
    if uneven(plan):
        differences.append(
            f"stages of {numbers} blocks; partition_method balances by uniform, parameters or type:CLASS"
        )
