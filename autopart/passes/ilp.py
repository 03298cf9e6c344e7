"""The integer linear program (ILP) of splits, stated with PuLP: every node takes one strategy, at the least cost.

Sets
    V             nodes: operators, parameters and inputs, one of every segment class
    S(v)          strategies of node v, one along every mesh axis
    T             sets of nodes that are tied: the model's inputs; a buffer and its new value; an operator in all
                  iterations of an unrolled loop
    F             values that nodes make;  U(f): the operands that read value f, each of one node
    P(f), Q(u)    placements in which f may be made, and in which operand u may be taken
    W(p, q)       paths of a value that is resharded from p to q: the placements it has passed after each collective
    M             tensors that autograd saves;  H(m): the nodes that save tensor m

Variables
    x[v, s]       binary: node v takes strategy s
    e[f, u, p, q] in [0, 1]: f is made in placement p and operand u takes it in q. None exists where no collectives lead
                  from p to q
    c[f, p, w]    in [0, 1]: f is made in p and resharded along the path w
    k[m, p]       in [0, 1]: tensor m is saved in placement p
    t             >= 0: exposed gradient sync, in the unit of the objective
    y             >= 0: (peak bytes - baseline bytes) / limit
    Only x has to be integer: (4) and (5) make e integer then, and (1) makes c and k as small as (7) and (8) allow.

Equations
    (1)   minimise  sum A[v, s] x[v, s] + sum B[f, p, w] c[f, p, w] + sum D[m, p] k[m, p] + t           `objective`
    (2)   sum over s in S(v) of x[v, s] = 1                              for v in V                     `one_strategy`
    (3)   x[v, s] = x[v', s]                                             for v, v' in a set of T        `tied_nodes`
    (4)   sum over q of e[f, u, p, q] = sum of x[v, s], v makes f in p under s   for f, u, p          `made_placement`
    (5)   sum over p of e[f, u, p, q] = sum of x[v, s], v takes u in q under s   for f, u, q          `taken_placement`
    (6)   e[f, u, p, q] = e[f, u', p, q]   for p a partial sum and all u, u' outside the segment that makes f;
          0 where one of them cannot take q                                                             `partial_sums`
    (7)   c[f, p, w] >= sum over q with w in W(p, q) of e[f, u, p, q]    for f, u, p, w                 `resharded_once`
    (8)   k[m, p] >= sum of x[v, s], v saves m in p under s              for m, v in H(m), p            `saved_once`
  where the memory of one stage is a row (`Capacity`), z being all of x, c and k:
    (9)   t >= sum sync[r] z                                             for rows r                     `exposed_sync`
    (10)  y >= sum peak[r] z / limit                                     for rows r                     `peak_memory`
    (11)  sum baseline z / limit + y <= 1                                                               `fits`

By (7) a reshard is paid once however many operands need it. By (8) a tensor is saved once however many nodes save it.

Costs (`autopart.planner.objective`), with n the positions of the model that pay, lambda the memory multiplier in
seconds per byte, and in_flight the micro-batches in flight in the first stage:

    A[v, s]    = n (forward + backward + recompute seconds + (sync + optimizer) seconds / amortization
                    + lambda (saved + state / in_flight) bytes)
    B[f, p, w] = n (seconds of the collective forward + of its conjugate backward + of recomputing it)
    D[m, p]    = n lambda saved bytes

`autopart.passes.constraint_matrix` has (2) to (8) as arrays for HiGHS. It substitutes (7) where a value has one
operand. `autopart.passes.solve` adds (9) to (11).
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from pulp import LpAffineExpression, LpConstraint, LpMinimize, LpProblem, LpVariable, lpSum

from autopart.cost.sizes import Sizes, reshard_paths
from autopart.passes.constraint_matrix import Entries
from autopart.passes.split_problem import SplitProblem
from autopart.sharding.strategy_table import Placements, StrategyTable

Row = tuple[str, LpConstraint]

LONGEST = 100
"""Characters of a name: PuLP and CBC write no LP file with longer ones."""

ILLEGAL = re.compile(r"[^A-Za-z0-9_.]+")
"""Characters that names in LP files of some solver may not have."""


class Ilp:
    """A `problem` of PuLP with its variables, by what they stand for.

    x      [node][option]
    e      (value, (node, operand)) -> (placement made, placement taken) -> variable
    c, k   as the keys of `Sizes.reshards` and `Sizes.saved_index`
    z      x, c and k in one list, in the order of `SplitProblem.costs`
    """

    def __init__(self, sizes: Sizes, asked: SplitProblem) -> None:
        self.sizes, self.table, self.asked = sizes, sizes.table, asked
        self.problem = LpProblem("splits", LpMinimize)
        self.names: set[str] = set()
        table, axes = self.table, self.table.axes
        self.x: list[list[LpVariable]] = []
        for v, node in enumerate(table.nodes):
            left, options = set(asked.allowed.get(v, range(len(node.options)))), []
            for s, option in enumerate(node.options):
                text = " ".join(f"{axis} {strategy.name}" for axis, strategy in zip(axes, option, strict=True))
                options.append(self._variable(f"x {node.key} {text}", 1.0 if s in left else 0.0, "Integer"))
            self.x.append(options)
        self.e: dict[tuple[int, tuple[int, int]], dict[tuple[Placements, Placements], LpVariable]] = {}
        for f, used in enumerate(table.value_uses):
            for use in dict.fromkeys(used.uses):
                self.e[f, use] = {
                    (p, q): self._variable(f"move {self.operand(use)} {_text(p)} to {_text(q)}")
                    for p in self.made(f) for q in self.taken(use) if (p, q) in used.chains
                }  # fmt: skip
        self.c = {
            (f, p, w): self._variable(f"reshard {self.value(f)} {' '.join(map(_text, (p, *w)))}")
            for f, p, w in sizes.reshards
        }
        self.k = {(m, p): self._variable(f"save {_saved_name(table, m)} {_text(p)}") for m, p in sizes.saved_index}
        self.z = [*(x for options in self.x for x in options), *self.c.values(), *self.k.values()]
        self.t, self.y = (self._variable(name, None) for name in ("exposed_sync", "peak"))

    def value(self, f: int) -> str:
        """What a value is called."""
        used = self.table.value_uses[f]
        return self.table.nodes[used.source].key + (f" {used.output}" if used.output else "")

    def operand(self, use: tuple[int, int]) -> str:
        """What an operand is called."""
        return f"{self.table.nodes[use[0]].key} {use[1]}"

    def made(self, f: int) -> dict[Placements, list[LpVariable]]:
        """Of every placement in which a value may be made, the x that make it so."""
        used = self.table.value_uses[f]
        node = self.table.nodes[used.source]
        return _grouped(self.x[used.source], [node.given(s, used.output) for s in range(len(node.options))])

    def taken(self, use: tuple[int, int]) -> dict[Placements, list[LpVariable]]:
        """Of every placement in which an operand may be taken, the x that take it so."""
        node = self.table.nodes[use[0]]
        return _grouped(self.x[use[0]], [node.taken(s, use[1]) for s in range(len(node.options))])

    def name(self, text: str) -> str:
        """A name that is legal in LP and MPS files and was not given before: of a long one the end, which says most."""
        kind, _, rest = ILLEGAL.sub("_", text).partition("_")
        room = LONGEST - len(kind) - len("_.._9999")
        base = f"{kind}_{rest}" if len(rest) <= room else f"{kind}_..{rest[-room:]}"
        numbered = (f"{base}_{number}" for number in itertools.count(2))
        name = next(name for name in itertools.chain([base], numbered) if name not in self.names)
        self.names.add(name)
        return name

    def _variable(self, text: str, most: float | None = 1.0, kind: str = "Continuous") -> LpVariable:
        return self.problem.add_variable(self.name(text), 0.0, most, kind)


def state(sizes: Sizes, asked: SplitProblem) -> Ilp:
    """The ILP of a table for the costs, options and memory of `asked`."""
    ilp = Ilp(sizes, asked)
    ilp.problem.objective = objective(ilp)  # setObjective would drop its name
    for equation in EQUATIONS if asked.capacity is None else (*EQUATIONS, *CAPACITY_EQUATIONS):
        for text, row in equation(ilp):
            ilp.problem.addConstraint(row, ilp.name(text))
    return ilp


def objective(ilp: Ilp) -> LpAffineExpression:
    """(1): the costs of all that is chosen, and the exposed gradient sync."""
    costs = ilp.asked.costs
    terms = [(ilp.z[i], float(costs[i])) for i in np.flatnonzero(costs)]
    return LpAffineExpression([*terms, *([] if ilp.asked.capacity is None else [(ilp.t, 1.0)])], name=ilp.asked.unit)


def one_strategy(ilp: Ilp) -> Iterator[Row]:
    """(2): every node takes one strategy."""
    for node, options in zip(ilp.table.nodes, ilp.x, strict=True):
        yield f"one {node.key}", lpSum(options) == 1


def tied_nodes(ilp: Ilp) -> Iterator[Row]:
    """(3): tied nodes take the same strategy."""
    for first, *others in (*ilp.table.tied, *ilp.table.iterations):
        for other in others:
            for one, same in zip(ilp.x[first], ilp.x[other], strict=True):
                yield f"tied {ilp.table.nodes[other].key}", one - same == 0


def made_placement(ilp: Ilp) -> Iterator[Row]:
    """(4): an operand finds the value in the placement in which the value is made."""
    for (f, use), moves in ilp.e.items():
        for placed, options in ilp.made(f).items():
            given = [e for (p, _), e in moves.items() if p == placed]
            yield f"made {ilp.operand(use)} {_text(placed)}", lpSum(options) - lpSum(given) == 0


def taken_placement(ilp: Ilp) -> Iterator[Row]:
    """(5): an operand is taken in the placement that its node's strategy says."""
    for (_, use), moves in ilp.e.items():
        for placed, options in ilp.taken(use).items():
            taken = [e for (_, q), e in moves.items() if q == placed]
            yield f"taken {ilp.operand(use)} {_text(placed)}", lpSum(options) - lpSum(taken) == 0


