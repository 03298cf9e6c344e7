"""Proof that a row of the op table is right: the operator run on the shards gives what it gives on the whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from autopart.ir.graph import has_gradient
from autopart.ir.random_ops import dropout, dropout_attention, residual_dropout, returned, stochastic_depth
from autopart.kernels.table import KERNELS
from autopart.sharding.notation import Dim, Factor, Operand, Placement, Shape, Strategy, parse
from autopart.sharding.rules import RULES, flatten, local_args, local_shape, strategies
from autopart.sharding.rules.base import Args, Rule

Tensors = list[torch.Tensor]
Op = Callable[..., Any]
Kwargs = dict[str, Any]
RANDOM = torch.Generator().manual_seed(0)
ATTENTION = "aten.scaled_dot_product_attention"
COUNTS = (2, 3, 4, 5)
"""Numbers of shards."""

TELLING = 1e-6
"""Far above the tolerance."""

Claims = dict[tuple[Strategy, int], None]
aten = torch.ops.aten


class Sample(NamedTuple):
    """One call of an operator.

    `hints` are placements that a consumer would like, `constants` are the tensors that cannot have a gradient.
    """

    name: str
    args: Args
    kwargs: Kwargs
    hints: tuple[Placement, ...] = ()
    constants: tuple[int, ...] = ()

    @property
    def op(self) -> Op:
        return resolve(self.name)


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, transposed: bool) -> torch.Tensor:
    weight = weight if transposed else weight.transpose(1, 2)
    return torch.einsum("sk,skn->sn", x, weight[ids])


def uniform(like: torch.Tensor, stream: str, dtype: torch.dtype) -> torch.Tensor:
    """A constant: the numbers themselves depend on the place, which other tests are about."""
    return torch.full_like(like, 0.5, dtype=dtype)


def uniform_of(size: Sequence[int], dtype: torch.dtype, stream: str) -> torch.Tensor:
    return torch.full(size, 0.5, dtype=dtype)


OWN = (dropout, dropout_attention, residual_dropout, stochastic_depth, returned, grouped_linear, uniform, uniform_of)
OWN = {f"autopart.{k.__name__}": k for k in OWN}
OWN |= {f"autopart.{name}": kernel.function for name, kernel in KERNELS.items()}


def resolve(name: str) -> Op:
    """The operator a row is about."""
    if name in OWN:
        return OWN[name]
    space, packet, overload = (*name.split("."), "default")[:3]
    return getattr(getattr(getattr(torch.ops, space), packet), overload)


def f(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=RANDOM, dtype=torch.float64)


def z(*shape: int) -> torch.Tensor:
    return torch.complex(f(*shape), f(*shape))


def i(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(high, shape, generator=RANDOM)


def swapped(value: Any, tensors: Iterator[Any]) -> Any:
    """`value` with its tensors, in order, replaced."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, (list, tuple)):
        return type(value)(swapped(v, tensors) for v in value)
    return value


def ways(sample: Sample, shards: int) -> list[Strategy]:
    sizes = swapped(sample.args, (t.shape for t in tensors_of(sample)))
    outputs = [o.shape for o in called(sample.op, sample.args, sample.kwargs)]
    return strategies(sample.name, sizes, outputs, shards, sample.hints)


def tensors_of(sample: Sample) -> Tensors:
    return [a for a in flatten(sample.args) if isinstance(a, torch.Tensor)]


def called(op: Op, args: Args, kwargs: Kwargs) -> Tensors:
    result = op(*args, **kwargs)
    return list(result) if isinstance(result, (list, tuple)) else [result]


def shards_of(whole: torch.Tensor, placement: Placement, shards: int) -> Tensors:
    """Every rank's piece of a split tensor."""
    segments = whole.split(placement.parts or whole.shape[placement.dim], placement.dim)
    pieces = zip(*(s.tensor_split(shards, placement.dim) for s in segments), strict=True)
    return [torch.cat(piece, placement.dim) for piece in pieces]


