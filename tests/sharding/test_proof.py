"""Every row of the op table is proven on calls from PyTorch's own operator tests, and wrong rows are caught.

A row needs nothing but itself where those tests call the operator. Where they do not, it needs a sample in
`tests/support/samples.py`, on which `test_rules` proves it.
"""

from __future__ import annotations

import os
import random
from functools import cache

import pytest
from proof import Case, Mutant, fate, mutants
from samples import SAMPLES

from autopart.sharding.rules import RULES

ALL = "AUTOPART_EXAMPLES" in os.environ
CALLS = 24 if ALL else 10
"""How many of PyTorch's calls a row is proven on."""
LIMIT = 40
"""How many samples of one of PyTorch's tests are looked at."""
MUTANTS = 16 if ALL else 8
"""How many wrong versions of a row are tried."""


@cache
def cases(name: str) -> list[Case]:
    """PyTorch's calls of a row's operator."""
    from opinfo import chosen  # seconds of import, which one worker of two needs

    return [Case(sample) for sample in chosen(name, CALLS, LIMIT)]


@cache
def own(name: str) -> list[Case]:
    """Calls of a row's operator written for it."""
    return [Case(sample) for sample in SAMPLES if sample.name == name]


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_row(name: str) -> None:
    assert cases(name) or own(name), "PyTorch's tests do not call it: it needs a sample in tests/support/samples.py"
    for case in cases(name):
        for strategy, shards in case.own:
            case.prove(strategy, shards)


def some(name: str) -> list[Mutant]:
    """A few of a row's mutants, always the same."""
    found = mutants(name, [case.text for case in (*own(name), *cases(name))])
    return random.Random(name).sample(found, min(MUTANTS, len(found)))


@pytest.mark.slow
def test_wrong_rows_are_caught() -> None:
    fates = [(mutant, fate(mutant, [*own(name), *cases(name)])) for name in RULES for mutant in some(name)]
    caught = sum(found == "disproven" for _, found in fates)
    survivors = [str(mutant) for mutant, found in fates if found == "survived"]
    assert caught > len(RULES)
    assert len(survivors) <= 0.01 * caught, "\n".join(survivors)
