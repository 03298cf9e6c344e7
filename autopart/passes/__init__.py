"""The passes from a model to source text: trace, simplify, randomness, fuse, annotate, fold_layers, unfold_layers,
formulate, solve, partition, price_stage, emit.

A pass is one public function, called as its file, from graph to graph (or to a table, a choice, a price, a text). Other
files are behind a pass: `simplify_masks`, `constant_values` and `mean_loss` behind simplify and annotate,
`value_positions` behind formulate, `split_problem`, `constraint_matrix`, `solve_stages`, `ilp` and `ilp_solvers` behind
solve, `stage_builder`, `sharded_calls` and `saved_memory` behind partition, `codegen/` behind emit. `source` runs the
passes up to unfold_layers. Imports every room below, never the planner. Open `source.py` first.
"""
