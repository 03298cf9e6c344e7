"""The report of a plan: its numbers, its drawings, its size, and that nothing of a plan is read as HTML."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as xml
from dataclasses import replace
from pathlib import Path

import models
import pytest
import torch
from reports import PLANS, Page, numbers_of, page, planned, trace_of
from torch import nn
from typer.testing import CliRunner

import autopart
from autopart import Mesh, Plan
from autopart.cli.main import app
from autopart.hardware.mesh import usable_bytes
from autopart.plan.breakdown import slowest_stage
from autopart.plan.report import report_html
from autopart.plan.report.drawing import LETTER, Scale, fitting, tick_text
from autopart.plan.report.memory import shown_stages
from autopart.plan.report.numbers import finite

pytestmark = pytest.mark.usefixtures("traced_once")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


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