def partial_sums(ilp: Ilp) -> Iterator[Row]:
    """(6): all operands outside the segment that makes a partial sum take it in the same placement."""
    for f, used in enumerate(ilp.table.value_uses):
        inside = {use for use in used.uses if all(i for u, i in zip(used.uses, used.inside, strict=True) if u == use)}
        outside = [moves for (g, use), moves in ilp.e.items() if g == f and use not in inside]
        pairs = dict.fromkeys(pair for moves in outside for pair in moves if any(p.kind == "P" for p in pair[0]))
        for p, q in pairs:
            first, *others = [moves[p, q] for moves in outside if (p, q) in moves]
            text = f"sum {ilp.value(f)} {_text(p)} to {_text(q)}"
            yield from ((text, first - other == 0) for other in others)
            if 1 + len(others) < len(outside):
                yield text, LpAffineExpression(first) == 0


def resharded_once(ilp: Ilp) -> Iterator[Row]:
    """(7): a reshard is paid where any operand needs it."""
    for (f, use), moves in ilp.e.items():
        needed: dict[tuple[Placements, tuple[Placements, ...]], list[LpVariable]] = {}
        for (p, q), e in moves.items():
            for w in reshard_paths(ilp.table.value_uses[f].chains[p, q]):
                needed.setdefault((p, w), []).append(e)
        for (p, w), those in needed.items():
            text = f"paid {ilp.operand(use)} {' '.join(map(_text, (p, *w)))}"
            yield text, ilp.c[f, p, w] - lpSum(those) >= 0


