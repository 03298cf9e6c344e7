"""A plan: what was decided, and what it costs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopart.errors import PartitionError
from autopart.ir.layered_graph import LayeredGraph
from autopart.plan.fields import PlanFields
from autopart.plan.graph import graph
from autopart.plan.host_traffic import bytes_between_hosts
from autopart.plan.plan_json import json_text, plan_from_json, plan_to_json
from autopart.plan.signature import Signature
from autopart.plan.text import describe, head

if TYPE_CHECKING:
    import networkx

    from autopart.plan.report import Extras


@dataclass(frozen=True)
class Plan(PlanFields):
    """A decided parallelisation of one model on one mesh: `PlanFields`, which are checked and kept as JSON, printed as
    text, and given as a graph."""

    @property
    def head(self) -> str:
        """The configuration in one line."""
        return head(self)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json_text(self.to_json()) + "\n")

    def to_json(self) -> dict[str, Any]:
        """The plan as dicts, lists, numbers and text."""
        return plan_to_json(self)

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan that `save` wrote. Raises PartitionError for anything else."""
        try:
            data = json.loads(Path(path).read_text())
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise PartitionError(f"cannot read the plan {path}", str(error)) from error
        return Plan.from_json(data)

    @staticmethod
    def from_json(data: Any) -> Plan:
        """The inverse of `to_json`. Raises PartitionError for anything else."""
        return plan_from_json(data, Plan)

    def report(self, path: str | Path, *, trace: str | Path | None = None, extras: Extras | None = None) -> None:
        """Write the plan as one HTML page; `trace` is the file of an `autopart.Trace` of its run, and `extras` what
        `autopart.report_extras` found. Raises PartitionError for the trace of another plan, and where the file cannot
        be written."""
        from autopart.plan.report import write_report

        try:
            write_report(self, path, trace=trace, extras=extras)
        except OSError as error:
            raise PartitionError(f"cannot write {path}", str(error)) from error

    def check(self, layered: LayeredGraph) -> None:
        """Raise PartitionError, naming the difference, unless the plan was made for this traced model."""
        difference = self.signature.difference(Signature.of(layered))
        if difference:
            raise PartitionError("the plan is for another model", difference, "plan again with autopart.plan(...)")

    @property
    def bytes_between_hosts(self) -> float:
        """Bytes of a step that cross from one host to another (`autopart.plan.host_traffic`)."""
        return bytes_between_hosts(self)

    def graph(self) -> networkx.DiGraph:
        """The plan's operators as a graph (`autopart.plan.graph`)."""
        return graph(self)

    def __str__(self) -> str:
        return describe(self)
