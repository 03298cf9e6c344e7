"""What autopart writes for people, word for word. AUTOPART_GOLDEN=renew writes it anew: read the difference."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest
import torch
import transformers as hf
from emitted import sources
from models import batch_for, build
from torch import nn

import autopart
from autopart.plan.text import describe
from autopart.runtime.emitted import run_source

GOLDEN = Path(__file__).with_name("golden")


MESHES = {"gpt2": "4:cpu", "llama": "4:cpu", "t5": "4:h100-80gb", "mixtral": "4:h100-80gb", "mamba2": "4:h100-80gb"}
"""Model -> its mesh: GPUs call kernels where CPUs run what the model has."""


def mixtral(layers: int) -> nn.Module:
    """A Mixtral of four experts, whose loss reads their load."""
    config = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
              "num_local_experts": 4, "vocab_size": 96, "max_position_embeddings": 32, "use_cache": False,
              "output_router_logits": True}  # fmt: skip
    return hf.MixtralForCausalLM(hf.MixtralConfig(**config, num_hidden_layers=layers)).train()


def mamba2(layers: int) -> nn.Module:
    """A Mamba-2 whose eight heads share four groups of keys and queries."""
    config = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "n_groups": 4, "state_size": 16, "chunk_size": 4,
              "vocab_size": 96, "use_cache": False, "pad_token_id": 0}  # fmt: skip
    return hf.Mamba2ForCausalLM(hf.Mamba2Config(**config, num_hidden_layers=layers)).train()


OWN = {"mixtral": mixtral, "mamba2": mamba2}
"""Models that are here alone: of four layers."""


@pytest.fixture(scope="module", params=MESHES)
def texts(request: pytest.FixtureRequest) -> dict[str, str]:
    """File name -> text: the plan and the module of either stage."""
    name = request.param
    model, batch = (OWN[name](4), batch_for(name, torch.float32)) if name in OWN else build(name, layers=4)
    plan = autopart.plan(model, MESHES[name], batch, tp=2, pp=2, micro_batch=4 if name != "mixtral" else None)
    text = re.sub(r", planned in \S+ s", "", describe(plan, 120)) + "\n"
    modules = {f"{request.param}_stage{i}.py.txt": s for i, s in enumerate(sources(model, batch, plan))}
    return {f"{request.param}_plan.txt": text, **modules}


@pytest.mark.slow
def test_texts_are_the_golden_ones(texts: dict[str, str]) -> None:
    if os.environ.get("AUTOPART_GOLDEN") == "renew":
        GOLDEN.mkdir(exist_ok=True)
        for name, text in texts.items():
            (GOLDEN / name).write_text(text)
    for name, text in texts.items():
        assert without_lines((GOLDEN / name).read_text()) == without_lines(text), f"{name}: see `make golden`"


def without_lines(text: str) -> str:
    """Without the line numbers of other packages' sources, which differ between their versions."""
    return re.sub(r"(\w+\.py):\d+", r"\1", text)


def test_modules_import(texts: dict[str, str]) -> None:
    modules = [run_source(text, name) for name, text in texts.items() if ".py" in name]
    assert len(modules) == 2 and all(callable(m.Stage) for m in modules)


@pytest.mark.slow
def test_texts_are_clean(texts: dict[str, str]) -> None:
    for name, text in texts.items():
        for number, line in enumerate(text.splitlines(), 1):
            where = f"{name}:{number}: {line}"
            assert not re.search(r"(?<![\w.)\]])/\w+/", line), f"an absolute path: {where}"
            assert line == line.rstrip() and "\t" not in line, where
        if ".py" in name:
            assert ast.get_docstring(ast.parse(text)), f"{name} does not say what it is"
