"""The memory that ranks take while they load a model on meta from a folder: its peak against the bytes of their shares.

A Llama with random weights is written first. Every rank traces it and takes the plan; from then on its anonymous memory
is counted every 2 ms. Mapped pages of files are not counted: ranks share them, and a reader keeps at most 64 MiB and
one tensor of them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import autopart
from autopart.compile.given_weights import given_weights
from autopart.compile.programs import programs
from autopart.passes.source import Source
from autopart.planner.make_plan import make_plan, request_of
from autopart.runtime.agreement import from_first
from autopart.runtime.compiled import Compiled
from autopart.runtime.groups import make_groups
from autopart.runtime.launch import launch
from autopart.runtime.process_group import Group
from autopart.runtime.weight_files import WeightFiles
from benchmarks.runtime.ranks import begin

SETTINGS = {"pp": 1, "dp": 2, "tp": 2, "zero": 3, "precision": "float32", "micro_batch": 2, "nodes": 5}
MODULE = "benchmarks.runtime.loading"


def make(width: int, layers: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A Llama on meta with 12 width^2 parameters a layer, and a batch."""
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, intermediate_size=width * 8 // 3, num_attention_heads=width // 64,
        num_key_value_heads=width // 64, vocab_size=8192, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    ids = torch.zeros(4, 16, dtype=torch.int64)
    return model.train(), {"input_ids": ids, "labels": ids}


def write(model: nn.Module, folder: Path) -> None:
    """Random weights in files of 500 MB."""
    files = WeightFiles(folder, 500_000_000)
    for name, parameter in model.named_parameters():
        files.add(name, torch.randn(parameter.shape) * 0.02)
    files.close()


def anonymous() -> int:
    """Bytes of this process that are resident and no pages of files, which the kernel takes back when it likes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """A list that has, afterwards, the most bytes of `anonymous` meanwhile above those at the start."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, ended = anonymous(), threading.Event()
    seen = [0]

    def watch() -> None:
        while not ended.wait(0.002):
            seen[0] = max(seen[0], anonymous() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()
        seen[0] = max(seen[0], anonymous() - before)


def load(options: argparse.Namespace) -> dict[str, Any]:
    """One rank: what it holds, and its peak while it loads."""
    model, batch = make(options.width, options.layers)
    given = given_weights(model, options.folder, seed=0)
    whole = Group("host", dist.get_world_size(), dist.get_rank(), dist.group.WORLD)
    mesh = autopart.Mesh.of(f"{dist.get_world_size()}:cpu")
    source = Source(given.model, batch, torch.float32)
    request = request_of(given.model, batch, **SETTINGS)
    plan = from_first(make_plan(source, mesh, request, to_run=True) if dist.get_rank() == 0 else None, whole)
    layered = source.full(plan.micro_batch, mesh)
    groups = make_groups(plan.pp, plan.dp, plan.tp, plan.shard_size)
    (program,) = programs(layered, plan, [groups.pp.rank])
    aliases, buffers = layered.traced.aliases, layered.traced.buffers
    with peak_memory() as peak:
        compiled = Compiled(model, plan, groups, program, aliases, buffers, find=given.loading(buffers, 0))
    held = [t for _, t in [*compiled.stage.named_parameters(), *compiled.stage.named_buffers()]]
    shares = sum(t.nbytes for t in [*held, *compiled.executor.shared.copies])
    largest = max(p.nbytes for p in model.parameters())
    return {"rank": compiled.rank, "shares": shares, "peak": peak[0], "largest_tensor": largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=10, help="2.2 GB with the default width")
    parser.add_argument("--json", type=Path, help="where results are kept")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is None:
        with tempfile.TemporaryDirectory() as folder:
            write(make(options.width, options.layers)[0], Path(folder))
            given = ["--json", str(options.json)] if options.json else []
            sizes = ["--width", str(options.width), "--layers", str(options.layers)]
            sys.exit(launch([sys.executable, "-m", MODULE, *sizes, *given, "--folder", folder], 4))
    begin()
    rows: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rows, load(options))
    if dist.get_rank() == 0:
        for row in rows:
            print(
                f"rank {row['rank']}: shares {row['shares'] / 1e6:8.1f} MB, peak {row['peak'] / 1e6:8.1f} MB, "
                f"{row['peak'] / row['shares']:.2f} times, with one tensor of {row['largest_tensor'] / 1e6:.1f} MB "
                f"more allowed {(row['peak'] - row['largest_tensor']) / row['shares']:.2f} times"
            )
        if options.json:
            options.json.write_text(json.dumps({"settings": SETTINGS, "rows": rows}, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
