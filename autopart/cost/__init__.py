"""Seconds and bytes: of operators, collectives, reshards and training state.

`compute` prices one operator, `collectives` one collective, `training_state` parameters, gradients and optimizer
states; `resharding` a change of placement; `kernel_efficiency` and `measured_tables` have what was measured. `sizes`,
`prices` and `position_costs` do so for all strategies of a graph at once. `liveness` is the one memory model, which
`intervals` and `transient_peaks` evaluate for all intervals of positions. Open `compute.py` first, then `liveness.py`.
"""
