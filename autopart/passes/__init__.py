"""The line from a model to source text, one file a pass: trace, simplify, randomness, fuse, annotate, fold_layers,
unfold_layers, formulate, solve, partition, price_stage, emit.

A pass is one public function from graph to graph (or table, or text). `source` runs the line up to fold_layers;
`codegen/` stands behind emit. Imports every room below, never the planner. Open `source.py` first.
"""
