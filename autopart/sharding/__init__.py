"""How operators may be split over a mesh axis, and which collective changes one placement into another.

`notation` defines placements and the language of rules, `binding` fits a rule to shapes, `rules/` is the table of
operators, `resharding` the table of collectives, `strategy_table` all choices of a graph as plain data. Imports
`kernels` and `errors`. Open `notation.py` first, then `rules/base.py`.
"""
