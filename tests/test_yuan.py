"""One language model, native and of transformers, under the harness's trainers from one configuration."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from examples.yuan.config import read
from examples.yuan.data import batch
from examples.yuan.model import MODELS, make
from examples.yuan.trainers import chosen, names

ROOT = Path(__file__).parents[1]
SMALL = ("model.layers=2", "model.width=32", "model.tokens=16", "trainer.steps=2", "trainer.warm_up=1")
TRAINERS = "autopart,DDP,pipelining 1F1B"


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(600)
def test_every_trainer_trains_both_models_with_the_same_losses(tmp_path: Path) -> None:
    """The pipelines of torch are written by hand for transformers' model: of the native one they say so."""
    changes = [part for change in (*SMALL, f"trainer.names={TRAINERS}") for part in ("--set", change)]
    command = [sys.executable, "-m", "examples.yuan", "--json", str(tmp_path / "found.json"), *changes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == list(MODELS)
    for kind, record in found.items():
        status = {row["system"]: row["status"] for row in record["rows"]}
        written = status.pop("pipelining 1F1B")
        assert written.startswith("not expressible: by hand") if kind == "native" else written == "ok"
        assert list(status) == TRAINERS.split(",")[:-1] and set(status.values()) == {"ok"}, status


def test_the_configuration_is_one_file(tmp_path: Path) -> None:
    config = read(changes=["trainer.ranks=4", "trainer.lr=0.5", "model.kind=native"])
    assert (config.trainer.ranks, config.trainer.lr, config.model.kind) == (4, 0.5, "native")
    assert chosen(config.trainer) == names(4)
    made = batch(config.data, config.model.vocabulary, config.model.tokens)
    assert made["input_ids"].shape == (8, 64)
    for kind in MODELS:
        loss = make(kind, config.model)(**made)
        loss = loss if kind == "native" else loss.loss
        assert loss.item() == pytest.approx(5.5, abs=0.5)  # log 256
    for change, told in (("trainer.rank=4", "no 'rank'"), ("train.ranks=4", "no 'train'")):
        with pytest.raises(ValueError, match=told):
            read(changes=[change])
    with pytest.raises(ValueError, match="no trainer 'horovod'"):
        chosen(read(changes=["trainer.names=horovod"]).trainer)
    with pytest.raises(ValueError, match="lacks some of the 256 bytes"):
        batch(config.data, 100, 8)
    (tmp_path / "more.toml").write_text("[model]\nkind = 'native'\ndepth = 3\n")
    with pytest.raises(ValueError, match="no 'depth'"):
        read(tmp_path / "more.toml")
