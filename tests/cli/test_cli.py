"""The shell, and what it writes."""

from __future__ import annotations

import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from ranks import run_apart, run_main
from typer.testing import CliRunner, Result

from autopart.cli import models as models
from autopart.cli import training
from autopart.cli.main import app
from autopart.errors import PartitionError
from autopart.plan.data import Plan
from autopart.runtime import standalone
from autopart.runtime.standalone import random_weight, read_program

pytestmark = pytest.mark.usefixtures("traced_once")

ROOT = Path(__file__).parents[2]
TINY = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 16}
USERS_MODEL = """
import torch
from torch import nn

class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 4)

    def forward(self, x, y):
        return ((self.inner(x) - y) ** 2).mean()

def make():
    return Line(), {"x": torch.randn(4, 8), "y": torch.randn(4, 4)}

def nothing():
    return None

def no_batch():
    return Line(), 3

def fails():
    raise RuntimeError("in my own words")
"""


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """A config of a tiny model, with the dropout that GPT-2 has by default."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY))
    return str(file)


def shell(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def process(*command: object) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_plan_prints_json() -> None:
    result = shell("plan", "gpt2", "4:cpu", "--sequence", 32, "--pp", 1, "--tp", 2, "--micro-batch", 4, "--json")
    assert result.exit_code == 0, result.output
    plan = Plan.from_json(json.loads(result.stdout))
    assert (plan.pp, plan.dp, plan.tp, plan.global_batch) == (1, 2, 2, 8)
    assert plan.signature.inputs["input_ids"][1:] == (32,)
    assert "dropout is 0 here: resid_pdrop was 0.1" in result.stderr


@pytest.mark.slow
def test_a_saved_plan_is_shown_and_estimated(tiny: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    made = shell("plan", tiny, "2:cpu", "--tp", 2, "--micro-batch", 8, "--save", file)
    assert made.exit_code == 0, made.output
    assert made.stdout.startswith("plan GPT2LMHeadModel on 2:cpu")
    assert shell("show", file).stdout == made.stdout
    assert json.loads(shell("show", file, "--json").stdout) == json.loads(file.read_text())
    estimate = json.loads(shell("estimate", file, "--json").stdout)
    assert estimate["fits"] and len(estimate["memory_bytes"]) == 1
    assert "tokens/s" in shell("estimate", tiny, "2:cpu", "--dp", 2, "--micro-batch", 8).stdout


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["plan", "gpt3", "4:cpu"], ["unknown model 'gpt3'", "why: ", "gpt2"]),
        (["plan", "gpt2", "4:h1000"], ["unknown device 'h1000'", "try: "]),
        (["estimate", "gpt2"], ["on which mesh is gpt2 to be estimated?"]),
        (["emit", "gpt2", "--to", "nowhere"], ["neither a mesh nor a plan is given"]),
        (["show", "nowhere.json"], ["cannot read the plan nowhere.json"]),
        (["plan", "nowhere.py:make", "4:cpu"], ["cannot import nowhere.py"]),
        (["plan", "math:cosine", "4:cpu"], ["math has no function cosine"]),
        (["plan", "torch.nn:Linear", "4:cpu"], ["torch.nn:Linear cannot be called", "TypeError: "]),
        (["plan", ":make", "4:cpu"], ["cannot import", "module:function"]),
        (["plan", "gpt2", "4:cpu", "--sequence", "-1"], ["sequence=-1 is not positive"]),
        (["plan", "gpt2", "4:cpu", "--sequence", "8", "--precision", "fp16"], ["precision='float16'"]),
        (["mesh", "gpt2", "--sequence", "8", "--devices", "4:cpu", "--per-host", "0"], ["per_host=[0]"]),
        (["run", "gpt2", "1:cpu", "--lr", "nan"], ["learning rate of nan"]),
    ],
)
def test_an_error_is_told_without_a_traceback(arguments: list[str], texts: list[str]) -> None:
    result = shell(*arguments)
    assert result.exit_code == 2
    assert all(text in result.stderr for text in texts), result.stderr
    assert not result.stdout
    assert "Traceback" not in result.output


def test_the_version_is_told() -> None:
    told = shell("--version")
    assert told.exit_code == 0 and told.stdout == f"autopart {version('autopart')}\n"


@pytest.mark.processes
def test_importing_autopart_brings_in_neither_the_shell_nor_transformers() -> None:
    heavy = {"transformers", "accelerate", "rich", "typer", "matplotlib", "networkx", "triton", "jinja2"}
    heavy |= {"torch.distributed.checkpoint"}
    told = process(
        "-c", f"import sys, torch; had = set(sys.modules); import autopart; print({heavy} & (set(sys.modules) - had))"
    )
    assert told.stdout == "set()\n", told.stderr


@pytest.mark.parametrize("name", ["plan", "show", "report", "estimate", "emit", "run"])
def test_help_shows_an_example(name: str) -> None:
    assert f"Example: autopart {name} " in " ".join(shell(name, "--help").stdout.split())


@pytest.mark.parametrize(
    ("spec", "kind", "inputs"),
    [
        ("gpt2-xl", "GPT2LMHeadModel", {"input_ids": (2, 1024), "labels": (2, 1024)}),
        ("llama-3-70b", "LlamaForCausalLM", {"input_ids": (2, 1024), "labels": (2, 1024)}),
        ("bert-large", "BertForMaskedLM", {"input_ids": (2, 512), "labels": (2, 512)}),
        ("t5", "T5ForConditionalGeneration", {"input_ids": (2, 1024), "labels": (2, 1024)}),
        ("vit", "ViTForImageClassification", {"pixel_values": (2, 3, 224, 224), "labels": (2,)}),
    ],
)
def test_models_by_name_take_no_memory_on_meta(spec: str, kind: str, inputs: dict[str, tuple[int, ...]]) -> None:
    model, batch = models.load(spec, 2, meta=True)
    assert type(model).__name__ == kind
    assert {name: tuple(value.shape) for name, value in batch.items()} == inputs
    assert all(p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())


@pytest.mark.parametrize(
    ("size", "billions"),
    [
        # As their papers give them.
        ("gpt2-xl", 1.56),
        ("llama-2-7b", 6.74),
        ("llama-2-13b", 13.0),
        ("llama-3-8b", 8.03),
        ("llama-3-70b", 70.6),
        ("bert-large", 0.34),
        ("t5-3b", 2.85),
        ("t5-11b", 11.3),
        ("vit-huge", 0.632),
    ],
)
def test_sizes_have_the_parameters_they_are_named_for(size: str, billions: float) -> None:
    model, _ = models.load(size, 1, meta=True)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=0.02)


def test_buffers_on_meta_are_those_of_the_model(tmp_path: Path) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    there, here = (dict(models.load(str(tmp_path), 1, meta=meta)[0].named_buffers()) for meta in (True, False))
    assert there.keys() == here.keys()
    assert all(torch.equal(there[name], here[name]) for name in here)


def test_a_function_makes_the_model(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(USERS_MODEL)
    result = shell("plan", f"{file}:make", "2:cpu", "--dp", 2, "--micro-batch", 4, "--json")
    assert result.exit_code == 0, result.output
    assert list(json.loads(result.stdout)["signature"]["inputs"]) == ["x", "y"]
    with pytest.raises(PartitionError, match="returned NoneType"):
        models.load(f"{file}:nothing", 1)
    with pytest.raises(PartitionError, match=r"returned \(Line, int\)"):
        models.load(f"{file}:no_batch", 1)
    with pytest.raises(PartitionError, match=r"mine.py:\d+: raise .*RuntimeError: in my own words"):
        models.load(f"{file}:fails", 1)
    file.write_text("def make(:")
    with pytest.raises(PartitionError, match=r"cannot import .*\n.*SyntaxError"):
        models.load(f"{file}:make", 1)


def test_random_weights_depend_on_the_name_alone() -> None:
    assert torch.equal(random_weight("a.weight", [3, 4]), random_weight("a.weight", [3, 4]))
    assert not torch.equal(random_weight("a.weight", [3, 4]), random_weight("b.weight", [3, 4]))
    assert random_weight("norm.weight", [2]).tolist() == [1, 1]
    assert random_weight("norm.bias", [2]).tolist() == [0, 0]


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with the code of two stages of the tiny model, and what was printed."""
    folder = tmp_path_factory.mktemp("emitted")
    (folder / "config.json").write_text(json.dumps(TINY))
    given = ("2:cpu", "--pp", 2, "--micro-batch", 4, "--to", folder / "out")
    result = shell("emit", folder / "config.json", *given)
    assert result.exit_code == 0, result.output
    return folder / "out", result.stdout


