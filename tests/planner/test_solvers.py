"""Plans by other solvers than HiGHS, and the ILP of a plan's splits in files that any solver reads."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import highspy
import models
import pulp
import pytest
import torch
import transformers as hf
from models import HEADS, WIDTH, WORDS, batch_for, build
from ranks import run_apart
from typer.testing import CliRunner

import autopart
from autopart import Mesh, PartitionError, Plan
from autopart.cli.main import app
from autopart.cost.sizes import Sizes, reshard_paths
from autopart.passes.source import Source
from autopart.planner.explain.why import Explanation, explain_traced
from autopart.planner.make_plan import request_of

pytestmark = pytest.mark.usefixtures("traced_once")

MESH = "1x4:a100-80gb"
PLANS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "t5": ("t5", {"tp": 4}),
    "mixture of experts in stages": ("moe", {"pp": 2, "tp": 2}),
}
if "AUTOPART_EXAMPLES" in os.environ:
    PLANS |= {"gpt2 in stages": ("gpt2", {"pp": 2, "tp": 2}), "mixture of experts": ("moe", {"tp": 4})}


def moe() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A tiny Mixtral with four experts."""
    torch.manual_seed(0)
    config = hf.MixtralConfig(num_hidden_layers=2, hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=2,
                              intermediate_size=48, vocab_size=WORDS, num_local_experts=4, use_cache=False)  # fmt: skip
    return hf.MixtralForCausalLM(config).train(), batch_for("llama", torch.float32)


@lru_cache
def source(name: str) -> Source:
    """A tiny model, traced once."""
    return Source(*moe(), torch.float32) if name == "moe" else models.source(name)


@lru_cache
def explanation(name: str, solver: str = "highs", mesh: str = MESH, **settings: Any) -> Explanation:
    """A tiny model's plan by a solver."""
    made = source(name)
    return explain_traced(made, Mesh.of(mesh), request_of(made.model, made.batch, solver=solver, **settings))


def cost(sizes: Sizes, costs: Sequence[float], chosen: Sequence[int]) -> float:
    """What a choice costs: its strategies, every reshard once, every saved tensor once."""
    table, paid = sizes.table, {int(sizes.first[n]) + option for n, option in enumerate(chosen)}
    reshard_keys, saved = list(sizes.reshards), list(sizes.saved_index)
    for f, used in enumerate(table.value_uses):
        have = table.nodes[used.source].given(chosen[used.source], used.output)
        for node, operand in used.uses:
            want = table.nodes[node].taken(chosen[node], operand)
            reshards = [(f, have, path) for path in reshard_paths(used.chains[have, want])]
            paid |= {int(sizes.first[-1]) + reshard_keys.index(reshard) for reshard in reshards}
    for m, tensor in enumerate(table.saved_tensors):
        for (node, operand), placed in zip(dict.fromkeys(tensor.savers), sizes.saved_placements[m], strict=True):
            by = tensor.root if operand == -2 else node
            paid.add(int(sizes.first[-1]) + len(reshard_keys) + saved.index((m, placed[chosen[by]])))
    return float(sum(costs[i] for i in paid))


