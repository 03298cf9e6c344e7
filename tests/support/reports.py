"""Plans and pages of the tests of reports, and traces that a run of a plan would leave."""

from __future__ import annotations

import functools
import json
from html.parser import HTMLParser
from typing import Any

import models
import torch
import transformers as hf
from torch import nn

import autopart
from autopart import Plan
from autopart.plan.report import report_html

PLANS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "one device": ("mlp", "1:cpu", {}),
    "1f1b": ("llama", "4:cpu", {"tp": 2, "pp": 2, "micro_batch": 4}),
    "4 stages": ("llama", "4:a100-80gb", {"pp": 4, "micro_batch": 1}),
    "experts": ("mixtral", "2x2:h100-80gb", {"tp": 2, "zero": 3}),
    "values that skip": ("mlp", "4:cpu", {"pp": 4, "micro_batch": 2}),
}
VOID = {"meta", "link", "br", "hr", "img", "input", "col"}


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
