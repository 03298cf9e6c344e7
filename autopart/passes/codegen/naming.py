"""What emitted values are called."""

from __future__ import annotations

import builtins
import itertools
import keyword
import re
from dataclasses import dataclass, field

from torch import fx

from autopart.ir.graph import Info, info
from autopart.sharding.resharding import RESHARDS

RESERVED = {*keyword.kwlist, *dir(builtins), *(row.function for row in RESHARDS.values()), "torch", "nn", "F", "layer",
            "rms_norm", "weight", "weight_slice", "gathered", "buffer", "stream", "dropout", "uniform", "recomputed",
            "recomputed_selectively", "grouped_linear", "self", "groups", "name"}  # fmt: skip

ATOM, UNARY, BINARY = 3, 2, 1
"""How tightly an expression binds."""


@dataclass(frozen=True)
class Text:
    """An expression with its precedence."""

    code: str
    binds: int = ATOM

    def within(self, binds: int) -> str:
        """The expression as an operand of something that binds so tightly."""
        return self.code if self.binds >= binds else f"({self.code})"


@dataclass
class Scope:
    """One function being written: names in use, and what each node is called."""

    names: dict[fx.Node, Text] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    lines: list[str] = field(default_factory=list)

    def name(self, node: fx.Node, wanted: str) -> str:
        """A fresh name for a node."""
        wanted = re.sub(r"\W", "_", wanted) or "value"
        wanted = f"_{wanted}" if wanted[0].isdigit() else wanted
        numbered = (f"{wanted}_{i}" for i in itertools.count(2))
        name = wanted
        while name in self.taken or name in RESERVED:
            name = next(numbered)
        self.taken.add(name)
        self.names[node] = Text(name)
        return name

    def follow(self, node: fx.Node, source: fx.Node, wanted: str) -> str:
        """The name of `source`, which nothing else uses, if it is one that `node` wants; else a fresh one."""
        name = self.names[source].code if source in self.names else ""
        if len(source.users) == 1 and name in self.taken and re.fullmatch(rf"{re.escape(wanted)}(_\d+)?", name):
            self.names[node] = Text(name)
            return name
        return self.name(node, wanted)


NOUNS = {"scaled_dot_product_attention": "attention", "cross_entropy_loss": "loss", "mean_cross_entropy": "loss",
         "vocab_cross_entropy": "loss", "_to_copy": "cast"}  # fmt: skip


def wanted_name(node: fx.Node) -> str:
    """A name a person might choose: the layer's for products and norms, else the operator's."""
    record: Info = info(node)
    if record.kind == "received":
        return record.name
    if record.name == "autopart.getitem":
        return output_name(*node.args)  # type: ignore[arg-type]
    name = record.name.split(".")[1] if "." in record.name else record.name
    layer = next((part for part in reversed(record.module.split(".")) if part and not part.isdigit()), "")
    products = ("linear", "matmul", "mm", "layer_norm", "rms_norm", "embedding", "conv2d", "vocab_embedding")
    if record.name.startswith("runtime.") and name in ("mean_cross_entropy", "vocab_cross_entropy"):
        return "loss"
    if (name in products or adds_bias(node)) and layer:
        return layer
    if record.name.startswith("runtime.") or name in FOLLOWING:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return wanted_name(source) if source.op == "call_function" else _plain(info(source).name)
    return NOUNS.get(name, name)


OUTPUTS = {name: ("values", "indices") for name in ("topk", "sort", "max", "min", "kthvalue", "mode", "median")} | {
    "_native_batch_norm_legit_functional": ("normed", "mean", "rstd", "running_mean", "running_var")
}


def output_name(node: fx.Node, index: int) -> str:
    """A name for one of several outputs."""
    names = OUTPUTS.get(info(node).name.split(".")[1])
    return names[index] if names else f"{wanted_name(node)}_{index}"


def _plain(name: str) -> str:
    """The last part of a parameter's, input's or received value's name."""
    parts = name.split(".")
    return parts[-2] if parts[-1] in ("weight", "bias") and len(parts) > 1 else parts[-1]


FOLLOWING = {
    "detach",
    "reshape",
    "transpose.int",
    "transpose",
    "permute",
    "unsqueeze",
    "expand",
    "t",
    "squeeze",
    "slice",
    "select",
}
"""Operators whose result goes by the name of what they reshape."""


def adds_bias(node: fx.Node) -> bool:
    other = node.args[1] if len(node.args) > 1 else None
    return info(node).name == "aten.add.Tensor" and isinstance(other, fx.Node) and info(other).kind == "parameter"
