"""How operators may be split over a mesh axis, and what changes one placement into another.

`notation` is the language of the rules, `rules/` the table of operators, `resharding` the table of collectives,
`strategy_table` the choices of a whole graph as plain data. Imports `errors`. Open `notation.py` first.
"""
