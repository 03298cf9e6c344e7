"""The example of PipeGoose's model: its plan, and training as a user starts it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, BloomConfig, PreTrainedTokenizerFast

import autopart

pytestmark = pytest.mark.usefixtures("traced_once")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import pipegoose

    return pipegoose


@pytest.mark.parametrize("partition", ["time", "memory"])
def test_bloom_560m_is_cut_by_time_or_by_memory(example: Any, partition: str) -> None:
    """Its stages take about the same seconds, or about the same bytes: the logits weigh more seconds than bytes."""
    a = example.arguments(["--precision", "bfloat16", "--partition", partition, "--batch-size", "32"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(example.SIZES["560m"]).train()
    assert sum(p.numel() for p in model.parameters()) == 559_214_592
    tokens = torch.zeros(2, 1024, dtype=torch.long)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    plan = autopart.plan(model, "8:a100-80gb", batch, global_batch=32, **example.settings(a))
    assert (plan.pp, plan.tp, plan.dp, plan.zero, plan.master) == (2, 2, 2, 1, "float32")
    assert {mode for stage in plan.stages for mode in stage.recompute} <= {"full", "none"}
    labels = [[label for segment in stage.segments for label in segment.labels] for stage in plan.stages]
    blocks = [sum(label.startswith("transformer.h.") for label in stage) for stage in labels]
    seconds = [stage.forward_seconds + stage.backward_seconds for stage in plan.stages]
    uneven = {
        "time": max(seconds) / min(seconds),
        "memory": max(plan.memory_bytes) / min(plan.memory_bytes),
    }
    assert sum(blocks) == 24 and uneven[partition] < 1.2, (blocks, uneven)
    assert blocks[0] > 12 if partition == "time" else blocks[0] <= 12


FILE = ROOT / "examples" / "pipegoose.py"


@pytest.mark.slow
@pytest.mark.processes
def test_it_trains_as_one_process_and_tells_of_every_recompute() -> None:
    """On 8 ranks: two micro-batches a step, and two of the four blocks on each stage."""
    told = run([FILE, "--compare", "--partition", "uniform"])
    assert float(re.search(r"by at most (\S+)", told)[1]) <= 1e-5  # type: ignore[index]
    counts = re.findall(r"forward (\d+) x .* recompute (\d+) x .* backward (\d+) x", told)
    assert counts == [("6", "12", "6")] * 8


@pytest.mark.slow
@pytest.mark.processes
def test_it_trains_a_folder_of_weights_in_mixed_precision(example: Any, tmp_path: Path) -> None:
    """The first loss is the folder's model's on the folder's tokens."""
    letters = {letter: at for at, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(tmp_path)
    torch.manual_seed(3)
    config = BloomConfig(hidden_size=64, n_layer=4, n_head=4, vocab_size=264, initializer_range=0.2, use_cache=False)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    (batch,) = example.data(example.arguments(["--weights", str(tmp_path), "--steps", "1"]))
    wanted = model(**batch).loss.item()
    told = run([FILE, "--weights", tmp_path, "--precision", "bfloat16", "--steps", "1"])
    first = float(re.search(r"step 1: loss (\S+)", told)[1])  # type: ignore[index]
    assert first == pytest.approx(wanted, rel=0.02) and first != wanted
    assert wanted > 6  # of these weights; a model drawn anew has log(264) = 5.6
