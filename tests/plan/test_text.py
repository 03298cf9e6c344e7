"""Plans as text: within a width, with every number whole."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from models import build

import autopart
from autopart import Plan
from autopart.plan.layout import paragraph, wrapped
from autopart.plan.text import describe, memory_text

QUANTITY = re.compile(r"[\d,.]*\d (?:s|ms|us|B|KiB|MiB|GiB)\b|[\d.]+%")


@pytest.fixture(scope="module")
def plan() -> Plan:
    model, batch = build("gpt2", layers=4)
    return autopart.plan(model, "4:cpu", batch)


@pytest.mark.parametrize("width", [60, 80, 99, 120])
def test_lines_are_within_the_width_and_no_number_is_cut(plan: Plan, width: int) -> None:
    text, whole = describe(plan, width), describe(plan, 1000)
    assert max(map(len, text.splitlines())) <= width
    assert sorted(QUANTITY.findall(text)) == sorted(QUANTITY.findall(whole))


def test_three_sentences_stand_in_front_of_the_stages(plan: Plan) -> None:
    front = describe(plan, 1000).partition("\nstage 0")[0].splitlines()
    assert [line.split()[0] for line in front[2:]] == ["Chosen:", "Runner-up:", front[4].split()[0]]
    assert "limits the plan" in front[4]
    assert len(describe(replace(plan, search=None), 1000).partition("\nstage 0")[0].splitlines()) == 2


def test_the_kinds_of_bytes_that_are_alive_at_the_peak_are_told(plan: Plan) -> None:
    memory = {"parameters": 1024.0, "gradients": 0.0, "activations": 4096.0, "transient": 512.0}
    assert memory_text(memory) == "parameters 1.0 KiB, activations 4.0 KiB, transient 512 B"
    assert all(number >= 0 for stage in plan.stages for number in stage.memory.values())


def test_long_words_are_broken_before_letters_alone() -> None:
    assert wrapped("scaled_dot_product_attention", 12) == ["scaled_dot_", "product_", "attention"]
    assert wrapped("takes 12.50 ms in layers.10", 12) == ["takes", "12.50 ms in", "layers.10"]
    assert list(paragraph("one two three", 8, 1, 1)) == [" one", "  two", "  three"]