def saved_once(ilp: Ilp) -> Iterator[Row]:
    """(8): a tensor is saved where any node saves it."""
    for m, tensor in enumerate(ilp.table.saved_tensors):
        for (v, operand), saved in zip(dict.fromkeys(tensor.savers), ilp.sizes.saved_placements[m], strict=True):
            for placed, options in _grouped(ilp.x[tensor.root if operand == -2 else v], saved).items():
                text = f"saved {ilp.table.nodes[v].key} {_saved_name(ilp.table, m)} {_text(placed)}"
                yield text, ilp.k[m, placed] - lpSum(options) >= 0


def exposed_sync(ilp: Ilp) -> Iterator[Row]:
    """(9): exposed gradient sync."""
    assert ilp.asked.capacity is not None
    for terms in _rows(ilp, ilp.asked.capacity.sync, 1.0):
        yield "sync", ilp.t - LpAffineExpression(terms) >= 0


def peak_memory(ilp: Ilp) -> Iterator[Row]:
    """(10): bytes that are alive at the peak above the baseline."""
    assert ilp.asked.capacity is not None
    for terms in _rows(ilp, ilp.asked.capacity.peak, 1 / max(ilp.asked.capacity.limit, 1.0)):
        yield "alive", ilp.y - LpAffineExpression(terms) >= 0


def fits(ilp: Ilp) -> Iterator[Row]:
    """(11): the baseline and the peak above it fit the device."""
    capacity = ilp.asked.capacity
    assert capacity is not None
    unit = max(capacity.limit, 1.0)
    terms = [(ilp.z[i], float(capacity.baseline[i]) / unit) for i in np.flatnonzero(capacity.baseline)]
    yield "room", LpAffineExpression([*terms, (ilp.y, 1.0)]) <= capacity.limit / unit


EQUATIONS = (one_strategy, tied_nodes, made_placement, taken_placement, partial_sums, resharded_once, saved_once)
CAPACITY_EQUATIONS = (exposed_sync, peak_memory, fits)


def _rows(ilp: Ilp, entries: Entries, unit: float) -> Iterator[list[tuple[LpVariable, float]]]:
    """Of every row of a matrix, the variables with their coefficients times a unit."""
    rows: dict[int, dict[int, float]] = {}
    for row, variable, number in zip(*(part.tolist() for part in entries), strict=True):
        mine = rows.setdefault(row, {})
        mine[variable] = mine.get(variable, 0.0) + number * unit
    for mine in rows.values():
        yield [(ilp.z[variable], number) for variable, number in mine.items()]


def _grouped(variables: Sequence[LpVariable], keys: Iterable[Placements]) -> dict[Placements, list[LpVariable]]:
    """Variables by their keys."""
    found: dict[Placements, list[LpVariable]] = {}
    for variable, key in zip(variables, keys, strict=True):
        found.setdefault(key, []).append(variable)
    return found


def _saved_name(table: StrategyTable, tensor: int) -> str:
    """The key of the node that made a saved tensor, with the number of its output where that is not the first."""
    saved = table.saved_tensors[tensor]
    return table.nodes[saved.root].key + (f" {saved.output}" if saved.output else "")


def _text(placed: Placements) -> str:
    """``"S0.R"``: a placement along every axis."""
    return ".".join(map(str, placed))
