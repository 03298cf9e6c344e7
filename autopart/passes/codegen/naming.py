"""Names of emitted values: the user's variable, else the user's module, else the operator.

A value has the name of the variable that the model's source assigns it to: `query_states` for the projection in
``query_states = self.q_proj(x).view(shape)``. A statement that gives a new value to a variable that it reads, such as
``x = self.norm(x)``, tells less than the module does: the value is named `norm`. A part of a longer expression is named
after its module where the module has one purpose (a product, a norm, an activation), else after its operator.
"""

import weakref
from dataclasses import dataclass

from torch import fx

from autopart.ir.graph import Info, calls, info
from autopart.passes.codegen.statements import Statement, statement_of
from autopart.sharding.resharding import RESHARDS

NOUNS = {
    "scaled_dot_product_attention": "attention",
    **dict.fromkeys(("mean_cross_entropy", "vocab_cross_entropy", "mean_linear_loss", "vocab_linear_loss"), "loss"),
    **dict.fromkeys(("activation", "bias_activation"), "activated"),
    **dict.fromkeys(("swiglu", "geglu", "reglu", "gated_halves"), "gated"),
    "experts": "mixture",
    **dict.fromkeys(("rotary", "rotary_interleaved", "rotary_deinterleaved"), "rotated"),
}
"""Operator -> name of its result, where that is not the operator's."""

OUTPUTS = {name: ("values", "indices") for name in ("topk", "sort", "max", "min", "kthvalue", "mode", "median")} | {
    "_native_batch_norm_legit_functional": ("normed", "mean", "rstd", "running_mean", "running_var"),
    "expert_load": ("tokens_per_expert", "chances"),
}
"""Operator with several results -> their names."""

NORMS = {"layer_norm", "rms_norm", "add_rms_norm", "rms_norm_float32", "add_rms_norm_float32", "add_layer_norm",
         "layer_norm_float32", "group_norm_silu"}  # fmt: skip
BY_MODULE = {"linear", "matmul", "mm", "embedding", "conv1d", "conv2d", "conv3d", "vocab_embedding", *NORMS}
"""Operators that do most of their module's work. Their results are named after the module."""

FOLLOWING = {"detach", "reshape", "transpose", "permute", "unsqueeze", "expand", "t", "squeeze", "slice", "select",
             "pad", "_to_copy", *(row.function for row in RESHARDS.values())}  # fmt: skip
"""Operators that reshape, cast or move a tensor. Their results take the tensor's name."""


@dataclass(frozen=True)
class _Written:
    """What the user's source says of a value.

    variable  what the value is assigned to; "" where it is part of an expression, or returned
    tells     whether the variable is new, not one that the expression reads
    """

    variable: str
    tells: bool


def wanted_name(node: fx.Node) -> str:
    """The name that a value should have in emitted code. The name may be in use, and may be no Python identifier."""
    record: Info = info(node)
    if record.kind in ("input", "parameter", "buffer"):
        return _plain(record.name)
    if record.name == "autopart.getitem":
        return output_name(*node.args)  # type: ignore[arg-type]
    operator, written = _operator(node), _written(node)
    if record.kind == "received":
        return written.variable or record.name
    if operator.endswith("_loss") or NOUNS.get(operator) == "loss":
        return "loss"
    if written.tells and not record.name.startswith("runtime."):
        return written.variable
    if operator in FOLLOWING:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return wanted_name(source)
    module = record.module.rpartition(".")[2]
    if module and not module.isdigit() and (operator in BY_MODULE or adds_bias(node) or _is_returned(node)):
        return module
    return written.variable or NOUNS.get(operator, operator)


def output_name(node: fx.Node, index: int) -> str:
    """The name of one of several outputs: what a fused kernel replaced, else the variable at its place in the assigned
    tuple, else one by the operator."""
    if info(node).outputs:
        return info(node).outputs[index]
    frames = info(node).frames
    statement = statement_of(frames[-1]) if frames else None
    targets = statement.targets if statement is not None else ()
    results = bool(frames) and not any(_is_part(pick, len(frames) - 1) for pick in node.users)
    if results and len(targets) == len(info(node).shapes) and targets[index].strip("_"):
        return targets[index]
    names = OUTPUTS.get(_operator(node))
    return names[index] if names else f"{wanted_name(node)}_{index}"


def argument_name(node: fx.Node) -> str:
    """The name of a value as a parameter of an emitted function."""
    return _written(node).variable or ("hidden" if info(node).grad else wanted_name(node))


