"""The intermediate representation: torch.fx graphs whose nodes each carry a record, and graphs of layers made of them.

Also what a graph's fingerprint is, and the call targets of random operators, experts and CTC. Imports `errors` and
`sharding`. Open `graph.py` first, then `layered_graph.py`.
"""
