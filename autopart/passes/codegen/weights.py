"""The attributes of an emitted module: its weights, buffers and streams of random numbers."""

import re
from collections.abc import Sequence

import torch
from torch import fx

from autopart.ir.graph import Info, info
from autopart.passes.codegen.lines import comment, indent
from autopart.passes.codegen.module import StageModule
from autopart.passes.codegen.scope import Expression, Scope


def weight_lines(
    module: StageModule, parameters: Sequence[fx.Node], scope: Scope, prefix: str = "", variable: str = ""
) -> list[str]:
    """The lines of `__init__` that make `parameters`. The expressions that read the parameters are put into the scope.

    prefix    path of the block that the module is; "" for a stage
    variable  Python variable that holds the path, by which names that begin with `prefix` are written
    """
    return [_weight_line(module, node, scope, prefix, variable) for node in parameters]


def _weight_line(module: StageModule, node: fx.Node, scope: Scope, prefix: str, variable: str) -> str:
    record, used = info(node), module.printer.used
    own, quoted = _own_name(record.name, prefix, variable)
    attribute = scope.attribute(own)
    scope.names[node] = Expression(f"self.{attribute}")
    if record.kind == "stream":
        used.add("stream")
        return f"self.{attribute} = stream(groups, {quoted})"
    kind = "buffer" if record.kind == "buffer" else "weight_slice" if module.is_sliced(node) else "weight"
    used.add(kind)
    if kind == "weight_slice":
        used.add("gathered")
        scope.names[node] = Expression(f"weights.{attribute}" if prefix else f"gathered(self.{attribute})")
    dtype = _dtype(record, module.settings.master if kind == "weight_slice" else None)
    frozen = "" if record.grad or kind == "buffer" else ", requires_grad=False"
    placed = "".join(f', {axis}="{p}"' for axis, p in record.placed)
    return comment(f"self.{attribute} = {kind}(groups, {quoted}, {list(record.whole)}{dtype}{frozen}{placed})")


def _own_name(name: str, prefix: str, variable: str) -> tuple[str, str]:
    """The name of a parameter within its module, and its whole name as a Python expression."""
    if not prefix or re.match(rf"{re.escape(prefix)}(?!\w)", name) is None:
        return name, f'"{name}"'
    rest = name.removeprefix(prefix)
    own = rest[1:] if rest[:1] == "." else f"draws{rest}"
    return own, f'f"{{{variable}}}{rest}"' if rest else variable


def _dtype(record: Info, master: str | None) -> str:
    """The arguments for the dtype of a weight; "" for float32."""
    if master:
        return f", dtype=torch.{master}, used={record.dtype}"
    return "" if record.dtype == torch.float32 else f", dtype={record.dtype}"


def init_lines(parameters: str, lines: Sequence[str], body: Sequence[str], valid: bool = False) -> list[str]:
    """The lines of the method `__init__`: the axes and the device that the lines `body` of methods read, then `lines`.

    `valid` says whether the module counts valid targets.
    """
    axes = [a for a in ("dp", "tp", "device") if any(re.search(rf"self\.{a}\b", line) for line in body)]
    return [
        f"    def __init__(self, {parameters}):",
        "        super().__init__()",
        *[f"        self.{axis} = groups.{axis}" for axis in axes],
        *(["        self.valid = {}"] if valid else []),
        *indent(lines),
    ]
