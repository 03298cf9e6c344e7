"""From a user's model and batch to an exported program: what stands behind the pass `trace`.

Checks the inputs, runs torch.export, removes side effects, finds the user's autograd Functions, and traces only the
first of equal blocks. Imports `errors` and `ir`. `torch_private` is the one file with private names of torch.
Open `export.py` first.
"""
