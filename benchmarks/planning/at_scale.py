"""Plans for 10,000 and 100,000 devices: what is chosen, among how many ranks ZeRO divides, and what planning took.

Every row is the shell's own command in a fresh process, as in `cold`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.planning.cold import Row, command

ROWS = tuple(
    Row(f"{model} on {hosts} hosts", model, f"{hosts}x8:h100-80gb", 8192, 8 * hosts)
    for model in ("llama-3-70b", "llama-3-405b")
    for hosts in (1250, 12500)
)


def main() -> None:
    """Plan every row; a line for each."""
    for row in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(command(row, Path(folder)), check=True, stdout=sys.stderr)
            plan = json.loads((Path(folder) / "plan.json").read_text())
        degrees = ", ".join(f"{axis}={plan[axis]}" for axis in ("pp", "dp", "tp"))
        among = plan["shard_size"] or plan["dp"]
        print(
            f"{row.name}: {degrees}, {plan['global_batch'] // plan['micro_batch']} micro-batches, ZeRO {plan['zero']} "
            f"over {among}, {plan['step_seconds']:.2f} s, gap {plan['gap']:.1%}, planned in "
            f"{plan['planning_seconds']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
