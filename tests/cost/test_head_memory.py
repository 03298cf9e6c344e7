"""Peak bytes of a step whose head is fused with its loss: predicted, and counted on simulated ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from autopart.frontend.batch import DTYPES
from autopart.hardware.mesh import Mesh
from autopart.kernels.linear_cross_entropy import ROWS
from autopart.kernels.table import KERNELS
from autopart.passes.source import Source
from autopart.planner.make_plan import make_plan, request_of
from benchmarks.accuracy.memory import measured

pytestmark = pytest.mark.slow

WORDS, WIDTH, SAMPLES, TOKENS = 8192, 64, 8, 512
SIZES = {
    "vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
NEAR = 0.03


def peaks(precision: str, ranks: int, no_fuse: tuple[str, ...] = ()) -> tuple[float, float]:
    """(predicted, counted) bytes of a rank."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).to(DTYPES[precision])
    tokens = torch.randint(3, WORDS, (SAMPLES, TOKENS))
    batch = {"input_ids": tokens, "labels": tokens}
    source = Source(model, batch, DTYPES[precision], no_fuse)
    request = request_of(model, batch, tp=ranks, micro_batch=SAMPLES, recompute="none", no_fuse=list(no_fuse))
    plan = make_plan(source, Mesh.parse(f"{ranks}:cpu"), replace(request, must_fit=False), to_run=True)
    assert any(use.name == "linear_loss" for use in plan.kernels) != bool(no_fuse)
    return plan.memory_bytes[0], measured(source, plan)[0]


@pytest.mark.parametrize(("precision", "ranks"), [("float32", 1), ("float32", 2), ("bfloat16", 2)])
def test_bytes_of_a_fused_head_are_those_of_the_tensors(precision: str, ranks: int) -> None:
    predicted, counted = peaks(precision, ranks)
    assert abs(predicted / counted - 1) < NEAR, (predicted, counted)


def test_logits_are_never_whole() -> None:
    whole = SAMPLES * TOKENS * WORDS * 4
    (_, fused), (_, plain) = peaks("float32", 1), peaks("float32", 1, tuple(KERNELS))
    assert ROWS * WORDS * 4 < whole < plain and fused < whole < plain - fused
