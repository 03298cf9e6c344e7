"""Plans as other systems' settings, and the schema of a plan's file."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import models
import pytest
from typer.testing import CliRunner

import autopart
from autopart import PartitionError, Plan
from autopart.cli.main import app
from autopart.hardware.mesh import Mesh
from autopart.hardware.rows import Device, Link
from autopart.plan.export import SYSTEMS, Exported, export
from autopart.plan.search_summary import RunnerUp, SearchSummary
from autopart.plan.signature import Signature
from autopart.plan.stages import PlanLine, PlanSegment, PlanStage
from autopart.sharding.notation import C, R, S, Strategy

pytestmark = pytest.mark.usefixtures("traced_once")

DEGREES = {
    "llama": {"pp": 2, "tp": 2, "micro_batch": 4},
    "gpt2": {"dp": 2, "tp": 2, "micro_batch": 4},
    "bert": {"dp": 4, "micro_batch": 4},
    "t5": {"pp": 2, "dp": 2, "micro_batch": 4},
    "mlp": {"tp": 4},
}


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    made = {}
    for name, degrees in DEGREES.items():
        model, batch = models.build(name)
        made[name] = autopart.plan(model, "4:cpu", batch, **degrees)
    return made


Change = Callable[[Plan], Plan]


def changed(**values: Any) -> Change:
    return lambda plan: replace(plan, **values)


def blocks(counts: Sequence[int], modes: Sequence[str] = (), recompute: str = "none") -> Change:
    """The plan with so many blocks in its stages, which recompute in turn as `modes` says."""

    def change(plan: Plan) -> Plan:
        stages, number = [], 0
        for index, count in enumerate(counts):
            labels = [f"model.layers.{number + i}" for i in range(count)]
            each = [modes[(number + i) % len(modes)] if modes else recompute for i in range(count)]
            labels = [*["model.embed_tokens"] * (index == 0), *labels, *["lm_head"] * (index == len(counts) - 1)]
            each = [*["none"] * (index == 0), *each, *["none"] * (index == len(counts) - 1)]
            segments = (PlanSegment(("",), 0.0, ()), *(PlanSegment((label,), 0.0, ()) for label in labels))
            stages.append(replace(plan.stages[0], segments=segments, recompute=tuple(each)))
            number += count
        return replace(plan, pp=len(counts), stages=tuple(stages), recompute="mixed" if modes else recompute)

    return change


def along(axis: str, key: str, strategy: Strategy) -> Change:
    """The plan with another strategy for one key."""

    def change(plan: Plan) -> Plan:
        splits = [{**s, axis: {**s.get(axis, {}), key: strategy}} for s in plan.splits]
        return replace(plan, splits=tuple(splits))

    return change


def two_ways(plan: Plan) -> Plan:
    return replace(plan, splits=plan.splits * 2, stages=(plan.stages[0], replace(plan.stages[1], splits=1)))


def sequence_split(plan: Plan) -> Plan:
    """The plan with every norm on a share of the sequence."""
    norm = Strategy(".2", (S(1), C), (S(1),), shards_work=True)
    for key in [key for key in plan.splits[0]["tp"] if "rms_norm" in key]:
        plan = along("tp", key, norm)(plan)
    return plan


def toml(made: Exported) -> dict[str, Any]:
    return tomllib.loads(made.text)


def flags(made: Exported) -> dict[str, str | bool]:
    """Megatron's arguments; True for one without a value."""
    first, *words, last = shlex.split(made.text, comments=True)
    assert (first, last) == ("MEGATRON_ARGS=(", ")") or (first, words.pop(0), last) == ("MEGATRON_ARGS=", "(", ")")
    found: dict[str, str | bool] = {}
    for word in words:
        if word.startswith("--"):
            found[word], name = True, word
        else:
            found[name] = word
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", DEGREES)
def test_every_system_is_told_the_same(plans: dict[str, Plan], name: str) -> None:
    plan = plans[name]
    titan, mega, deep = toml(export(plan, "torchtitan")), flags(export(plan, "megatron")), export(plan, "deepspeed")
    speed = json.loads(deep.text)
    parallel, training = titan["parallelism"], titan["training"]

    dp = parallel["data_parallel_replicate_degree"] * parallel["data_parallel_shard_degree"]
    assert (parallel["pipeline_parallel_degree"], dp, parallel["tensor_parallel_degree"]) == (plan.pp, plan.dp, plan.tp)
    degrees = (mega["--pipeline-model-parallel-size"], mega["--tensor-model-parallel-size"])
    assert degrees == (str(plan.pp), str(plan.tp))
    if plan.pp == 1:
        assert speed.get("tensor_parallel", {}).get("autotp_size", 1) == plan.tp
    else:
        assert any(f"num_stages={plan.pp}" in line for line in deep.by_hand)

    share = plan.micro_batch // plan.dp
    assert training["global_batch_size"] == plan.global_batch == speed["train_batch_size"]
    assert mega["--global-batch-size"] == str(plan.global_batch)
    assert speed["train_micro_batch_size_per_gpu"] == share == int(mega["--micro-batch-size"])
    assert speed["gradient_accumulation_steps"] * share * plan.dp == plan.global_batch
    once = share * (plan.micro_batches if plan.pp > 1 else 1)
    assert training["local_batch_size"] == once
    assert parallel.get("pipeline_parallel_microbatch_size", share) == share
    assert titan["activation_checkpoint"]["mode"] == "none"
    assert "--recompute-granularity" not in mega and "activation_checkpointing" not in speed


