"""One rank of tests/compile/test_zoo.py: trains architectures one after the other with tp=2 x pp=2, two micro-batches;
rank 0 compares.

argv: architectures as "task:model_type,...", the file for the results.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import autopart
from autopart.compile.check import one_process, worst_error
from benchmarks.coverage.zoo_models import build

SAMPLES = 4


def train(task: str, model_type: str) -> dict[str, Any]:
    """The errors of a step, on rank 0."""
    model, batch = build(task, model_type)
    whole = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())  # whose means are a micro-batch's
    compiled = autopart.compile(model, "4:cpu", batch, tp=2, pp=2, micro_batch=SAMPLES if whole else SAMPLES // 2)
    loss = float(compiled.step(batch))
    gradients = compiled.full_gradients()
    if dist.get_rank():
        return {}
    right, wanted = one_process(copy.deepcopy(model), batch)
    error, name = worst_error(gradients, wanted)
    return {"loss": abs(loss / float(right) - 1), "gradients": error, "worst": name}


def main() -> None:
    """Train all; rank 0 writes what it found after each, so that a failure leaves the rest."""
    names, path = sys.argv[1:]
    torch.set_num_threads(1)
    results = {}
    for name in names.split(","):
        results[name] = train(*name.split(":"))
        if os.environ["RANK"] == "0":
            Path(path).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
