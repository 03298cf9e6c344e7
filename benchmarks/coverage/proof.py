"""How well the op table is proven: on how many calls, in how many ways, and how many wrong rows that catches.

The calls are those of PyTorch's own operator tests and those of this project's; see `tests/support/proof.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

import torch
from opinfo import chosen
from proof import Case, fate, mutants, prove
from rich.console import Console
from rich.table import Table
from samples import SAMPLES

from autopart.sharding.rules import RULES

LIMIT, CALLS = 40, 24
EVERYTHING = 10**6


def measured(name: str, everything: bool) -> tuple[Counter[str], list[str]]:
    """One row's figures and the wrong rows that were not caught."""
    limit, count = (EVERYTHING, None) if everything else (LIMIT, CALLS)
    theirs = [Case(sample) for sample in chosen(name, count, limit)]
    cases = theirs + [Case(sample) for sample in SAMPLES if sample.name == name]
    splits, found, survivors = set(), Counter({"rows": 1, "rows that PyTorch's tests call": bool(theirs)}), []
    for case in cases:
        for strategy, shards in case.own:
            prove(case.sample, strategy, shards)
            splits.add((strategy.inputs, strategy.outputs, strategy.local))
            found["proofs"] += 1
    found.update({"calls of PyTorch's tests": len(theirs), "calls": len(cases), "strategies": len(splits)})
    for mutant in mutants(name, [case.text for case in cases]):
        what = fate(mutant, cases)
        found[f"mutants {what}"] += 1
        if what == "survived":
            survivors.append(str(mutant))
    return found, survivors


def score(found: Counter[str]) -> dict[str, float]:
    """The share of mutants caught, of those that claim something wrong; and without those that no shape fits."""
    proven, refused, survived = (found[f"mutants {what}"] for what in ("disproven", "refused", "survived"))
    return {
        "caught": (proven + refused) / max(proven + refused + survived, 1),
        "caught by proof": proven / max(proven + survived, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every call there is, not some of each row")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, total, survivors = time.perf_counter(), Counter[str](), list[str]()
    for name in RULES:
        found, missed = measured(name, options.all)
        total.update(found)
        survivors += missed
    shares = score(total)
    table = Table("The op table", "", show_header=True)
    for what, number in total.items():
        table.add_row(what, f"{number:,}")
    for what, share in shares.items():
        table.add_row(f"mutants {what}", f"{share:.2%}")
    table.add_row("seconds", f"{time.perf_counter() - start:.0f}")
    console = Console()
    console.print(table, *survivors, sep="\n", markup=False)
    if options.json:
        figures: dict[str, Any] = {"torch": torch.__version__, **total, **shares, "survivors": survivors}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
