"""The report of a plan: its numbers, its drawings, its size, and that nothing of a plan is read as HTML."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as xml
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers as hf
from torch import nn
from typer.testing import CliRunner

import autopart
from autopart import Mesh, PartitionError, Plan
from autopart.cli.main import app
from autopart.hardware.mesh import usable_bytes
from autopart.plan.breakdown import slowest_stage
from autopart.plan.report import report_html
from autopart.plan.report.drawing import LETTER, Scale, fitting, tick_text
from autopart.plan.report.measured import measured_step
from autopart.plan.report.memory import shown_stages
from autopart.plan.report.numbers import finite

pytestmark = pytest.mark.usefixtures("traced_once")

PLANS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "one device": ("mlp", "1:cpu", {}),
    "1f1b": ("llama", "4:cpu", {"tp": 2, "pp": 2, "micro_batch": 4}),
    "4 stages": ("llama", "4:a100-80gb", {"pp": 4, "micro_batch": 1}),
    "experts": ("mixtral", "2x2:h100-80gb", {"tp": 2, "zero": 3}),
    "values that skip": ("mlp", "4:cpu", {"pp": 4, "micro_batch": 2}),
}
VOID = {"meta", "link", "br", "hr", "img", "input", "col"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@functools.cache
def planned(name: str) -> Plan:
    which, mesh, given = PLANS[name]
    model, batch = mixtral() if which == "mixtral" else models.build(which, layers=4)
    return autopart.plan(model, mesh, batch, **given)


def mixtral() -> tuple[nn.Module, models.Batch]:
    """A Mixtral of two layers, and a batch for it."""
    config = hf.MixtralConfig(
        vocab_size=models.WORDS, hidden_size=models.WIDTH, intermediate_size=models.WIDTH, num_hidden_layers=2,
        num_attention_heads=models.HEADS, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    return hf.MixtralForCausalLM(config), models.batch_for("mixtral", torch.float32)


@functools.cache
def page(name: str) -> str:
    return report_html(planned(name))[0]


class Page(HTMLParser):
    """The elements of a page; raises where one is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = self.script = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.script += data
        elif "style" not in self.open:
            self.text += data


