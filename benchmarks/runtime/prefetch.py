"""A step at ZeRO 3 with weights gathered ahead against one without, on real ranks over gloo.

    python -m benchmarks.runtime.prefetch [--ranks 4] [--rounds 20]

Both programs are of one plan but for `prefetch`, and train the same model in turns, a step each. A step's seconds are
those of the slowest rank. Printed is the median over rounds of the ratio with / without, beside the medians and the
largest difference of the losses. Where ranks share cores with each other and with gloo's threads, as on one host of few
cores, messages have no time of their own that could be hidden.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.distributed as dist

import autopart
from autopart.passes.source import Source
from autopart.runtime.compiled import Compiled
from benchmarks.runtime.ranks import Job, begin, build, on_ranks

AHEAD = (0, 64)
"""MiB that may be gathered ahead: without, with."""


def seconds_of(compiled: Compiled, source: Source) -> tuple[float, float]:
    """Seconds of a step on the slowest rank, and its loss."""
    dist.barrier()
    start = time.perf_counter()
    loss = float(compiled.step(source.batch))
    taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken), loss


def compare(model: str, ranks: int, rounds: int) -> None:
    """Time both programs in turns; rank 0 prints."""
    sizes = (256, 6, 64, 4 * ranks)
    shared = {"dp": ranks, "zero": 3, "micro_batch": 2 * ranks, "constraints": ["strategy *.weight C over dp"]}
    source = Source(*Job(model, sizes).make(), torch.float32)
    mesh = autopart.Mesh.of(f"{ranks}:cpu")
    programs = [build(Job(model, sizes, {**shared, "prefetch": mib}), mesh, source) for mib in AHEAD]
    for compiled in programs:
        compiled.optimizer(torch.optim.AdamW, lr=1e-4)
        seconds_of(compiled, source)
    rows = [[seconds_of(compiled, source) for compiled in programs] for _ in range(rounds)]
    if dist.get_rank() == 0:
        without, with_ = (statistics.median(row[i][0] for row in rows) for i in range(2))
        ratio = statistics.median(row[1][0] / row[0][0] for row in rows)
        differs = max(abs(row[1][1] - row[0][1]) for row in rows)
        print(
            f"{model} on {ranks} ranks: {1e3 * with_:.1f} ms with, {1e3 * without:.1f} ms without, ratio {ratio:.3f}; "
            f"losses differ by at most {differs:.1e}"
        )


def main() -> None:
    """Start the ranks, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("gpt2", "llama"), default="llama")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        torch.set_num_threads(1)
        begin()
        compare(options.model, options.ranks, options.rounds)
        dist.destroy_process_group()
        return
    given = ["--model", options.model, "--ranks", str(options.ranks), "--rounds", str(options.rounds), "--worker"]
    on_ranks(__spec__.name, options.ranks, given)


if __name__ == "__main__":
    main()
