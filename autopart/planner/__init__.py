"""The search for the fastest plan: degrees, micro-batch size, ZeRO level, activation checkpointing, cuts, splits.

`make_plan` is the entry, `branch_and_bound` the search, `search_space` its tables, `lower_bounds` and `stage_bounds`
what proves a gap, `cuts` the stages; `explain/` answers questions about a plan. Imports `passes` and all rooms below,
nothing that runs on devices. Open `make_plan.py` first.
"""