@pytest.mark.processes  # which share the folder
def test_emit_writes_a_folder(
    emitted: tuple[Path, str], tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, told = emitted
    assert told.split() == [str(folder / "stage_0.py"), str(folder / "stage_1.py")]
    for file in sorted(folder.glob("*.py")):
        ast.parse(file.read_text())
    plan = Plan.load(folder / "plan.json")
    programs = [read_program(folder, stage) for stage in range(plan.pp)]
    assert programs[0].messages[0].consumers == (1,)
    assert list(programs[0].tied.values()) == [(0, 1)]
    again = tmp_path / "again"
    assert shell("emit", tiny, "--plan", folder / "plan.json", "--to", again).exit_code == 0
    assert (again / "stage_1.py").read_text() == (folder / "stage_1.py").read_text()
    monkeypatch.syspath_prepend(folder)
    assert all(importlib.import_module(name).Stage for name in ("stage_0", "stage_1"))


@pytest.mark.processes
def test_an_emitted_folder_trains_by_itself(emitted: tuple[Path, str]) -> None:
    result = process(emitted[0] / "run.py", "--steps", 2, "--lr", 0.01, "--json")
    assert result.returncode == 0, result.stderr
    first, second = json.loads(result.stdout)["losses"]
    assert second < first


@pytest.mark.processes
def test_a_damaged_folder_is_refused(emitted: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(emitted[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "program.json").write_text("{}")
    assert run_main(partial(standalone.main, tmp_path), [], 2, tmp_path / "output")
    told = (tmp_path / "output").read_text()
    assert "cannot read the stages" in told and "terminated with exit code 2" in told


def main_of_rank(arguments: Sequence[str]) -> None:
    """The shell on a rank that was forked."""
    app(list(arguments), standalone_mode=False)


@pytest.mark.processes
def test_run_trains_on_two_ranks(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are forks, with the arguments of the processes that it would start."""
    output = tmp_path / "output"

    def launch(line: Sequence[str], ranks: int) -> int:
        assert list(line[:3]) == [sys.executable, "-m", "autopart.cli.main"]
        return run_main(main_of_rank, line[3:], ranks, output)

    monkeypatch.setattr(training, "launch", launch)
    given = ("--processes", 2, "--tp", 2, "--batch", 4, "--micro-batch", 4, "--steps", 6, "--json")
    given += ("--report", tmp_path / "report.html")
    result = shell("run", tiny, *given)
    assert result.exit_code == 0, result.output + output.read_text()
    told = json.loads(output.read_text().splitlines()[-1])
    assert len(told["losses"]) == len(told["step_seconds"]) == 6
    assert told["losses"][-1] < told["losses"][0] and told["tokens_per_second"] > 0
    plan = Plan.from_json(told["plan"])
    assert (plan.tp, plan.global_batch) == (2, 4)
    page = (tmp_path / "report.html").read_text()
    numbers = json.loads(page.partition('id="numbers">')[2].partition("</script>")[0])
    step = numbers["measured"]
    assert step["of"] == 4 and 0 < step["seconds"] <= max(told["step_seconds"][2:])
    assert step["peak_bytes"][0] == pytest.approx(plan.memory_bytes[0], rel=0.1)
    assert {(row["axis"], row["op"]) for row in step["messages"][0]} >= {("tp", "forward"), ("tp", "backward")}
    assert numbers["extras"]["prices"] is None and numbers["extras"]["memory"][0]
    assert all(step["stages"][0]["seconds"][cause] > 0 for cause in ("forward", "backward", "optimizer"))


def test_a_run_whose_report_cannot_be_written_does_not_begin(tiny: str, tmp_path: Path) -> None:
    result = shell("run", tiny, "2:cpu", "--report", tmp_path / "no" / "report.html")
    assert result.exit_code == 2 and "cannot write" in result.stderr and not result.stdout


def test_notes_of_a_run_are_lines() -> None:
    result = shell("run", f"{ROOT / 'examples' / 'tiny.py'}:model", "1:cpu", "--steps", 1)
    assert result.exit_code == 0, result.output
    assert "autopart: every block was traced" in result.stderr and "UserWarning" not in result.stderr


@pytest.mark.processes
def test_a_refusal_is_the_exit_status_of_the_process(tiny: str) -> None:
    arguments = ["autopart", "plan", tiny, "2:cpu", "--tp", "3"]
    assert run_apart(exec, f"import sys, autopart.cli.main\nsys.argv = {arguments}\nautopart.cli.main.main()", {}) == 2


@pytest.mark.slow
def test_a_plan_for_another_model_is_told_before_weights_are_made(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, other = tmp_path / "plan.json", tmp_path / "other"
    assert shell("plan", tiny, "1:cpu", "--batch", 2, "--save", file).exit_code == 0
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**TINY, "n_embd": 64}))
    monkeypatch.setattr(
        torch.nn.Linear, "reset_parameters", lambda self: pytest.fail("weights") if not self.weight.is_meta else None
    )
    told = shell("run", other / "config.json", "--plan", file)
    assert told.exit_code == 2 and "another model" in told.stderr, told.output