def numbers_of(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads(Page(text).script, parse_constant=refuse)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", PLANS)
def test_the_numbers_are_the_plans(name: str) -> None:
    plan, told = planned(name), numbers_of(page(name))
    made = autopart.timeline(plan)
    assert told["step_seconds"] == plan.step_seconds and told["bound_seconds"] == plan.bound_seconds
    assert told["mfu"] == pytest.approx(autopart.Estimate.of(plan).mfu)
    assert told["usable_bytes"] == usable_bytes(plan.mesh) and told["slowest_stage"] == slowest_stage(plan)
    ranks = [rank for stage in told["stages"] for rank in range(stage["ranks"][0], stage["ranks"][1] + 1)]
    assert ranks == list(range(plan.mesh.size))
    for stage, row, timed in zip(plan.stages, told["stages"], told["timeline"]["stages"], strict=True):
        assert row["memory"] == dict(stage.memory) and row["memory_bytes"] == stage.memory_bytes
        assert timed["peak_bytes"] == pytest.approx(stage.memory_bytes)
        assert sum(timed["seconds"].values()) == pytest.approx(made.seconds)
        assert timed["seconds"]["backward"] == pytest.approx(plan.micro_batches * stage.backward_seconds)
    assert [dot["seconds"] for dot in told["alternatives"] if dot["chosen"]] == [plan.step_seconds]
    assert plan.search and sum(told["search"]["ended"].values()) == plan.search.points


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_a_stranger_finds_the_slowest_stage_and_what_fills_it(name: str) -> None:
    plan, text = planned(name), Page(page(name)).text
    stage = plan.stages[slowest_stage(plan)]
    most = max(stage.memory, key=lambda kind: stage.memory[kind])
    assert f"Stage {slowest_stage(plan)} is the slowest" in text or plan.pp == 1
    assert f"is filled by {most} ({stage.memory[most] / stage.memory_bytes:.0%})" in text
    for section in ("mesh", "graph", "timeline", "memory", "search", "why", "alternatives"):
        assert any(tag == "section" and found.get("id") == section for tag, found in Page(page(name)).tags)


@pytest.mark.parametrize("name", PLANS)
def test_drawings_are_well_formed_and_inside(name: str) -> None:
    drawings = [xml.fromstring(text) for text in re.findall(r"<svg\b.*?</svg>", page(name), re.S)]
    figures = [drawing for drawing in drawings if drawing.get("class") == "figure"]
    assert len(figures) >= 5
    for drawing in figures:
        _, _, width, height = map(float, drawing.attrib["viewBox"].split())
        for rect in drawing.iter("rect"):
            x, y, w, h = (float(rect.attrib[k]) for k in ("x", "y", "width", "height"))
            assert min(x, y) >= -1 and min(w, h) >= 0 and x + w <= width + 1 and y + h <= height + 1


def test_nothing_is_fetched() -> None:
    """No script that runs, no address of another file."""
    found = Page(page("4 stages")).tags
    assert [attrs.get("type") for tag, attrs in found if tag == "script"] == ["application/json"]
    addresses = [value for _, attrs in found for key, value in attrs.items() if key in ("src", "href", "xlink:href")]
    assert all(value and (value.startswith("#") or value == "data:,") for value in addresses)
    assert "@import" not in page("4 stages") and not re.search(r"url\((?!#)", page("4 stages"))


class Named(nn.Module):
    """A model with a module of a name that is HTML."""

    NAME = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"

    def __init__(self) -> None:
        super().__init__()
        self.add_module(self.NAME, nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, self.NAME)(x).square().mean()


def test_a_name_is_no_html() -> None:
    plan = autopart.plan(Named(), "2:cpu", {"x": torch.randn(4, 8)})
    plan = replace(plan, model=Named.NAME, notes=(Named.NAME,))
    text, told = report_html(plan)
    found = Page(text)
    assert [tag for tag, _ in found.tags].count("script") == 1 and not any(tag == "img" for tag, _ in found.tags)
    assert not any(key.startswith("on") for _, attrs in found.tags for key in attrs)
    assert Named.NAME in found.text  # shown as it is, in the head, the graph and the notes
    assert numbers_of(text)["model"] == told["model"] == Named.NAME


@pytest.mark.slow
def test_128_layers_in_4_stages_are_under_2_mb() -> None:
    model, batch = models.build("llama", layers=128)
    plan = autopart.plan(model, "4:a100-80gb", batch, pp=4, micro_batch=1)
    deep = replace(plan, micro_batch=1, global_batch=2048)  # so many that slices have no box of their own
    for each in (plan, deep):
        text = report_html(each)[0]
        assert len(text.encode()) < 2_000_000
        assert Page(text).text.count("model.layers") > 3


def trace_of(plan: Plan, slower: float, steps: int = 4) -> dict[str, Any]:
    """What `autopart.Trace` would record of steps that take `slower` times as long as predicted; the first more."""
    made, events, start = autopart.timeline(plan), [], 5.0
    for step in range(steps):
        factor = slower * (10 if step == 0 else 1 + step / 10)
        for number, stage in enumerate(made.stages):
            for entry, begin, end in stage.events:
                args = {"op": entry.op.value, "stage": number, "step": step, "micro_batch": entry.micro_batch}
                for rank in range(number * plan.dp * plan.tp, (number + 1) * plan.dp * plan.tp):
                    row = {"ph": "X", "name": entry.op.value, "pid": number, "tid": rank, "args": args}
                    events.append({**row, "ts": (start + begin * factor) * 1e6, "dur": (end - begin) * factor * 1e6})
        start += made.seconds * factor + 1.0
    return {"displayTimeUnit": "ms", "traceEvents": events}


def test_a_measured_step_stands_beside_the_prediction(tmp_path: Path) -> None:
    plan = planned("1f1b")
    file = tmp_path / "trace.json"
    file.write_text(json.dumps(trace_of(plan, 2.0)))
    step = measured_step(file, plan)
    assert (step.step, step.of, step.ranks) == (2, 4, (0, 2))
    seconds = 2.0 * 1.2 * max(end for s in autopart.timeline(plan).stages for _, _, end in s.events)
    assert step.seconds == pytest.approx(seconds)
    plan.report(tmp_path / "report.html", trace=file)
    told = numbers_of((tmp_path / "report.html").read_text())
    for stage, row in zip(plan.stages, told["measured"]["stages"], strict=True):
        assert row["seconds"]["forward"] == pytest.approx(2.4 * plan.micro_batches * stage.forward_seconds)
        assert sum(row["seconds"].values()) == pytest.approx(step.seconds, rel=0.01) or row["seconds"]["idle"] == 0
    assert "measured" in Page((tmp_path / "report.html").read_text()).text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["traceEvents"].clear(), "no whole step"),
        (lambda t: t["traceEvents"].pop(0), None),
        (lambda t: t.pop("traceEvents"), "no trace of a run"),
        (lambda t: t["traceEvents"][0].update(pid=7), "another plan"),
        (lambda t: t["traceEvents"][0]["args"].update(op="dance"), "no trace of a run"),
        (lambda t: t["traceEvents"][0].update(dur=float("nan")), "no trace of a run"),
        (lambda t: t["traceEvents"][0].pop("args"), "no trace of a run"),
    ],
)
def test_other_traces_are_refused(change: Any, message: str | None) -> None:
    plan = planned("1f1b")
    trace = json.loads(json.dumps(trace_of(plan, 1.0)))
    change(trace)
    if message is None:
        assert measured_step(trace, plan).of == 4  # another rank of the stage has what this one lacks
        return
    with pytest.raises(PartitionError, match=message):
        report_html(plan, trace=trace)