def joined(pieces: Tensors, placement: Placement) -> torch.Tensor:
    """The inverse of `shards_of`."""
    dim, shards = placement.dim, len(pieces)
    parts = placement.parts or (pieces[0].shape[dim] * shards,)
    segments = zip(*(p.split([n // shards for n in parts], dim) for p in pieces), strict=True)
    return torch.cat([t for segment in segments for t in segment], dim)


def partial_sums(whole: torch.Tensor, shards: int) -> Tensors:
    """Random tensors that sum to `whole`."""
    integers = lambda *shape: i(9, *shape).to(whole.dtype)  # noqa: E731
    draw = z if whole.is_complex() else f if whole.is_floating_point() else integers
    rest = [draw(*whole.shape) for _ in range(shards - 1)]
    return [whole - sum(rest), *rest]


def placed(whole: torch.Tensor, placement: Placement, shards: int) -> Tensors:
    """What every rank holds of `whole`."""
    if placement.kind == "S":
        return shards_of(whole, placement, shards)
    return partial_sums(whole, shards) if placement.kind == "P" else [whole] * shards


def total(pieces: Tensors) -> torch.Tensor:
    """The sum of partial sums; that of flags is none of a flag."""
    dtype = pieces[0].dtype
    return torch.stack(pieces).sum(0, dtype=None if dtype is torch.bool else dtype)


def check(held: Tensors, whole: torch.Tensor, placement: Placement, what: str) -> None:
    """Fail unless what the ranks hold, placed so, is `whole`."""
    if placement.kind in "SP":
        held = [joined(held, placement) if placement.kind == "S" else total(held)]
    near = 1e-5 if "_float32 " in what else 1e-8  # these compute in float32
    for value in held:
        if not same(value, whole, near):  # `assert_close` is slow: it tells what differs
            torch.testing.assert_close(
                value, whole, rtol=near, atol=near, equal_nan=True, msg=lambda text: f"{what}: {text}"
            )


def same(value: torch.Tensor, whole: torch.Tensor, near: float) -> bool:
    """Whether two tensors are of the same shape and dtype, and equal or near."""
    if value.shape != whole.shape or value.dtype != whole.dtype:
        return False
    return torch.equal(value, whole) or (
        has_gradient(whole.dtype) and torch.allclose(value, whole, near, near, equal_nan=True)
    )


DUAL = {"R": "R", "C": "P", "S": "S", "P": "R", "M": "P"}


def gradient(placement: Placement) -> Placement:
    """Where the gradient of a tensor placed so lies."""
    return placement if placement.kind == "S" else Placement(DUAL[placement.kind])


def mean(op: Op, ranks: list[Args], kwargs: Kwargs, whole: Args) -> list[Tensors]:
    return [[o / len(ranks) for o in called(op, args, kwargs)] for args in ranks]


def cross_entropy_sum(op: Op, ranks: list[Args], kwargs: Kwargs, whole: Args) -> list[Tensors]:
    if len(whole[1].shape) == 2:  # of a linear map: (hidden, weight, targets, ...)
        ignored = whole[4] if len(whole) > 4 else -100
        count = (whole[2] != ignored).sum()
        return [[op(*args) * (args[2] != ignored).sum() / count] for args in ranks]
    _, _, weight, _, ignored, smoothing = (*whole, *(None, 1, -100, 0.0)[len(whole) - 2 :])
    count = (whole[1] != ignored).sum()
    return [[op(x, target, weight, 2, ignored, smoothing) / count] for x, target, *_ in ranks]


def vocab_embedding(op: Op, ranks: list[Args], kwargs: Kwargs, whole: Args) -> list[Tensors]:
    def one(rank: int, weight: torch.Tensor, ids: torch.Tensor, padding: int = -1) -> torch.Tensor:
        ids, padding = ids - rank * len(weight), padding - rank * len(weight)
        mine = (ids >= 0) & (ids < len(weight))
        found = op(weight, ids * mine, padding if 0 <= padding < len(weight) else -1)
        return found * mine.unsqueeze(-1)

    return [[one(rank, *args[:3])] for rank, args in enumerate(ranks)]


def vocab_cross_entropy(op: Op, ranks: list[Args], kwargs: Kwargs, whole: Args) -> list[Tensors]:
    """The formula alone, over all ranks at once; tests with real processes prove its collectives."""
    target, ignored = whole[1], (*whole, *(None, 1, -100)[len(whole) - 2 :])[4]
    top = torch.stack([x.detach().amax(-1) for x, *_ in ranks]).amax(0)
    log_sum = top + sum((x - top[:, None]).exp().sum(-1) for x, *_ in ranks).log()
    at = [target - rank * x.shape[1] for rank, (x, *_) in enumerate(ranks)]
    mine = [(t >= 0) & (t < x.shape[1]) for t, (x, *_) in zip(at, ranks, strict=True)]
    hits = sum(x.gather(1, (t * m)[:, None])[:, 0] * m for (x, *_), t, m in zip(ranks, at, mine, strict=True))
    valid = target != ignored
    return [[((log_sum - hits) * valid).sum() / valid.sum()]] * len(ranks)


def vocab_linear_loss(op: Op, ranks: list[Args], kwargs: Kwargs, whole: Args) -> list[Tensors]:
    """The formula alone, of the logits of all ranks; tests with real processes prove its collectives."""
    _, _, targets, _, ignored, _, _, softcap, scale, divisor = (
        *whole, *(-100, 0.0, None, 0.0, 1.0, 1.0)[len(whole) - 4 :]
    )  # fmt: skip

    def logits(args: Args) -> torch.Tensor:
        x = torch.nn.functional.linear(*args[:2], args[3]).flatten(0, -2) * scale / divisor
        return torch.tanh(x / softcap) * softcap if softcap else x

    each = [(logits(args), args[2]) for args in ranks]
    return vocab_cross_entropy(op, each, kwargs, (each[0][0], targets, None, 1, ignored))


def plain(op: Op, ranks: list[Args], kwargs: Kwargs, whole: Args) -> list[Tensors]:
    return [called(op, args, kwargs) for args in ranks]


def experts_of_rank(op: Op, ranks: list[Args], kwargs: Kwargs, whole: Args) -> list[Tensors]:
    def one(rank: int, x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, transposed: bool) -> torch.Tensor:
        ids = ids - rank * len(weight)
        mine = (ids >= 0) & (ids < len(weight))
        return op(x, weight, ids * mine, transposed) * mine.unsqueeze(-1)

    return [[one(rank, *args)] for rank, args in enumerate(ranks)]


def own_experts(op: Op, ranks: list[Args], kwargs: Kwargs, whole: Args) -> list[Tensors]:
    return [[op(*args, rank * len(args[1]))] for rank, args in enumerate(ranks)]


def narrow_experts(op: Op, ranks: list[Args], kwargs: Kwargs, whole: Args) -> list[Tensors]:
    return [[op(*args, 0, rank == 0)] for rank, args in enumerate(ranks)]


LOCAL = {"": plain, "narrow_experts": narrow_experts, "own_experts": own_experts} | {
    k.__name__: k for k in (mean, cross_entropy_sum, vocab_embedding, vocab_cross_entropy, vocab_linear_loss)
}
LOCAL["grouped_linear"] = experts_of_rank


def differentiable(tensors: Sequence[torch.Tensor]) -> list[int]:
    return [k for k, t in enumerate(tensors) if t.requires_grad]


def leaves(tensors: Sequence[torch.Tensor], constants: Sequence[int]) -> Tensors:
    wants = [has_gradient(t.dtype) and k not in constants for k, t in enumerate(tensors)]
    return [t.detach().clone().requires_grad_(w) for t, w in zip(tensors, wants, strict=True)]


def gradients(outputs: Tensors, inputs: Tensors, cotangents: Tensors) -> Tensors:
    """Of the differentiable inputs."""
    wanted = [t for t in inputs if t.requires_grad]
    at = differentiable(outputs)
    given = [cotangents[k] for k in at]
    return list(torch.autograd.grad([outputs[k] for k in at], wanted, given, True, materialize_grads=True))


class Whole(NamedTuple):
    """A call run whole: its outputs, random gradients of these, and the gradients of its differentiable inputs."""

    args: Args
    outputs: Tensors
    cotangents: Tensors
    expected: Tensors | None


def whole_of(sample: Sample) -> Whole:
    """The call, whose tensors it leaves as they are."""
    inputs = leaves(tensors_of(sample), sample.constants)
    args = swapped(sample.args, iter(inputs))
    outputs = called(sample.op, args, sample.kwargs)
    if not differentiable(outputs) or not differentiable(inputs):
        return Whole(args, outputs, [], None)
    cotangents = [(z if o.is_complex() else f)(*o.shape) for o in outputs]
    return Whole(args, [o.detach() for o in outputs], cotangents, gradients(outputs, inputs, cotangents))


def prove(sample: Sample, strategy: Strategy, shards: int, whole: Whole | None = None) -> None:
    """Fail unless the split run gives the outputs and input gradients of the whole, which may be known."""
    what = f"{sample.name} {strategy} over {shards}"
    args, outputs, cotangents, expected = whole or whole_of(sample)
    inputs = leaves(tensors_of(sample), sample.constants)
    took = [p for p in strategy.inputs if p is not None]
    held = [placed(t.detach(), p, shards) for t, p in zip(inputs, took, strict=True)]
    local_inputs = [leaves([h[rank] for h in held], sample.constants) for rank in range(shards)]
    sizes = [local_shape(o.shape, p, shards) for o, p in zip(outputs, strategy.outputs, strict=True)]
    ranks = [local_args(sample.name, swapped(sample.args, iter(t)), sizes) for t in local_inputs]
    gave = LOCAL[strategy.local](sample.op, ranks, sample.kwargs, args)
    for k, (output, placement) in enumerate(zip(outputs, strategy.outputs, strict=True)):
        assert all(tuple(o[k].shape) == sizes[k] for o in gave), what
        check([o[k].detach() for o in gave], output.detach(), placement, f"{what}, output {k}")
    if expected is None:
        return
    given = [placed(g, gradient(p), shards) for g, p in zip(cotangents, strategy.outputs, strict=True)]
    found = [gradients(gave[r], local_inputs[r], [g[r] for g in given]) for r in range(shards)]
    for k, at in enumerate(differentiable(inputs)):
        check([g[k] for g in found], expected[k], gradient(took[at]), f"{what}, gradient of input {at}")


def settled(sample: Sample) -> Sample | None:
    """The call, with the tensors that have no gradient found; None where it is random or gives no exact tensors."""
    tensors = tensors_of(sample)
    floating = [k for k, t in enumerate(tensors) if has_gradient(t.dtype)]
    for constants in ((), *((k,) for k in floating), tuple(floating)):
        try:
            first, second = (run(sample._replace(constants=constants)) for _ in range(2))
        except Exception:
            continue
        if all(map(exact, first)):
            same = all(torch.allclose(a, b, 0.0, 0.0, equal_nan=True) for a, b in zip(first, second, strict=True))
            return sample._replace(constants=constants) if same else None
    return None


def run(sample: Sample) -> Tensors:
    """The call's outputs and the gradients of its inputs; raises where it is random or a gradient is infinite."""
    inputs = leaves(tensors_of(sample), sample.constants)
    state = torch.get_rng_state()
    outputs = called(sample.op, swapped(sample.args, iter(inputs)), sample.kwargs)
    if not torch.equal(state, torch.get_rng_state()):
        raise ValueError("random")
    if not differentiable(outputs) or not differentiable(inputs):
        return outputs
    found = gradients(outputs, inputs, [torch.ones_like(o) for o in outputs])
    if not all(bool(g.isfinite().all()) for g in found):
        raise ValueError("an infinite gradient")
    return [*outputs, *found]


def exact(tensor: torch.Tensor) -> bool:
    """Whether its values can be compared: strided, and of double precision where they are no integers."""
    numbers = tensor.dtype in (torch.float64, torch.complex128) or not has_gradient(tensor.dtype)
    return numbers and type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_quantized


def varied(tensor: torch.Tensor) -> bool:
    """Whether a tensor has numbers in it that differ, or a single one that is not about zero."""
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    numbers = tensor[tensor.isfinite()].double()
    if tensor.numel() > 1:
        return len(numbers) > 0 and bool(numbers.max() - numbers.min() > TELLING)
    return bool((numbers.abs() > TELLING).any())


@dataclass(frozen=True, eq=False)
class Case:
    """A call, ready to be proven."""

    sample: Sample

    @cached_property
    def sizes(self) -> Args:
        return swapped(self.sample.args, (t.shape for t in tensors_of(self.sample)))

    @cached_property
    def outputs(self) -> list[Shape]:
        return [o.shape for o in self.results]

    @cached_property
    def results(self) -> Tensors:
        return called(self.sample.op, self.sample.args, self.sample.kwargs)

    @cached_property
    def whole(self) -> Whole:
        return whole_of(self.sample)

    def prove(self, strategy: Strategy, shards: int) -> None:
        """Fail unless a claim of the row holds."""
        prove(self.sample, strategy, shards, self.whole)

    @cached_property
    def telling(self) -> bool:
        """Whether a wrong result would differ from the right one: no tensor is empty, and outputs vary."""
        return all(t.numel() for t in tensors_of(self.sample)) and all(map(varied, self.results))

    @cached_property
    def text(self) -> str:
        """The row for these shapes."""
        row = RULES[self.sample.name].row
        return row if isinstance(row, str) else row(self.sizes, self.outputs)

    def claims(self, counts: Iterable[int] = COUNTS) -> Claims:
        """Every strategy of the row as it stands, with a number of shards; without their names."""
        found: Claims = {}
        for shards in counts:
            for strategy in strategies(self.sample.name, self.sizes, self.outputs, shards, self.sample.hints):
                if self.meaningful(strategy):
                    found.setdefault((replace(strategy, name=""), shards if strategy.shards_work else 2))
        return found

    def meaningful(self, strategy: Strategy) -> bool:
        """Partial sums pass to floating-point outputs only, and flags have none."""
        took = (placement for placement in strategy.inputs if placement is not None)
        partial = [t for t, placement in zip(tensors_of(self.sample), took, strict=True) if placement.kind == "P"]
        return not partial or (
            all(has_gradient(o.dtype) for o in self.results[:1]) and all(t.dtype is not torch.bool for t in partial)
        )

    @cached_property
    def own(self) -> Claims:
        """What the table's row claims."""
        return self.claims()


class Mutant(NamedTuple):
    """A wrong row: what was done to the row where it reads `text` (wherever, if None)."""

    name: str
    kind: str
    text: str | None
    rule: Rule

    def __str__(self) -> str:
        return f"{self.name}: {self.kind}" + ("" if self.text is None else f": {self.text}  =>  {self.rule.row}")


Place = tuple[int, int, int]
"""Of a factor in a row: operand, dim and factor."""


def spelled(operands: Sequence[Operand], count: int) -> str:
    """The text of a row with so many inputs."""

    def factor(given: Factor) -> str:
        return given.name + "!" * (given.size is None and given.fixed)

    def dim(given: Dim) -> str:
        inner = ("+" if given.joined == "+" else " ").join(map(factor, given.factors))
        return f"({inner})" if len(given.factors) > 1 else inner

    texts = ["-" if operand is None else " ".join(map(dim, operand)) for operand in operands]
    return f"{', '.join(texts[:count])} -> {', '.join(texts[count:])}"


def corrupted(text: str) -> Iterator[tuple[str, str]]:
    """Wrong versions of a row's text: what was done, and the result."""
    row = parse(text)
    operands = [*row.inputs, *row.outputs]
    dims = {(o, d): dim for o, operand in enumerate(operands) for d, dim in enumerate(operand or ())}
    places = {(*at, k): factor for at, dim in dims.items() for k, factor in enumerate(dim.factors)}
    letters = {p: f for p, f in places.items() if f.size is None and f.name != "..."}

    def respelled(factors: dict[Place, Factor], changed: dict[tuple[int, int], Dim] | None = None) -> str:
        new = {(o, d): Dim(tuple(factors.get((o, d, k), f) for k, f in enumerate(dim.factors)), dim.joined)
               for (o, d), dim in dims.items()} | (changed or {})  # fmt: skip
        return spelled([o and tuple(new[k, d] for d in range(len(o))) for k, o in enumerate(operands)], len(row.inputs))

    for name in dict.fromkeys(f.name for f in letters.values() if f.fixed):
        everywhere = {p: replace(f, fixed=False) for p, f in letters.items() if f.name == name}
        yield f"unfixed {name}", respelled(everywhere)
        yield from ((f"unfixed once {name}", respelled({p: f})) for p, f in everywhere.items())
    for (p, first), (q, second) in itertools.combinations(places.items(), 2):
        if first != second and (p[0] == q[0] or "..." not in (first.name, second.name)):
            yield "swapped", respelled({p: second, q: first})
    for p in letters:
        yield "renamed", respelled({p: Factor("fresh", False)})
        yield "forgotten", respelled({p: Factor("fresh", True)})
    for at, dim in dims.items():
        if len(dim.factors) > 1:
            product = dim.joined == "*"
            new = Dim(dim.factors[::-1] if product else dim.factors)
            yield "reversed" if product else "multiplied", respelled({}, {at: new})


ALLOWED = {
    ("aten.dropout", "linear"): "right where every rank drops the same, which nobody promises",
    (ATTENTION, "unfixed e"): "right, but every rank does the scores' work, which the costs do not know",
    ("aten.instance_norm", "unfixed d0"): "right, but running averages are those of all samples",
    ("aten.nextafter", "linear"): "right within the tolerance",
    ("aten.type_as", "forgotten"): "right: only the second tensor's dtype counts",
    ("aten.type_as", "linear"): "right: only the second tensor's dtype counts",
    ("autopart.returned", "linear"): "right, but a partial sum is no part of what is returned",
    ("aten.view.dtype", "linear"): "right where the dtype stays",
}
"""What may be done to a row and leaves it right: (row, kind) -> why the row does not say so."""


UNCHECKED = ("aten.native_batch_norm", "aten._native_batch_norm", "aten._weight_norm")
"""Operators, by how their names begin, that write past the end of tensors whose sizes do not agree: no mutants."""


def mutants(name: str, texts: Iterable[str]) -> list[Mutant]:
    """Every wrong version of a row, where it reads as one of `texts`."""
    if name.startswith(UNCHECKED):
        return []
    rule = RULES[name]
    found = [Mutant(name, "linear", None, replace(rule, linear=-1))] if rule.linear != -1 else []
    if rule.local:
        found.append(Mutant(name, "no local", None, replace(rule, local={})))
    for text in dict.fromkeys(texts):
        wrong = {new: kind for kind, new in corrupted(text)}
        found += [Mutant(name, kind, text, replace(rule, row=new)) for new, kind in wrong.items()]
    return found


@contextmanager
def ruled(name: str, rule: Rule) -> Iterator[None]:
    """The table with another row."""
    before = RULES[name]
    RULES[name] = rule
    try:
        yield
    finally:
        RULES[name] = before


def fate(mutant: Mutant, cases: Sequence[Case]) -> str:
    """What becomes of a wrong row: "refused" (it does not fit some shapes), "disproven", "same" (it claims what the
    right one does), "stricter" (it claims less, and nothing else), "untold" (its samples show nothing), "allowed"
    or "survived"."""
    mine = [case for case in cases if mutant.text in (None, case.text)]
    own = [case.own for case in mine]
    with ruled(mutant.name, mutant.rule):
        try:
            claims = [case.claims() for case in mine]
        except Exception:
            return "refused"
        if claims == own:
            return "same"
        added = [[c for c in new if c not in old] for new, old in zip(claims, own, strict=True)]
        if not any(added):
            return "stricter"
        if any(disproven(c, new) for c, new in zip(mine, added, strict=True)):
            return "disproven"
        if (mutant.name, mutant.kind) in ALLOWED:
            return "allowed"
        return "survived" if any(c.telling and new for c, new in zip(mine, added, strict=True)) else "untold"


def disproven(case: Case, claims: Iterable[tuple[Strategy, int]]) -> bool:
    """Whether one of the claims fails."""
    for strategy, shards in claims:
        try:
            case.prove(strategy, shards)
        except Exception:
            return True
    return False
