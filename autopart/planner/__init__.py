"""The search for the fastest plan: degrees, micro-batch, ZeRO level, activation checkpointing, cuts, splits.

request, constraint_text, constraints, cut_constraints  what the user asks for
search_points, zero_levels, search_space, ilp_model,
allowed_choices                                         the points of the search, and the tables of each
branch_and_bound, candidate, cuts                       the search: queue, plans of a point, exact cuts
objective, lower_bounds, stage_bounds                   the lower bounds that prove a gap
exact_refinement, refinement                            exact splits of small models
interval_costs, interval_seconds, checkpoint_steps,
memory_tree, stage_parameters                           seconds and bytes of intervals and of stages
make_plan, write_plan, dataflow, summarize, validate,
progress                                                the line from a request to a plan
infeasibility, advice                                   where nothing fits
explain/                                                questions about a plan

`candidate`, `branch_and_bound` and `stage_bounds` call `cuts.best_cut` with seconds of intervals and with lower bounds
on them, `infeasibility` with bytes; docs/planner.md has a table of these calls.

Imports `passes` and all rooms below, nothing that runs on devices. Open `make_plan.py` first, then
`branch_and_bound.py`, whose docstring has the problem and its bounds.
"""
