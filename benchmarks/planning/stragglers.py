"""Which plan is the fastest under slow devices: the planner's plan beside forced degrees, on 10,000 devices.

Every plan is the shell's own command in a fresh process, as in `cold`. Slow devices have 0.8 of their speed. Steps are
simulated, means over drawn slow ranks, which are the same for all plans of a model.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from autopart import Plan, SlowedStep, Stragglers, compare_stragglers
from benchmarks.planning.cold import Row, command

HOSTS = 1250
FORCED: Mapping[str, Sequence[str]] = {
    "llama-3-70b": ("", "--pp 5 --tp 4", "--pp 10 --tp 8", "--pp 1 --tp 8"),
    "llama-3-405b": ("", "--pp 5 --tp 8", "--pp 25 --tp 8", "--pp 1 --tp 8"),
}
"""Model -> what the planner is asked for; "": the planner's own choice."""

SHARES = (0.0, 0.001, 0.01)
"""Shares of slow devices."""


def planned(model: str, forced: str) -> Plan:
    """The planner's plan with degrees forced."""
    row = Row(model, model, f"{HOSTS}x8:h100-80gb", 8192, 8 * HOSTS)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*command(row, Path(folder)), *forced.split()], check=True, stdout=subprocess.DEVNULL)
        return Plan.load(Path(folder) / "plan.json")


def name_of(plan: Plan, forced: str) -> str:
    """The degrees, the ZeRO level and its ranks."""
    among = f" over {plan.shard_size}" if plan.shard_size else ""
    return f"pp={plan.pp}, dp={plan.dp}, tp={plan.tp}, ZeRO {plan.zero}{among}{'' if forced else ' (planned)'}"


def cell(step: SlowedStep, fastest: bool) -> str:
    """Seconds and their change; bold for the fastest plan."""
    bold = "**" if fastest else ""
    return f"{bold}{step.seconds:.2f} s{bold} ({100 * step.change:+.1f} %)"


def main() -> None:
    """A line for each plan: seconds without slow devices, and with each share of them."""
    print(f"| model, {HOSTS:,} hosts of 8 H100 | plan | {' | '.join(f'{100 * share:g} % slow' for share in SHARES)} |")
    print("|---" * (2 + len(SHARES)) + "|", flush=True)
    for model in sys.argv[1:] or FORCED:
        plans = {name_of(plan := planned(model, forced), forced): plan for forced in FORCED[model]}
        found = [compare_stragglers(plans, Stragglers(devices=share)) for share in SHARES]
        best = [next(iter(steps)) for steps in found]
        for name in plans:
            cells = [cell(steps[name], name == first) for first, steps in zip(best, found, strict=True)]
            print(f"| {model} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