@pytest.mark.slow
def test_torchtitan(plans: dict[str, Plan]) -> None:
    made = toml(export(plans["llama"], "torchtitan"))
    assert made["optimizer"] == {"name": "AdamW"}
    assert made["training"]["seq_len"] == models.TOKENS and made["training"]["dtype"] == "float32"
    assert made["parallelism"]["pipeline_parallel_schedule"] == "1F1B"
    parts = made["parallelism"]["module_fqns_per_model_part"]
    assert parts == [["tok_embeddings", "layers.0"], ["layers.1", "norm", "output"]]
    replicated = toml(export(plans["bert"], "torchtitan"))["parallelism"]
    assert (replicated["data_parallel_replicate_degree"], replicated["data_parallel_shard_degree"]) == (4, 1)


def test_megatron(plans: dict[str, Plan]) -> None:
    made = flags(export(plans["llama"], "megatron"))
    sizes = {"--num-layers": "2", "--hidden-size": "32", "--ffn-hidden-size": "64", "--vocab-size": "96"}
    assert sizes.items() <= made.items()
    assert made["--swiglu"] is made["--untie-embeddings-and-output-weights"] is made["--disable-bias-linear"] is True
    assert made["--position-embedding-type"] == "rope" and made["--seq-length"] == "12"
    gpt2 = flags(export(plans["gpt2"], "megatron"))
    assert gpt2["--position-embedding-type"] == "learned_absolute" and gpt2["--max-position-embeddings"] == "32"
    assert not {"--swiglu", "--untie-embeddings-and-output-weights", "--disable-bias-linear"} & set(gpt2)


def test_deepspeed_splits_as_the_plan_does(plans: dict[str, Plan]) -> None:
    plan = replace(plans["llama"], pp=1)
    specs = json.loads(export(plan, "deepspeed").text)["tensor_parallel"]["partition_config"]["layer_specs"]

    def kind(name: str) -> str:
        (found,) = [spec["partition_type"] for spec in specs if re.match(spec["patterns"][0], name)]
        return found

    assert kind("model.layers.1.mlp.up_proj.weight") == kind("model.layers.0.self_attn.q_proj.weight") == "column"
    assert kind("model.layers.1.mlp.down_proj.weight") == "row"
    assert kind("model.embed_tokens.weight") == "skip" and kind("lm_head.weight") == "column"


def test_deepspeed_takes_the_loss_as_the_plan_does(plans: dict[str, Plan]) -> None:
    loss = "/cross_entropy_loss"
    plan = replace(plans["llama"], pp=1)
    assert plan.splits[0]["tp"][loss].name == "v"
    for name, splits in (("v", True), ("R", False)):
        made = json.loads(export(along("tp", loss, Strategy(name, (), (R,)))(plan), "deepspeed").text)[
            "tensor_parallel"
        ]
        (head,) = [s for s in made["partition_config"]["layer_specs"] if "lm_head" in s["patterns"][0]]
        assert (made.get("vocab_parallel_lm_head", False), "gather_output" in head) == (splits, not splits)


