"""Problem -> solution, through PuLP and HiGHS. The only module that knows the solver."""

from __future__ import annotations

from collections import defaultdict

import pulp

from autopart.errors import PartitionError
from autopart.notation import Placement
from autopart.problem import CutProblem, CutSolution, SplitProblem, SplitSolution
from autopart.rules import Strategy


def solve_splits(problem: SplitProblem, time_limit: float | None = None) -> SplitSolution:
    """Solve equations (1) to (5). Raises PartitionError where no choice fits the budget."""
    model = pulp.LpProblem("splits", pulp.LpMinimize)
    chosen = {
        name: [_variable(f"x_{i}_{k}", "Binary") for k in range(len(options))]
        for i, (name, options) in enumerate(problem.strategies.items())
    }
    costs: list[tuple[pulp.LpVariable, float]] = []
    for name, variables in chosen.items():
        _add(model, [(v, 1.0) for v in variables], "==", 1.0)
        costs += zip(variables, problem.seconds[name], strict=True)
    for group in problem.tied:
        for name in group[1:]:
            for here, there in zip(chosen[group[0]], chosen[name], strict=False):
                _add(model, [(here, 1.0), (there, -1.0)], "==", 0.0)
    costs += _moves(model, problem, chosen)
    if problem.budget is not None:
        bytes_ = [
            (v, (s + problem.in_flight * k) / 2**20)
            for name, variables in chosen.items()
            for v, s, k in zip(variables, problem.state[name], problem.kept[name], strict=True)
        ]
        _add(model, bytes_, "<=", problem.budget / 2**20)
    scale = 1.0 / max((c for _, c in costs), default=1.0) * 1e3
    model.setObjective(pulp.LpAffineExpression([(v, c * scale) for v, c in costs if c]))
    options = {} if time_limit is None else {"timeLimit": time_limit}
    model.solve(pulp.HiGHS(msg=False, threads=1, gapRel=1e-6, **options))
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        raise PartitionError("no choice of splits fits", pulp.LpStatus[model.status])
    bound = model.solverModel.getInfo().mip_dual_bound / scale
    seconds = (pulp.value(model.objective) or 0.0) / scale
    picked: dict[str, Strategy] = {
        name: problem.strategies[name][max(range(len(vs)), key=lambda k: vs[k].value() or 0.0)]
        for name, vs in chosen.items()
    }
    return SplitSolution(picked, seconds, min(bound, seconds), pulp.LpSolution[model.sol_status])


def _variable(name: str, category: str = "Continuous") -> pulp.LpVariable:
    return pulp.LpVariable(name, lowBound=0, upBound=1 if category == "Binary" else None, cat=category)


def _add(model: pulp.LpProblem, terms: list[tuple[pulp.LpVariable, float]], sense: str, right: float) -> None:
    left = pulp.LpAffineExpression(terms)
    model.addConstraint(left == right if sense == "==" else left <= right)


def _moves(
    model: pulp.LpProblem, problem: SplitProblem, chosen: dict[str, list[pulp.LpVariable]]
) -> list[tuple[pulp.LpVariable, float]]:
    """Equations (2) and (3); returns the priced changes."""
    costs = []
    paid: dict[tuple[str, int, Placement, Placement], pulp.LpVariable] = {}
    for number, edge in enumerate(problem.edges):
        give: dict[Placement, list[pulp.LpVariable]] = defaultdict(list)
        take: dict[Placement, list[pulp.LpVariable]] = defaultdict(list)
        for strategy, variable in zip(problem.strategies[edge.source], chosen[edge.source], strict=True):
            give[strategy.outputs[edge.output]].append(variable)
        for strategy, variable in zip(problem.strategies[edge.target], chosen[edge.target], strict=True):
            wanted = strategy.inputs[edge.operand]
            assert wanted is not None
            take[wanted].append(variable)
        changes = problem.changes[edge.source, edge.output]
        leaving: dict[Placement, list[tuple[pulp.LpVariable, float]]] = defaultdict(list)
        arriving: dict[Placement, list[tuple[pulp.LpVariable, float]]] = defaultdict(list)
        for have in give:
            for want in take:
                if (have, want) not in changes:
                    continue
                move = _variable(f"e_{number}_{have}_{want}")
                leaving[have].append((move, -1.0))
                arriving[want].append((move, -1.0))
                if changes[have, want] > 0:
                    key = (edge.source, edge.output, have, want)
                    if key not in paid:
                        paid[key] = _variable(f"c_{len(paid)}")
                        costs.append((paid[key], changes[have, want]))
                    _add(model, [(move, 1.0), (paid[key], -1.0)], "<=", 0.0)
        for have, variables in give.items():
            _add(model, [(v, 1.0) for v in variables] + leaving[have], "==", 0.0)
        for want, variables in take.items():
            _add(model, [(v, 1.0) for v in variables] + arriving[want], "==", 0.0)
    return costs


