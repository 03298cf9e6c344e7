"""The passes from a model to source text: trace, simplify, randomness, fuse, annotate, fold_layers, unfold_layers,
formulate, solve, partition, price_stage, emit.

A pass is one public function, named after its file, from graph to graph (or to a table, a choice, a price, a text).
Other files are behind a pass:

trace        loop_iterations, inner_blocks
simplify     simplify_masks, constant_values
fuse         pattern, fuse_dropout, fuse_stochastic_depth
annotate     mean_loss, backward_peak, kernel_bytes
formulate    value_positions, checkpoint_cut
solve        split_problem, constraint_matrix, warm_starts, solve_stages, ilp, ilp_solvers
partition    stage_graph, stage_builder, sharded_calls, saved_memory, traffic
emit         codegen/

`source` runs the passes up to unfold_layers. Imports every room below, never the planner. Open `source.py` first.
"""
