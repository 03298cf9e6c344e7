"""A plan as torchtitan's TOML.

Names are those of ``torchtitan/config/job_config.py``, torchtitan 0.2.2 (github.com/pytorch/torchtitan), the last that
reads TOML. Version 0.3 is configured in Python, under the same names; since then `pipeline_parallel_microbatch_size`
became `num_pp_microbatches`, and `module_fqns_per_model_part` became `pipeline_parallel_module_fqns_per_model_part`.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from autopart.plan.data import Plan
from autopart.plan.export.facts import (
    Exported,
    comments,
    common_differences,
    labels,
    modes,
    sequence,
    splits_loss,
    splits_sequence,
    tp_differences,
)

SCHEDULES = {"gpipe": "GPipe", "1f1b": "1F1B"}
OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW"}
PRECISIONS = ("float32", "bfloat16")
MASTERS = (None, "float32")
NAMES = (
    (r"(?:.*\.)?(?:embed_tokens|wte|tok_embeddings)", "tok_embeddings"),
    (r"(?:.*\.)?(?:layers|h|blocks?)\.(\d+)", r"layers.\1"),
    (r"(?:.*\.)?(?:norm|ln_f|final_layer_norm)", "norm"),
    (r"(?:.*\.)?(?:lm_head|output)", "output"),
)
"""(pattern of a segment's label, torchtitan's name of the module)."""
RESHARD = {0: "never", 1: "never", 2: "never", 3: "always"}
"""ZeRO level -> `fsdp_reshard_after_forward`. "never" leaves parameters whole after forward: ZeRO 2."""


def torchtitan(plan: Plan) -> Exported:
    """The plan as TOML."""
    differences = [*common_differences(plan)]
    by_hand = ["[model] name and flavor, the dataset, and the learning rate"]
    training = _training(plan, differences, by_hand)
    parallelism = {
        **_data(plan, differences),
        **_tensor(plan, differences),
        **_pipeline(plan, differences),
    }
    tables = {
        "optimizer": _optimizer(plan, differences),
        "training": training,
        "parallelism": parallelism,
        "activation_checkpoint": _recompute(plan, differences),
    }
    notes = tuple(differences), tuple(by_hand)
    text = "\n".join(comments(plan, "torchtitan 0.2", *notes)) + "\n" + "".join(map(_table, tables, tables.values()))
    return Exported(text, *notes)


def _table(name: str, rows: Mapping[str, Any]) -> str:
    """A table of TOML. The values are written as JSON, which is TOML too for numbers, texts, booleans and lists."""
    return "\n".join(["", f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in rows.items()), ""])


def _training(plan: Plan, differences: list[str], by_hand: list[str]) -> dict[str, Any]:
    rows: dict[str, Any] = {
        "local_batch_size": (plan.global_batch if plan.pp > 1 else plan.micro_batch) // plan.dp,
        "global_batch_size": plan.global_batch,
    }
    tokens = sequence(plan)
    if tokens is None:
        by_hand.append("seq_len: the plan's inputs are no tokens")
    else:
        rows["seq_len"] = tokens
    if plan.precision not in PRECISIONS or plan.master not in MASTERS:
        what = f"precision {plan.precision}{f' with a master copy in {plan.master}' if plan.master else ''}"
        differences.append(f"{what}; torchtitan has {' and '.join(PRECISIONS)}, and copies in float32")
        return rows
    if plan.precision == "bfloat16" and plan.dp > 1 and not plan.master:
        differences.append("gradients are added up in bfloat16; FSDP adds them up in float32")
    if plan.master and plan.dp == 1:
        differences.append("one data-parallel rank keeps two copies of parameters; torchtitan casts them, by autocast")
    reduced = {"mixed_precision_reduce": plan.master} if plan.master else {}
    return {**rows, "dtype": plan.master or plan.precision, "mixed_precision_param": plan.precision, **reduced}


def _data(plan: Plan, differences: list[str]) -> dict[str, Any]:
    """The degrees of DDP (ZeRO 0, neither pp nor tp) or of FSDP."""
    if plan.offload != "none":
        differences.append(
            "the optimizer's states are on the host; torchtitan's training.enable_cpu_offload moves parameters and "
            "gradients there too, and is not set here"
        )
    if plan.dp == 1 or (plan.zero == 0 and plan.pp == plan.tp == 1):
        return {"data_parallel_replicate_degree": plan.dp, "data_parallel_shard_degree": 1}
    if plan.zero == 0:
        differences.append(
            "zero 0 keeps every rank's states whole; torchtitan does so (DDP) only where nothing but the batch is "
            "split, so this shards them (FSDP)"
        )
    if plan.zero == 1:
        differences.append("zero 1 shards the optimizer's states alone; FSDP shards gradients and parameters too")
    return {
        "data_parallel_replicate_degree": plan.dp // (plan.shard_size or plan.dp),
        "data_parallel_shard_degree": plan.shard_size or plan.dp,
        "fsdp_reshard_after_forward": RESHARD[plan.zero],
    }


def _tensor(plan: Plan, differences: list[str]) -> dict[str, Any]:
    if plan.tp == 1:
        return {"tensor_parallel_degree": 1}
    differences += tp_differences(plan)
    if splits_sequence(plan) is not True:
        differences.append("norms work on whole sequences; torchtitan splits the sequence between products")
    return {"tensor_parallel_degree": plan.tp, "disable_loss_parallel": not splits_loss(plan)}


def _pipeline(plan: Plan, differences: list[str]) -> dict[str, Any]:
    if plan.pp == 1:
        return {"pipeline_parallel_degree": 1}
    if plan.schedule not in SCHEDULES:
        differences.append(f"schedule {plan.schedule}; this says 1F1B")
    names = _names([label for stage in labels(plan) for label in stage])
    if strange := [label for label, name in names.items() if not name]:
        differences.append(f"torchtitan's models have no module for {', '.join(strange)}; the plan's names are kept")
    parts = [[names[label] or label for label in stage] for stage in labels(plan)]
    return {
        "pipeline_parallel_degree": plan.pp,
        "pipeline_parallel_schedule": SCHEDULES.get(plan.schedule, "1F1B"),
        "pipeline_parallel_microbatch_size": plan.micro_batch // plan.dp,
        "module_fqns_per_model_part": parts,
    }


def _names(segments: list[str]) -> dict[str, str]:
    """Label -> torchtitan's name of the segment; "" where no pattern matches, or where several labels get one name."""
    names = {
        label: next((m.expand(name) for pattern, name in NAMES if (m := re.fullmatch(pattern, label))), "")
        for label in segments
    }
    often = Counter(names.values())
    return {label: name if often[name] == 1 else "" for label, name in names.items()}


def _optimizer(plan: Plan, differences: list[str]) -> dict[str, Any]:
    if plan.optimizer in OPTIMIZERS:
        return {"name": OPTIMIZERS[plan.optimizer]}
    differences.append(f"optimizer {plan.optimizer}; torchtitan has {' and '.join(OPTIMIZERS.values())}")
    return {}


def _recompute(plan: Plan, differences: list[str]) -> dict[str, Any]:
    if plan.recompute in ("selective", "mincut"):
        saved = {"selective": "the output of every product", "mincut": "the values of a minimum cut"}[plan.recompute]
        differences.append(
            f"recompute keeps {saved}; torchtitan keeps the outputs of attention and of every second product"
        )
        return {"mode": "selective", "selective_ac_option": "op"}
    if plan.recompute == "mixed":
        kept = sum(mode != "full" for stage in modes(plan) for mode in stage)
        differences.append(f"recompute differs from block to block, {kept} are not full; this recomputes all in full")
        return {"mode": "full"}
    return {"mode": plan.recompute}
