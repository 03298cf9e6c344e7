"""The intermediate representation: torch.fx graphs with a record on every node, and the layers of such graphs.

Also the fingerprints of graphs, and the call targets of random operators, experts and CTC. Imports `errors` and
`sharding`. Open `graph.py` first, then `layered_graph.py`.
"""
