"""Checkpoints that any plan and any number of ranks reads, through torch.distributed.checkpoint.

A checkpoint is a folder `step-00000120`:

    *.distcp, .metadata   torch.distributed.checkpoint's files: tensors by name and by rectangles of their whole shape,
                          `model/NAME` for weights and buffers, `optimizer/STATE/NAME` for states of a weight's shape
    state.pt              what is no part of a weight's shape (`record.Record`), read with weights_only=True
    plan.json             the plan of the ranks that wrote it, for people
    manifest.json         bytes and SHA-256 of every other file, written last

It is written as `.step-00000120.tmp` and renamed once every rank has written. Open `checkpoints.py` first.
"""
