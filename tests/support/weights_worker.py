"""Four ranks of tests/runtime/test_weights.py, forks of this process: models on meta get their weights from a folder or
by their own initialisation, are trained, and are written again.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from models import Batch, build
from ranks import run_forked
from safetensors.torch import load_file
from torch import nn

import autopart
from autopart.compile.given_weights import given_weights
from autopart.frontend.batch import DTYPES
from autopart.frontend.initial_values import InitialValues
from autopart.hardware.mesh import Mesh
from autopart.passes.source import Source
from autopart.planner.make_plan import make_plan, request_of

RANKS = 4
GPT2 = {"pp": 2, "tp": 2, "micro_batch": 4}
LLAMA = {"dp": 2, "tp": 2, "zero": 3, "precision": "bfloat16", "master": "float32", "micro_batch": 8}


def on_meta(model: nn.Module) -> nn.Module:
    """A model of the same config on meta."""
    with torch.device("meta"):
        return type(model)(model.config).train()


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    """Whether tensors are the same to the byte, by name."""
    return found.keys() == wanted.keys() and all(
        t.dtype == wanted[n].dtype and torch.equal(t, wanted[n]) for n, t in found.items()
    )


def from_folder(folder: Path, model: nn.Module, batch: Batch, plan: autopart.Plan) -> dict[str, Any]:
    """GPT-2, with tied weights on two stages, from a folder and back."""
    meta = on_meta(model)
    compiled = autopart.compile(meta, f"{RANKS}:cpu", batch, plan=plan, weights=folder / "gpt2")
    compiled.save_pretrained(folder / "untrained", max_shard_size="40KB")
    compiled.optimizer(torch.optim.SGD, lr=0.1)
    compiled.step(batch)
    compiled.save_pretrained(folder / "trained")
    compiled.sync_to(meta, ranks=[0, 3])
    state, rank = compiled.full_state_dict(), compiled.rank
    (folder / f"on_meta_{rank}").write_text(str(sum(p.is_meta for p in meta.parameters())))
    if rank == 3:
        (folder / "loss").write_text(str(meta(**batch).loss.item()))
    if rank:
        return {}
    untrained, trained = (type(model).from_pretrained(folder / name).state_dict() for name in ("untrained", "trained"))
    return {
        "files": sorted(file.name for file in (folder / "untrained").iterdir()),
        "in": same(untrained, model.state_dict()),
        "out": same(trained, state) and not same(trained, untrained),
        "synced": same(dict(meta.state_dict()), state),
        "generated": len(meta.eval().generate(batch["input_ids"][:1, :4], max_new_tokens=2, do_sample=False)[0]),
    }


def by_initialisation(folder: Path, model: nn.Module, batch: Batch, plan: autopart.Plan) -> dict[str, Any]:
    """Llama in slices with float32 copies, by its own initialisation."""
    compiled = autopart.compile(on_meta(model), f"{RANKS}:cpu", batch, plan=plan, weights="init", seed=5)
    state = compiled.full_state_dict()
    compiled.optimizer(torch.optim.SGD, lr=0.1)
    compiled.step(batch)
    compiled.save_pretrained(folder / "bfloat16")
    compiled.save_pretrained(folder / "float32", dtype="float32")
    trained = compiled.full_state_dict()
    if compiled.rank:
        return {}
    initial = InitialValues(model, 5)
    files = {name: load_file(folder / name / "model.safetensors") for name in ("bfloat16", "float32")}
    return {
        "init": same(state, {name: initial.find(name) for name in state}),
        "float32": same(files["float32"], trained),
        "bfloat16": same(files["bfloat16"], {name: value.bfloat16() for name, value in trained.items()}),
        "dtype": json.loads((folder / "bfloat16" / "config.json").read_text())["dtype"],
    }


def work(folder: Path, tasks: list[Any]) -> None:
    """One rank."""
    found = [run(folder, *rest) for run, *rest in tasks]
    if os.environ["RANK"] == "0":
        (folder / "found.json").write_text(json.dumps(found))


def train_all(folder: Path) -> None:
    """Trace and plan for all ranks, then run them."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tasks, sources = [], {}
    for run, name, settings in ((from_folder, "gpt2", GPT2), (by_initialisation, "llama", LLAMA)):
        model, batch = build(name)
        traced = given_weights(on_meta(model), "init", 0).model
        request = request_of(traced, batch, **settings)
        source = sources[type(model)] = Source(traced, batch, DTYPES[request.precision])
        plan = make_plan(source, Mesh.of(f"{RANKS}:cpu"), request, to_run=True)
        source.full(plan.micro_batch, plan.mesh)
        tasks.append((run, model, batch, plan))
    tasks[0][1].save_pretrained(folder / "gpt2")
    known = SimpleNamespace(of=lambda model, *_: sources[type(model)])
    setattr(sys.modules["autopart.compile.api"], "Source", known)  # noqa: B010
    run_forked(partial(work, folder, tasks), RANKS)