def test_the_shell_writes_it_and_says_where(tmp_path: Path) -> None:
    planned("4 stages").save(tmp_path / "plan.json")
    done = CliRunner().invoke(app, ["report", str(tmp_path / "plan.json")])
    assert done.exit_code == 0 and done.stdout.strip() == str(tmp_path / "plan.html")
    assert (tmp_path / "plan.html").read_text() == page("4 stages")
    out = tmp_path / "other.html"
    done = CliRunner().invoke(app, ["report", str(tmp_path / "plan.json"), "-o", str(out), "--json"])
    told = json.loads(done.stdout)
    assert told["file"] == str(out) and told["step_seconds"] == planned("4 stages").step_seconds
    done = CliRunner().invoke(app, ["report", str(tmp_path / "plan.json"), "-o", str(tmp_path / "no" / "folder.html")])
    assert done.exit_code == 2 and "cannot write" in done.stderr and not done.stdout


def test_an_old_plan_without_a_record_of_its_search_has_a_report() -> None:
    data = json.loads(json.dumps(planned("4 stages").to_json()))
    for name in ("history", "ended", "compared"):
        del data["search"][name]
    for stage in data["stages"]:
        del stage["backward_memory"]
    text = report_html(Plan.from_json(data))[0]
    assert "no record of its search" in Page(text).text
    assert "no search" in Page(report_html(replace(planned("4 stages"), search=None))[0]).text


@pytest.mark.parametrize("micro_batches", [8, 1024])
def test_a_plan_of_nothing_has_a_report(micro_batches: int) -> None:
    """Edited by hand: stages without seconds, bytes, operators and messages."""
    stage = planned("4 stages").stages[0]
    empty = replace(
        stage, forward_seconds=0.0, backward_seconds=0.0, sync_seconds=0.0, send_seconds=0.0, memory={}, segments=(),
        sends=(),
    )  # fmt: skip
    plan = replace(planned("4 stages"), stages=(empty,) * 4, micro_batch=1, global_batch=micro_batches, gap=0.0)
    assert numbers_of(report_html(plan)[0])["timeline"]["seconds"] == 0
    without = replace(plan, precision="bfloat16", mesh=Mesh.of("4:v100-16gb"))  # a device that has none
    assert numbers_of(report_html(without)[0])["mfu"] is None