def solve_cuts(problem: CutProblem) -> CutSolution | None:
    """Solve equation (6) exactly; None where no cut fits the memory.

    For a threshold T, the cheapest path through columns with f <= T is a network flow, whose LP is integral; T runs
    upward over the columns' costs until no larger one can win (the design's columns, flow and threshold).
    """
    columns = _columns(problem)
    if not columns:
        return None
    best: CutSolution | None = None
    loosest = _cheapest_path(columns, problem)
    if loosest is None:
        return None
    floor = sum(columns[c] for c in loosest)
    fill = problem.micro_batches - 1
    thresholds = sorted(set(columns.values()))
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        feasible = _cheapest_path({c: f for c, f in columns.items() if f <= thresholds[middle]}, problem)
        low, high = (low, middle) if feasible else (middle + 1, high)
    while low < len(thresholds):
        limit = thresholds[low]
        if best is not None and floor + fill * limit >= best.seconds:
            break
        path = _cheapest_path({c: f for c, f in columns.items() if f <= limit}, problem)
        assert path is not None
        times = [columns[c] for c in path]
        seconds = sum(times) + fill * max(times)
        if best is None or seconds < best.seconds:
            best = CutSolution(tuple(c[1] for c in path), seconds, seconds)
        low += 1
    return best


Column = tuple[int, int, int]


def _columns(problem: CutProblem) -> dict[Column, float]:
    """f[s, i, j] of every stage s and every range of units i..j-1 that fits its memory."""
    units, stages = len(problem.seconds), problem.stages
    columns: dict[Column, float] = {}
    for stage in range(stages):
        for start in [0] if stage == 0 else range(stage, units - (stages - stage) + 1):
            seconds, state, kept, transient = problem.cut_seconds[start] if start else 0.0, 0.0, 0.0, 0.0
            seen: set[int] = set()
            for end in range(start + 1, units - (stages - stage - 1) + 1):
                unit = end - 1
                seconds += problem.seconds[unit]
                state += problem.state[unit]
                kept += problem.kept[unit]
                transient = max(transient, problem.transient[unit])
                for number, (users, nbytes) in enumerate(problem.shared):
                    if unit in users:
                        state += nbytes if number not in seen else 0.0
                        seen.add(number)
                if state + problem.in_flight[stage] * kept + transient > problem.limit:
                    break
                if stage < stages - 1 or end == units:
                    columns[stage, start, end] = seconds + (problem.cut_seconds[end] if end < units else 0.0)
    return columns


def _cheapest_path(columns: dict[Column, float], problem: CutProblem) -> list[Column] | None:
    """The path 0 -> last unit through all stages with the least sum, or None."""
    model = pulp.LpProblem("cuts", pulp.LpMinimize)
    flow = {c: _variable(f"y_{c[0]}_{c[1]}_{c[2]}") for c in columns}
    balance: dict[tuple[int, int], list[tuple[pulp.LpVariable, float]]] = defaultdict(list)
    for (stage, start, end), variable in flow.items():
        balance[stage, start].append((variable, 1.0))
        balance[stage + 1, end].append((variable, -1.0))
    first, last = (0, 0), (problem.stages, len(problem.seconds))
    if first not in balance or last not in balance:
        return None
    for place, terms in balance.items():
        _add(model, terms, "==", 1.0 if place == first else -1.0 if place == last else 0.0)
    scale = 1.0 / max(columns.values())
    model.setObjective(pulp.LpAffineExpression([(v, columns[c] * scale) for c, v in flow.items()]))
    model.solve(pulp.HiGHS(msg=False, threads=1))
    if model.sol_status != pulp.LpSolutionOptimal:
        return None
    return sorted(c for c, v in flow.items() if (v.value() or 0.0) > 0.5)