def optimum(file: Path, solution: Path) -> float:
    """What the program of CBC says of a file."""
    line = [pulp.PULP_CBC_CMD(msg=False).path, str(file), "-ratio", "0", "-solve", "-solution", str(solution)]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    told = solution.read_text().splitlines()[0]
    assert told.startswith("Optimal - objective value"), told
    return float(told.split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_cbc_gives_the_same_plan(plan: str) -> None:
    """The same cuts, step and bound. Of splits that cost the same each solver may take others: the ILP's objective is
    the same."""
    name, settings = PLANS[plan]
    usual, other = (explanation(name, solver, **settings) for solver in ("highs", "cbc"))
    for field in ("degrees", "micro_batch", "zero", "schedule", "recompute", "starts", "status"):
        assert getattr(usual.plan, field) == getattr(other.plan, field)
    assert other.plan.step_seconds == pytest.approx(usual.plan.step_seconds, rel=1e-9)
    assert other.plan.bound_seconds == pytest.approx(usual.plan.bound_seconds, rel=1e-9)
    sizes = usual.space.model(usual.found.point).sizes
    for stage, problem in enumerate(usual.found.problems):
        one, same = (cost(sizes, problem.costs, each.found.chosen[stage]) for each in (usual, other))
        assert same == pytest.approx(one, rel=1e-9)
    assert other.plan.request["solver"] == "cbc"
    assert "solver" not in usual.plan.request


@pytest.mark.parametrize("plan", PLANS)
def test_the_files_have_the_optimum_of_the_plan(plan: str, tmp_path: Path) -> None:
    name, settings = PLANS[plan]
    made = explanation(name, "highs", **settings)
    sizes = made.space.model(made.found.point).sizes
    for stage, asked in enumerate(made.found.problems):
        assert asked.unit == "seconds"
        assert asked.capacity is None
        expected = 1e6 * cost(sizes, asked.costs, made.found.chosen[stage])
        problem = made.ilp(stage)
        problem.writeLP(str(tmp_path / "model.lp"))
        problem.writeMPS(str(tmp_path / "model.mps"))
        for file in ("model.lp", "model.mps"):
            assert optimum(tmp_path / file, tmp_path / "solution") == pytest.approx(expected, rel=1e-6)
            highs = highspy.Highs()
            highs.setOptionValue("output_flag", False)
            highs.readModel(str(tmp_path / file))
            highs.run()
            assert highs.getInfo().objective_function_value == pytest.approx(expected, rel=1e-6)


def test_a_stage_that_there_is_not_is_refused() -> None:
    with pytest.raises(PartitionError, match="no stage 7"):
        explanation("gpt2", "highs").ilp(7)


@pytest.mark.slow
def test_the_shell_plans_with_a_solver_and_writes_the_ilp(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    build("gpt2")[0].config.save_pretrained(tmp_path)
    plan, lp, mps = (tmp_path / name for name in ("plan.json", "model.lp", "model.mps"))
    fixed = ["--tp", "2", "--pp", "1", "--micro-batch", "8", "--zero", "0", "--recompute", "none"]
    line = ["plan", str(config), MESH, "--sequence", "12", *fixed, "--solver", "CBC", "--save", str(plan)]
    made = CliRunner().invoke(app, line)
    assert made.exit_code == 0, made.output
    assert Plan.load(plan).request["solver"] == "cbc"
    shown = CliRunner().invoke(app, ["show", str(plan), "--lp", str(lp), "--mps", str(mps), "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout) == {"files": [str(lp), str(mps)]}
    assert "microseconds:" in lp.read_text()
    assert "x_transformer.h.0.attn.c_attn_matmul_dp_" in lp.read_text()
    assert optimum(lp, tmp_path / "a") == pytest.approx(optimum(mps, tmp_path / "b"), rel=1e-6)
    refused = CliRunner().invoke(app, ["show", str(plan), "--lp", str(tmp_path / "none" / "model.lp")])
    assert refused.exit_code == 2
    assert "cannot write" in refused.stderr


@pytest.mark.parametrize(
    ("solver", "told"), [("simplex", "not known"), ("cb", "'cbc'"), ("mipcl", "not available"), ("PYGLPK", "no such")]
)
def test_a_solver_that_is_not_here_is_refused(solver: str, told: str) -> None:
    model, batch = build("mlp")
    with pytest.raises(PartitionError, match=told) as error:
        autopart.plan(model, MESH, batch, solver=solver)
    assert "highs, cbc" in str(error.value)


def test_a_solver_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CBC does where its program is for another processor."""
    monkeypatch.setattr(pulp.PULP_CBC_CMD, "pulp_cbc_path", "/bin/false")
    model, batch = build("mlp")
    with pytest.raises(PartitionError, match="the solver cbc fails on this machine"):
        autopart.plan(model, MESH, batch, solver="cbc")


@pytest.mark.processes
def test_a_usual_plan_does_not_load_pulp() -> None:
    lines = (
        "import sys, autopart",
        "from models import build",
        "model, batch = build('mlp')",
        "autopart.plan(model, '2:cpu', batch)",
        "assert 'pulp' not in sys.modules",
    )
    assert run_apart(exec, "\n".join(lines), {}) == 0