def same_statement(node: fx.Node, user: fx.Node) -> bool:
    """Whether both nodes are parts of one expression of the user's."""
    frames = info(node).frames
    return bool(frames) and _is_in(user, node, len(frames) - 1)


def adds_bias(node: fx.Node) -> bool:
    """Whether the node adds a parameter to a value."""
    other = node.args[1] if len(node.args) > 1 else None
    return info(node).name == "aten.add.Tensor" and isinstance(other, fx.Node) and info(other).kind == "parameter"


def _operator(node: fx.Node) -> str:
    """The operator without its family and its overload: ``"transpose"`` of ``"aten.transpose.int"``."""
    name = info(node).name
    return name.split(".")[1] if "." in name else name


def _written(node: fx.Node) -> _Written:
    """What the innermost statement that assigns the value says of it. For a value that a function returns, that is the
    caller's statement, if it is the call alone."""
    frames = info(node).frames
    for depth in reversed(range(len(frames))):
        statement = statement_of(frames[depth])
        if statement is None or (not statement.targets and not statement.returns):
            break
        if statement.targets:
            variable = "" if _is_part(node, depth) else _target(node, depth, statement)
            return _Written(variable, bool(variable) and variable not in statement.reads)
        caller = statement_of(frames[depth - 1]) if depth else None
        if caller is None or not caller.is_call:
            break
    return _Written("", False)


def _target(node: fx.Node, depth: int, statement: Statement) -> str:
    """The variable that a statement assigns the value to.

    Where a call gives a tuple, its results are taken to be the values that the call computes and that later statements
    use. The first result belongs to the first variable, and so on.
    """
    targets = [target for target in statement.targets if target.strip("_")]
    if len(statement.targets) == 1 or not targets:
        return targets[0] if targets else ""
    results = _results(node, depth, statement)
    fits = node in results and (len(results) == len(targets) or results == [node])
    return targets[results.index(node)] if fits and statement.is_call else ""


_GROUPS: weakref.WeakKeyDictionary[fx.Graph, dict[object, list[fx.Node]]] = weakref.WeakKeyDictionary()
"""Graph -> (layer, frames of the calls, place of the statement) -> the results of the statement."""


def _results(node: fx.Node, depth: int, statement: Statement) -> list[fx.Node]:
    """The nodes of a statement whose values later statements use, in order."""
    groups = _GROUPS.get(node.graph)
    if groups is None:
        groups = _GROUPS[node.graph] = {}
        for each in calls(node.graph):
            frames = info(each).frames if _operator(each) not in FOLLOWING else ()
            for d, frame in enumerate(frames):
                place = statement_of(frame)
                if place is not None and len(place.targets) > 1 and each.users and not _is_part(each, d):
                    groups.setdefault((info(each).layer, frames[:d], place.place), []).append(each)
    return groups.get((info(node).layer, info(node).frames[:depth], statement.place), [])


def _is_part(node: fx.Node, depth: int) -> bool:
    """Whether the statement of frame `depth` uses the value, other than to reshape, cast or move it."""
    return any(
        _operator(user) not in FOLLOWING or _is_part(user, depth) for user in node.users if _is_in(user, node, depth)
    )


def _is_in(user: fx.Node, node: fx.Node, depth: int) -> bool:
    """Whether `user` runs in the statement of frame `depth` of `node`, by the same calls."""
    if user.op != "call_function" or info(user).layer != info(node).layer:
        return False
    mine, others = info(node).frames[: depth + 1], info(user).frames[: depth + 1]
    if min(len(mine), len(others)) <= depth or mine[:depth] != others[:depth] or mine[depth].file != others[depth].file:
        return False
    one, other = statement_of(mine[depth]), statement_of(others[depth])
    return one is not None and other is not None and one.place == other.place


def _is_returned(node: fx.Node) -> bool:
    """Whether a `return` of the user's gives the value as it is."""
    frames = info(node).frames
    statement = statement_of(frames[-1]) if frames else None
    return statement is not None and statement.returns and not _is_part(node, len(frames) - 1)


def _plain(name: str) -> str:
    """The telling part of an input's, parameter's or buffer's name: ``q_proj`` of ``layers.0.q_proj.weight``."""
    parts = name.split(".")
    return parts[-2] if parts[-1] in ("weight", "bias") and len(parts) > 1 else parts[-1]
