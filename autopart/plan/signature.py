"""The traced model that a plan is for: its parameters, inputs and operators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autopart.ir.graph import info, placeholders
from autopart.ir.layered_graph import LayeredGraph


@dataclass(frozen=True)
class Signature:
    """The traced model that a plan is for, in a form that can name a difference.

    hash        of the traced graph
    parameters  name -> shape
    inputs      name -> shape, with -1 for the number of samples
    operators   number of calls of the graph
    dtype       of the first parameter; empty where there are none
    """

    hash: str
    parameters: Mapping[str, tuple[int, ...]]
    inputs: Mapping[str, tuple[int, ...]]
    operators: int
    dtype: str

    @staticmethod
    def of(layered: LayeredGraph) -> Signature:
        """The signature of a traced model."""
        graph = layered.traced.graph
        dtypes = [info(n).dtype for n in placeholders(graph, "parameter")]
        return Signature(
            layered.hash,
            layered.parameters(),
            {info(n).name: (-1, *info(n).shape[1:]) for n in placeholders(graph, "input")},
            layered.operators,
            str(dtypes[0]).removeprefix("torch.") if dtypes else "",
        )

    @property
    def tokens(self) -> int | None:
        """Tokens of a sample: the second dim of `input_ids`; None where there is no such input of two dims."""
        shape = self.inputs.get("input_ids", ())
        return shape[1] if len(shape) == 2 else None

    def difference(self, other: Signature) -> str:
        """The first difference from another signature, in words; "" if there is none."""
        if self.hash == other.hash:
            return ""
        for kind in ("parameters", "inputs"):
            mine, theirs = getattr(self, kind), getattr(other, kind)
            for name in [*mine, *theirs]:
                if mine.get(name) != theirs.get(name):
                    here = f"has shape {list(mine[name])}" if name in mine else "does not exist"
                    there = f"has shape {list(theirs[name])}" if name in theirs else "does not exist"
                    return f"{kind[:-1]} {name} {here} in the plan and {there} in the model"
        if self.dtype != other.dtype:
            return f"the plan is for {self.dtype}, the model is {other.dtype}"
        if self.operators != other.operators:
            return f"the plan has {self.operators} operators, the model {other.operators}"
        return "an operator or one of its arguments differs"
