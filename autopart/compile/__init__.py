"""The front door: `plan`, `estimate`, `compile`, `simulate` and `check`, as users call them.

Joins the planner, the passes and the runtime. Imports every room but `cli`. Open `api.py` first.
"""
