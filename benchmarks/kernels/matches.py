"""Which fused kernels real models of transformers get, and how many bytes a layer moves with and without them.

    python -m benchmarks.kernels.matches [--json PATH] [MODEL ...]

Models are on meta, of their published sizes, in bfloat16, for a GPU. A layer's bytes are those that its operators other
than views read and write in the forward pass of a micro-batch, each operand and result once. Eager kernels are calls
that are no view, no product and no kernel of autopart. Takes about a minute.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import autopart
from autopart.ir.graph import Info, info, is_pick
from autopart.ir.labels import is_block
from autopart.ir.layered_graph import LayeredGraph
from autopart.kernels.table import KERNELS
from autopart.passes.fuse_dropout import RESIDUAL
from autopart.passes.source import Source
from autopart.passes.traffic import traffic
from benchmarks.coverage.zoo_models import architectures, published
from benchmarks.support.command import command_line

MODELS = """llama gpt2 bert t5 mistral qwen3 gemma2 gemma3_text mixtral qwen3_moe deepseek_v3 llama4_text granitemoe
    gpt_oss falcon bloom mpt opt phi3 vit mamba2 bamba falcon_h1 granitemoehybrid nemotron_h""".split()
SAMPLES, TOKENS = 2, 512


def main() -> None:
    """Print the table, and write it where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tasks = {model_type: task for task, model_type in architectures()}
    rows = []
    for name in options.models:
        rows.append(row(tasks[name], name))
        print(text(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(
            json.dumps({"command": command_line("benchmarks.kernels.matches"), "rows": rows}, indent=1) + "\n"
        )


def row(task: str, name: str) -> dict[str, Any]:
    """One model: calls of each kernel in the whole model, eager kernels that are left, bytes of a layer."""
    fused, plain = (layered(task, name, off) for off in ((), (*KERNELS, RESIDUAL)))
    calls: Counter[str] = Counter()
    for index, times in Counter(fused.sequence).items():
        for record in (info(node) for node in fused.segments[index].nodes):
            if record.unfused:
                calls[record.name.partition(".")[2]] += times
    return {
        "model": name,
        "calls": dict(sorted(calls.items())),
        "eager": [round(of_layer(graph, eager), 1) for graph in (plain, fused)],
        "bytes": [round(of_layer(graph, traffic)) for graph in (plain, fused)],
        "near_misses": list(fused.traced.near_misses),
    }


def layered(task: str, name: str, off: tuple[str, ...]) -> LayeredGraph:
    """The model as it is planned for a GPU, without the kernels in `off`."""
    model, batch = published(task, name, SAMPLES, TOKENS)
    mesh = autopart.Mesh.parse("8:h100-80gb")
    return Source(model.to(torch.bfloat16), _half(batch), torch.bfloat16, off).sampled(SAMPLES, mesh)


def _half(batch: dict[str, Any]) -> dict[str, Any]:
    tensors = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return batch | {k: v.to(torch.bfloat16) for k, v in tensors.items()}


def of_layer(graph: LayeredGraph, amount: Any) -> float:
    """The mean of an amount over the blocks of a model: the sum over a block's operators."""
    blocks = [s for s, label in zip(graph.sequence, graph.labels, strict=True) if is_block(label)]
    return sum(amount(node) for s in blocks for node in graph.segments[s].nodes) / len(blocks)


def eager(node: Any) -> int:
    """1 for an operator that PyTorch runs as a kernel of its own."""
    record: Info = info(node)
    return int(not (record.view or record.product or is_pick(node) or record.unfused))


def text(found: dict[str, Any]) -> str:
    """A row in one line."""
    calls = ", ".join(f"{name} x {count}" for name, count in found["calls"].items()) or "none"
    (plain, fused), (many, few) = found["bytes"], found["eager"]
    return f"{found['model']:12} {calls}; eager kernels {many} -> {few}; bytes {fused / plain - 1:+.0%} a layer"


if __name__ == "__main__":
    main()
