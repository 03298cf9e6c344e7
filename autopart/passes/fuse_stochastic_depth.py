"""residual + drop path (x) becomes one operator on GPUs, before `fuse` looks for other kernels.

Models write it with uniform numbers u of shape (samples, 1, ...), a share p = 1 - keep of samples that are dropped, and
one of

    residual + x / keep * floor(u + keep)        transformers
    residual + x * (bernoulli(keep) / keep)      timm, torchvision; bernoulli(keep) is u >= p

A sample stays where u >= p: the operator draws the same. It reads or writes x three times, the separate operators seven
times. A norm with the addition inside would save one of those: the norm is left alone.
"""

from torch import fx

from autopart.ir.graph import calls, info, new_call, update_info
from autopart.ir.random_ops import Stream, stochastic_depth
from autopart.passes.fuse_dropout import is_inside, summands
from autopart.passes.traffic import traffic

DEPTH = "stochastic_depth"
"""The operator, as `no_fuse` names it."""


def fuse_stochastic_depth(graph: fx.Graph) -> None:
    """Replace additions of what a drop path leaves, in place; what is replaced is left without readers."""
    for add in calls(graph):
        first, second = summands(add) or (add, add)
        for dropped, residual in ((first, second), (second, first)):
            alike = info(dropped).shape == info(residual).shape and is_inside(dropped, add)
            if not alike or (found := _drop_path(dropped)) is None:
                continue
            x, p, stream, inside = found
            with graph.inserting_before(add):
                call = new_call(graph, stochastic_depth, (x, residual, p, stream), add)
            update_info(call, fused=traffic(call), unfused=sum(map(traffic, (*inside, dropped, add))))
            add.replace_all_uses_with(call)
            break


def _drop_path(product: fx.Node) -> tuple[fx.Node, float, Stream, list[fx.Node]] | None:
    """x, p, the stream and the operators before the product, of x and a factor for each sample; else None."""
    for x, share in (_factors(product), _factors(product)[::-1]):
        if isinstance(x, fx.Node) and (found := _by_chance(x, share, product)):
            return found
    for scaled, stays in (_factors(product), _factors(product)[::-1]):
        made = _above(stays, "aten.floor", product)
        sum_ = made and _above(made.args[0], "aten.add.Tensor", made)
        quotient = _above(scaled, "aten.div.Tensor", product)
        if not made or not sum_ or not quotient or len(sum_.args) != 2 or len(quotient.args) != 2:
            continue
        keep, drawn = sum_.args[1], _uniform(sum_.args[0], sum_)
        x = quotient.args[0]
        if drawn is None or not isinstance(x, fx.Node) or not isinstance(keep, float) or quotient.args[1] != keep:
            continue
        if _of_samples(drawn[-1], x) and info(quotient).dtype == info(x).dtype == info(product).dtype:
            stream = next(a for a in drawn[-1].args if isinstance(a, Stream))
            return x, 1.0 - keep, stream, [quotient, made, sum_, *drawn]
    return None


def _by_chance(x: fx.Node, share: object, product: fx.Node) -> tuple[fx.Node, float, Stream, list[fx.Node]] | None:
    """As `_drop_path`, of x * ((u >= p) / keep)."""
    quotient = _above(share, "aten.div.Tensor", product)
    cast = quotient and _above(quotient.args[0], "aten._to_copy", quotient)
    stays = cast and _above(cast.args[0], "aten.ge.Scalar", cast)
    if not quotient or not cast or not stays:
        return None
    keep, p, drawn = quotient.args[1], stays.args[1], _uniform(stays.args[0], stays)
    if drawn is None or not isinstance(keep, float) or p != 1.0 - keep or not _of_samples(drawn[-1], x):
        return None
    stream = next(a for a in drawn[-1].args if isinstance(a, Stream))
    alike = info(quotient).dtype == info(x).dtype == info(product).dtype
    return (x, 1.0 - keep, stream, [quotient, cast, stays, *drawn]) if alike else None


def _factors(node: fx.Node) -> tuple[object, ...]:
    """Both factors of a product; twice None of another operator."""
    return node.args[:2] if info(node).name == "aten.mul.Tensor" else (None, None)


def _above(node: object, name: str, reader: fx.Node) -> fx.Node | None:
    """A node if it is a call of this operator, of the reader's block, that nothing else reads; else None."""
    fits = isinstance(node, fx.Node) and node.op == "call_function" and info(node).name == name
    return node if fits and is_inside(node, reader) else None  # type: ignore[arg-type, return-value]


def _uniform(node: object, reader: fx.Node) -> list[fx.Node] | None:
    """The operators that draw uniform numbers, the last of which draws; those before cast them to half precision."""
    found = []
    for name in ("aten.clamp_max", "aten._to_copy"):
        if cast := _above(node, name, reader):
            found.append(cast)
            node, reader = cast.args[0], cast
    drawn = _above(node, "autopart.uniform_of", reader) or _above(node, "autopart.uniform", reader)
    return [*found, drawn] if drawn else None


def _of_samples(drawn: fx.Node, x: fx.Node) -> bool:
    """Whether there is a number for each index of dim 0 of x."""
    shape = info(x).shape
    return bool(shape) and info(drawn).shape == (shape[0], *[1] * (len(shape) - 1))
