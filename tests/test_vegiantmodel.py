"""The example that takes veGiantModel's arguments: its numbers, its plan, and training as a user starts it."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command, run

import autopart

pytestmark = pytest.mark.usefixtures("traced_once")

ALL = "AUTOPART_EXAMPLES" in os.environ
GIVEN = [
    ["--model", "gpt", "--partition_method", "manual:7:0,4,7"],
    ["--model", "bert", "--partition_method", "type:BertLayer"],
    ["--model", "t5", "--partition_method", "uniform"],
]

FILE = Path(__file__).parents[1] / "examples" / "vegiantmodel.py"
PUBLISHED = """--model-parallel-size 2 --num-stages 2 --num-layers 24 --hidden-size 1024 --train-batch-size 64
    --gradient_accumulation_steps 16 --num-attention-heads 16 --batch-size 4 --seq-length 1024
    --max-position-embeddings 1024 --train-iters 500000 --lr-decay-iters 450000 --data-impl mmap --split 949,50,1
    --distributed-backend nccl --lr 0.00025 --lr-decay-style cosine --min-lr 1.0e-5 --weight-decay 1e-2 --clip-grad 1.0
    --warmup .02 --log-interval 1 --save-interval 100000 --vocab-size 145608 --DDP-impl torch --eod-mask-loss
    --deepspeed-pipeline --deepspeed --config_param {} --fp16""".split()
"""The arguments of its example of 345M parameters, without paths and partition method."""


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FILE.parent))
    import vegiantmodel

    return vegiantmodel


def published(example: Any, method: str, *changes: str) -> tuple[torch.nn.Module, autopart.Plan]:
    a = example.arguments([*PUBLISHED, "--partition_method", method, *changes])
    with torch.device("meta"):
        model = example.build(a)
    batch = {name: torch.zeros(2, a.seq_length, dtype=torch.long) for name in ("input_ids", "labels")}
    settings = example.settings(a, 8)
    return model, autopart.plan(model, "8:v100-32gb", batch, global_batch=example.samples(a, 8), **settings)


def starts(plan: autopart.Plan) -> list[str]:
    """The first block of every stage."""
    labels = ([label for segment in stage.segments for label in segment.labels] for stage in plan.stages)
    return [next(label for label in stage if label.startswith("layers.")) for stage in labels]


@pytest.mark.parametrize(
    ("method", "start"),
    [
        ("type:TransformerLayer", "layers.12"),
        ("type:transformer", "layers.12"),
        ("uniform", "layers.12"),
        ("parameters", "layers.6"),  # the tied words count where they are read first
        ("manual:29:0,9,29", "layers.6"),
    ],
)
def test_the_published_arguments_are_planned(example: Any, method: str, start: str) -> None:
    """Its feed-forward network is split by columns, then by rows, as veGiantModel's users write it by hand."""
    model, plan = published(example, method)
    assert (plan.pp, plan.tp, plan.dp, plan.global_batch, plan.micro_batches) == (2, 2, 2, 64, 8)
    assert (plan.precision, plan.master, plan.schedule) == ("float16", "float32", "1f1b")
    assert starts(plan) == ["layers.0", start]
    for chosen in plan.splits:
        found = {key.rpartition("ffn.")[2]: split.name for key, split in chosen["tp"].items() if "ffn.fc" in key}
        assert (found["fc1/linear"], found["fc2/linear"]) == ("n", "k")
    assert sum(p.numel() for p in model.layers.parameters()) == 24 * (12 * 1024**2 + 13 * 1024)


@pytest.mark.parametrize(
    ("method", "told"),
    [
        (
            "manual:24:0,12,24",
            r"has 29 layers, not 24\n.*0 embedding\.words.*3 layers\.0 to 26 layers\.23, 27 norm, 28",
        ),
        ("type:ParallelTransformerLayer", "finds no segment"),
        ("profile", "no method profile"),
    ],
)
def test_a_partition_that_the_model_does_not_have_is_refused(example: Any, method: str, told: str) -> None:
    with pytest.raises(autopart.PartitionError, match=told):
        published(example, method)


def test_its_rate_warms_up_and_decays(example: Any) -> None:
    a = example.arguments([*PUBLISHED, "--lr-decay-iters", "100", "--warmup", ".1"])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=a.lr)
    scheduler = example.schedule_of(optimizer, a)
    rates = []
    for _ in range(120):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[10] == pytest.approx(2.5e-4) == max(rates) and rates[0] < rates[5] < rates[9]
    assert rates[55] == pytest.approx((2.5e-4 + 1e-5) / 2, rel=1e-3) and rates[-1] == pytest.approx(1e-5)


def trained(folder: Path, *given: str) -> str:
    return run([FILE, "--num-layers", "2", *given], folder)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("given", GIVEN if ALL else GIVEN[:1], ids=lambda given: given[1])
def test_it_trains_as_one_process(given: list[str], tmp_path: Path) -> None:
    told = trained(tmp_path, "--compare", "--train-iters", "3", *given)
    assert "rank 0 of 4: pipeline 0 of 2, data 0 of 1, model 0 of 2" in told
    assert float(re.search(r"by at most (\S+)", told)[1]) <= 1e-5  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.processes
def test_an_unsharded_checkpoint_is_sliced_and_a_training_goes_on(example: Any, tmp_path: Path) -> None:
    """From a state dict of another model than the ranks draw, and then from the checkpoint that the ranks wrote."""
    a = example.arguments(["--num-layers", "2", "--seed", "7"])
    torch.save(example.build(a).state_dict(), tmp_path / "whole.pt")
    told = trained(tmp_path, "--load", "whole.pt", "--compare", "--save", "trained", "--train-iters", "2")
    assert float(re.search(r"by at most (\S+)", told)[1]) <= 1e-5  # type: ignore[index]
    again = trained(tmp_path, "--load", "trained", "--train-iters", "3", "--lr-decay-iters", "2")
    assert "step 3" in again and "step 2:" not in again


@pytest.mark.slow
@pytest.mark.processes
def test_four_variables_of_the_environment_start_it(tmp_path: Path) -> None:
    """RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as init_process_group(init_method="env://") reads them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    line = [FILE, "--num-layers", "2", "--train-iters", "2"]
    ranks = [Command(line, tmp_path, {**world, "RANK": str(rank)}) for rank in range(4)]
    done = [rank.wait() for rank in ranks]
    assert [rank.returncode for rank in done] == [0] * 4, [rank.stderr for rank in done]
    told = [rank.stdout for rank in done]
    assert "rank 0 of 4: pipeline 0 of 2, data 0 of 1, model 0 of 2" in told[0] and "step 2: loss" in told[0]
    assert told[1:] == [""] * 3