def test_texts_and_ticks() -> None:
    assert [fitting("abcdefgh", n * LETTER) for n in (9, 5, 1)] == ["abcdefgh", "abcd…", ""]
    assert [tick_text(s) for s in (0.02, 0.25, 100.0, 0.0)] == ["20 ms", "250 ms", "100 s", "0"]
    for low, high in ((0.0, 1.0), (1.773, 1.7802), (0.0, 6e-6), (3.0, 3.0)):
        ticks = Scale(low, high, 0, 100).ticks()
        assert 1 <= len(ticks) <= 8 and low - 1e-9 <= ticks[0] and ticks[-1] <= high * (1 + 1e-9)
    assert finite({"a": [1.0, float("inf")], "b": (float("nan"),)}) == {"a": [1.0, None], "b": [None]}


def test_of_many_stages_some_are_drawn_over_time() -> None:
    plan = planned("4 stages")
    assert shown_stages(plan) == [0, 1, 2, 3]
    many = replace(plan, pp=40, stages=tuple(replace(plan.stages[1], send_seconds=i % 7) for i in range(40)))
    shown = shown_stages(many)
    assert len(shown) == 8 and {0, 39, slowest_stage(many)} <= set(shown)


CHECK = """<script>
const found = [];
for (const figure of document.querySelectorAll("svg.figure")) {
  const outer = figure.getBoundingClientRect();
  const texts = [...figure.querySelectorAll("text")].map(e => [e.getBoundingClientRect(), e.textContent]);
  texts.forEach(([a, name], i) => {
    if (a.left < outer.left - 1 || a.right > outer.right + 1 || a.top < outer.top - 1 || a.bottom > outer.bottom + 1)
      found.push(name + " is outside");
    for (const [b, other] of texts.slice(i + 1))
      if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3)
        found.push(name + " overlaps " + other);
  });
}
if (document.documentElement.scrollWidth > document.documentElement.clientWidth) found.push("the page is too wide");
const numbers = JSON.parse(document.getElementById("numbers").textContent);
document.title = JSON.stringify({found, step: numbers.step_seconds});
</script>"""


def opened(file: Path, width: int, *flags: str) -> tuple[str, list[str]]:
    """The page as Chromium has it after its scripts ran, and the lines of its console."""
    assert CHROMIUM
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += [f"--window-size={width},900", f"--user-data-dir={file.parent / 'profile'}", *flags, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [800, 1280])
@pytest.mark.parametrize("name", ["1f1b", "4 stages", "experts"])
def test_chromium_opens_it(name: str, width: int, tmp_path: Path) -> None:
    """No line in the console, no text over another, outside of its drawing or wider than the page."""
    text = report_html(planned(name), trace=trace_of(planned(name), 1.5))[0]
    (tmp_path / "checked.html").write_text(text.replace("</body>", f"{CHECK}</body>"))
    shown, console = opened(tmp_path / "checked.html", width)
    assert not console
    title = re.search("<title>(.*?)</title>", shown, re.S)
    assert title
    told = json.loads(title[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    assert told == {"found": [], "step": planned(name).step_seconds}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_what_chromium_would_find(tmp_path: Path) -> None:
    """A line in the console, and a text that overlaps another, are seen."""
    (tmp_path / "bad.html").write_text("<script>console.error('hm')</script>")
    assert len(opened(tmp_path / "bad.html", 800)[1]) == 1
    figure = '<svg class="figure" viewBox="0 0 99 30"><text x="1" y="15">one</text><text x="2" y="15">two</text></svg>'
    text = page("one device").replace("</header>", f"{figure}</header>", 1).replace("</body>", f"{CHECK}</body>")
    (tmp_path / "overlap.html").write_text(text)
    assert "one overlaps two" in opened(tmp_path / "overlap.html", 800)[0]
