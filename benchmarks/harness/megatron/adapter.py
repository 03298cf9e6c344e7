"""The hand-written models as systems: tensor and pipeline parallelism over all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopart.compile.bench.setting import NotExpressibleError, Setting, Step, micro_batches_text
from benchmarks.harness.megatron.gpt2 import Gpt2
from benchmarks.harness.megatron.groups import Place
from benchmarks.harness.megatron.llama import Llama
from benchmarks.harness.megatron.pipeline import Pipeline
from benchmarks.harness.models import name_of

STAGES: Mapping[str, Any] = {"gpt2": Gpt2, "llama": Llama}


def degrees(ranks: int) -> Iterator[tuple[int, int]]:
    """Degrees of pipeline and tensor parallelism that fill the ranks."""
    yield from ((pp, ranks // pp) for pp in range(1, ranks + 1) if ranks % pp == 0)


def build(setting: Setting, pp: int, tp: int, sequence: bool = False) -> tuple[Step, str]:
    """Plain tensor parallelism, or sequence parallelism too. Raises NotExpressibleError where sizes do not divide."""
    model: Any = setting.copy_of_model()
    make_stage = STAGES[name_of(model)]
    config, parts = model.config, setting.micro_batches if pp > 1 else 1
    batch = setting.whole_batch()
    samples, tokens = batch["input_ids"].shape
    divides = ((config.num_attention_heads, tp), (config.vocab_size, tp), (tokens, tp), (samples, parts))
    if any(a % b for a, b in divides) or config.num_hidden_layers < pp:
        raise NotExpressibleError(f"heads, vocabulary, tokens, samples or layers do not divide by pp={pp}, tp={tp}")
    place = Place.of(pp, tp, sequence)
    stage = make_stage(model, place)
    pipeline = Pipeline(stage, place, batch["input_ids"].chunk(parts), batch["labels"].chunk(parts), config.hidden_size)
    optimizer = setting.optimizer_of(stage.parameters())

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        pipeline.run()
        sum_gradients(stage, place)
        optimizer.step()
        loss = torch.stack(pipeline.losses).sum() if place.last else torch.zeros((), device=setting.device)
        if pp > 1:
            dist.broadcast(loss, (pp - 1) * tp)
        return loss

    note = f"pp={pp} tp={tp}" + ", sequence parallel" * place.sequence
    return step, f"{note}, {micro_batches_text(parts)}"


def sum_gradients(stage: Any, place: Place) -> None:
    """Sum what ranks have parts of: in one message what works on shares of the sequence, and the tied embedding."""
    shared = [p.grad for p in stage.parameters() if getattr(p, "summed_over_shares", False)]
    if shared:
        flat = nn.utils.parameters_to_vector(shared)
        dist.all_reduce(flat, group=place.tensor)
        nn.utils.vector_to_parameters(flat, shared)
    if stage.tied is not None and place.pp > 1:
        dist.all_reduce(stage.tied.grad, group=place.ends)
