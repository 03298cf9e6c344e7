"""Seconds and bytes: of operators, collectives, reshards and training state.

`compute` prices one operator, `collectives` one collective, `training_state` parameters, gradients and optimizer
states; `sizes`, `prices` and `position_costs` do so for all strategies of a graph at once. Imports `hardware`,
`sharding` and `ir`. Open `compute.py` first.
"""