def test_parts_of_a_weight_are_split_one_by_one(plans: dict[str, Plan]) -> None:
    def spec(parts: Sequence[int]) -> dict[str, Any]:
        name = "model.layers.0.self_attn.q_proj"
        plan = along("tp", f"{name}.weight", Strategy("d0", (), (S(0, parts),)))(replace(plans["llama"], pp=1))
        specs = json.loads(export(plan, "deepspeed").text)["tensor_parallel"]["partition_config"]["layer_specs"]
        return next(s for s in specs if "q_proj" in s["patterns"][0])

    assert spec([16, 16])["shape"] == [2, -1] and spec([16, 8, 8])["shape"] == [[16, 8, 8], -1]
    assert spec([16, 16])["partition_dim"] == 0 and "shape" not in spec([])


FULL = {"--recompute-granularity": "full", "--recompute-method": "uniform", "--recompute-num-layers": "1"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (blocks([2, 2]), {"--num-layers": "4", "--pipeline-model-parallel-layout": None}),
        (blocks([3, 1]), {"--num-layers": "4", "--pipeline-model-parallel-layout": "Ettt|tL"}),
        (blocks([1, 2, 0]), {"--num-layers": "3", "--pipeline-model-parallel-layout": "Et|tt|L"}),
        (changed(dp=2, zero=1), {"--use-distributed-optimizer": True, "--use-megatron-fsdp": None}),
        (changed(dp=2, zero=2), {"--use-megatron-fsdp": True, "--data-parallel-sharding-strategy": "optim_grads"}),
        (changed(dp=2, zero=3), {"--data-parallel-sharding-strategy": "optim_grads_params"}),
        (changed(zero=1), {"--use-distributed-optimizer": None}),
        (changed(precision="bfloat16"), {"--bf16": True, "--fp16": None}),
        (
            changed(precision="float16", master="float32"),
            {"--fp16": True, "--accumulate-allreduce-grads-in-fp32": True},
        ),
        (blocks([2, 2], recompute="full"), FULL),
        (blocks([2, 2], ["full", "none"]), {**FULL, "--recompute-method": "block"}),
        (blocks([2, 2], recompute="selective"), {"--recompute-granularity": "selective", "--recompute-method": None}),
        (blocks([2, 2], recompute="mincut"), {"--recompute-granularity": "selective", "--recompute-method": None}),
        (sequence_split, {"--sequence-parallel": True}),
        (changed(), {"--sequence-parallel": None, "--bf16": None}),
        (changed(optimizer="momentum"), {"--optimizer": "sgd", "--sgd-momentum": "0.9"}),
    ],
)
def test_megatron_flags(plans: dict[str, Plan], change: Change, expected: dict[str, Any]) -> None:
    made = flags(export(change(plans["llama"]), "megatron"))
    assert {name: made.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("zero", "pp", "expected"),
    [(0, 1, "never"), (1, 2, "never"), (2, 2, "never"), (3, 2, "always")],
)
def test_torchtitan_shards_by_zero_level(plans: dict[str, Plan], zero: int, pp: int, expected: str) -> None:
    made = toml(export(replace(plans["llama"], dp=2, zero=zero, pp=pp), "torchtitan"))["parallelism"]
    assert (made["data_parallel_replicate_degree"], made["data_parallel_shard_degree"]) == (1, 2)
    assert made["fsdp_reshard_after_forward"] == expected


MIXED = {"dp": 2, "zero": 3, "precision": "bfloat16", "master": "float32"}


def test_a_master_copy_is_no_difference(plans: dict[str, Plan]) -> None:
    made = {system: export(replace(plans["llama"], **MIXED), system) for system in SYSTEMS}
    assert not [d for e in made.values() for d in e.differences if "float32" in d or "bfloat16" in d]
    training = toml(made["torchtitan"])["training"]
    assert (training["dtype"], training["mixed_precision_param"]) == ("float32", "bfloat16")
    assert training["mixed_precision_reduce"] == "float32"
    speed = json.loads(made["deepspeed"].text)
    assert speed["bf16"]["enabled"] and speed["data_types"] == {"grad_accum_dtype": "fp32"}


UP, NORM = "model.layers.0.mlp.up_proj/linear", "model.norm/autopart.rms_norm"


