"""From a user's model and batch to an exported program, for the pass `trace`.

`inputs` and `batch` check what the user gives, `layer_sampling` finds which blocks need be traced, `fake_model` copies
the model without memory, `export` runs torch.export under `tracing_contexts`, `no_gradient` and `autograd_functions`
put right what a trace loses, `functionalize` removes side effects, `source_lines` finds the user's lines.
`torch_private` is the one file with private imports of torch. Imports `errors` and `ir`. Open `export.py` first.
"""