@pytest.mark.parametrize(
    ("system", "change", "message"),
    [
        *((system, two_ways, r"split in different ways \(0, 1\)") for system in SYSTEMS),
        *(
            (system, along("dp", "lm_head.weight", Strategy("d0", (), (S(0),))), "along dp, lm_head.weight")
            for system in SYSTEMS
        ),
        *(
            (system, changed(schedule=schedule), f"schedule {schedule}")
            for system, schedule in (("torchtitan", "zigzag"), ("megatron", "gpipe"), ("deepspeed", "gpipe"))
        ),
        *((system, changed(precision="float64"), "precision float64") for system in SYSTEMS),
        *(
            (
                system,
                along("tp", UP, Strategy("k", (S(2), S(1)), (), shards_work=True)),
                "split by k.* split by n there",
            )
            for system in ("torchtitan", "megatron")
        ),
        *(
            (system, along("tp", UP, Strategy("R", (R, R), (R,))), "up_proj: whole on every rank.*split by n there")
            for system in ("torchtitan", "megatron")
        ),
        ("torchtitan", changed(), "norms work on whole sequences"),
        ("torchtitan", changed(dp=2, zero=0), "zero 0"),
        ("torchtitan", changed(dp=2, zero=1), "zero 1 shards the optimizer"),
        ("torchtitan", changed(dp=2, zero=3, precision="bfloat16"), "added up in bfloat16"),
        ("torchtitan", changed(optimizer="sgd"), "optimizer sgd"),
        ("torchtitan", blocks([2, 2], recompute="selective"), "every second"),
        ("torchtitan", blocks([2, 2], ["full", "none"]), "2 are not full"),
        ("megatron", changed(precision="bfloat16"), "float32 copies"),
        ("megatron", changed(optimizer="rmsprop"), "optimizer rmsprop"),
        ("megatron", blocks([2, 2], recompute="selective"), "attention alone"),
        ("megatron", blocks([2, 2], recompute="mincut"), "minimum cut"),
        ("torchtitan", blocks([2, 2], recompute="mincut"), "minimum cut"),
        ("megatron", blocks([2, 2], ["none", "full"]), "differs from block to block"),
        ("megatron", blocks([3, 1], ["full", "none"]), "differs from block to block"),
        ("megatron", along("tp", NORM, Strategy(".2", (S(1), C), (S(1),), shards_work=True)), "some norms"),
        ("deepspeed", changed(zero=3), "zero 3 with a pipeline"),
        ("deepspeed", changed(), "tp=2 inside a pipeline"),
        ("deepspeed", changed(precision="bfloat16"), "float32 copies"),
        ("deepspeed", blocks([3, 1]), "stages of 3, 1 blocks"),
        (
            "deepspeed",
            lambda plan: along("tp", UP, Strategy(".1", (S(1), C), (S(1),), shards_work=True))(replace(plan, pp=1)),
            r"up_proj: split by \.1 in the plan; AutoTP leaves it whole",
        ),
        (
            "deepspeed",
            lambda plan: along("tp", "lm_head.weight", Strategy("C", (), (C,)))(replace(plan, pp=1)),
            "lm_head: the weight is whole",
        ),
    ],
)
def test_what_a_system_cannot_is_said(plans: dict[str, Plan], system: str, change: Change, message: str) -> None:
    made = export(change(plans["llama"]), system)
    assert re.search(message, "\n".join(made.differences)), made.differences
    if system != "deepspeed":
        assert all(f"# differs: {line}\n" in made.text for line in made.differences)


def test_what_a_system_can_is_not(plans: dict[str, Plan]) -> None:
    as_usual = along("tp", "model.embed_tokens/embedding", Strategy("v", (), (), shards_work=True))
    plan = as_usual(sequence_split(plans["llama"]))
    assert not export(plan, "torchtitan").differences and not export(plan, "megatron").differences
    assert not export(plans["bert"], "megatron").differences and not export(plans["bert"], "deepspeed").differences


@pytest.mark.parametrize(
    ("system", "name", "message"),
    [
        ("megatron", "t5", "several stacks"),
        ("deepspeed", "gpt2", "stored transposed"),
        ("deepspeed", "gpt2", "shares its weight with the head"),
        ("torchtitan", "t5", r"no module for .*encoder\.block\.0, .*decoder\.block\.1"),
        ("torchtitan", "mlp", "its name does not tell"),
    ],
)
def test_other_models(plans: dict[str, Plan], system: str, name: str, message: str) -> None:
    assert re.search(message, "\n".join(export(plans[name], system).differences))


@pytest.mark.parametrize(
    ("system", "change", "message"),
    [
        ("deepspeed", blocks([2, 2], recompute="full"), r"gradient_checkpointing_enable\(\)"),
        ("deepspeed", blocks([2, 2], recompute="selective"), "policy"),
        ("deepspeed", blocks([2, 2], recompute="mincut"), "minimum cut"),
        ("deepspeed", blocks([2, 2], ["full", "none", "none"]), "full,none; none,full"),
        ("deepspeed", changed(optimizer="sgd"), "the optimizer, sgd"),
        ("megatron", changed(), "--num-attention-heads"),
        ("torchtitan", changed(), "flavor"),
    ],
)
def test_what_is_left_to_the_user_is_said(plans: dict[str, Plan], system: str, change: Change, message: str) -> None:
    assert re.search(message, "\n".join(export(change(plans["llama"]), system).by_hand))


def test_a_stage_may_print_runs_that_recompute_does_not_count(plans: dict[str, Plan]) -> None:
    made = export(blocks([1, 1], ["full", "none"])(plans["llama"]), "deepspeed")
    assert any("full; none" in line for line in made.by_hand)


def test_an_unknown_system_is_refused(plans: dict[str, Plan]) -> None:
    with pytest.raises(PartitionError, match=r"(?s)no export to 'deepsped'.*--to deepspeed"):
        export(plans["llama"], "deepsped")


def test_the_shell(plans: dict[str, Plan], tmp_path: Path) -> None:
    plans["llama"].save(tmp_path / "plan.json")

    def shell(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["export", str(tmp_path / "plan.json"), *map(str, arguments)])

    made = export(plans["llama"], "deepspeed")
    printed = shell("--to", "deepspeed")
    assert printed.exit_code == 0 and printed.stdout == made.text
    assert all(f"differs: {line}" in printed.stderr for line in made.differences)
    written = shell("--to", "torchtitan", "--out", tmp_path / "train.toml")
    assert written.stdout == "" and "by hand: [model]" in written.stderr
    assert (tmp_path / "train.toml").read_text() == export(plans["llama"], "torchtitan").text
    assert json.loads(shell("--to", "megatron", "--json").stdout).keys() == {"text", "differences", "by_hand"}
    assert shell("--to", "jax").exit_code == 2
    assert shell("--to", "megatron", "--out", tmp_path / "none" / "args.sh").exit_code == 2


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json.loads((files("autopart") / "plan/plan.schema.json").read_text())


def on_file(plan: Plan) -> dict[str, Any]:
    return json.loads(json.dumps(plan.to_json()))


@pytest.mark.parametrize("name", DEGREES)
def test_plans_are_of_the_schema(plans: dict[str, Plan], schema: dict[str, Any], name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(on_file(plans[name]))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(surprise=1),
        lambda data: data.pop("tp"),
        lambda data: data.update(tp=0),
        lambda data: data.update(schema=1),
        lambda data: data.update(master="bfloat16"),
        lambda data: data.update(recompute="some"),
        lambda data: data["stages"][0].update(surprise=1),
        lambda data: data["stages"][0].pop("memory"),
        lambda data: data["stages"][0]["memory"].update(parameters=-1),
        lambda data: data["stages"][0]["segments"][0].update(surprise=1),
        lambda data: data["stages"][0].update(sends=[[1]]),
        lambda data: data["mesh"]["device"].pop("bandwidth"),
        lambda data: data["splits"][0]["tp"]["lm_head.weight"].update(outputs=["S"]),
    ],
)
def test_others_are_not(plans: dict[str, Plan], schema: dict[str, Any], change: Callable[[Any], Any]) -> None:
    data = on_file(plans["llama"])
    change(data)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate(data)


@pytest.mark.parametrize(
    ("kind", "name", "extra"),
    [
        (Plan, "", {"schema"}),
        (PlanStage, "stage", set()),
        (PlanSegment, "segment", set()),
        (PlanLine, "line", set()),
        (Signature, "signature", set()),
        (SearchSummary, "search", set()),
        (RunnerUp, "runner_up", set()),
        (Strategy, "strategy", set()),
        (Mesh, "mesh", {"parts"}),
        (Device, "device", set()),
        (Link, "link", set()),
    ],
)
def test_every_field_is_described(schema: dict[str, Any], kind: type, name: str, extra: set[str]) -> None:
    described = schema["$defs"][name] if name else schema
    assert set(described["properties"]) == {field.name for field in fields(kind)} | extra  # type: ignore[arg-type]
    assert all(row.get("description") for row in described["properties"].values())
    assert described["additionalProperties"] is False
