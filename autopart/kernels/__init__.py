"""Triton kernels, a file for each or for a family. They import torch alone; `launch.jit` imports Triton, once one runs.

A file has the Triton forward and backward, and a `kernel.Kernel`: a ``reference`` in plain PyTorch, how tensors may be
split, what backward keeps, the bytes that are moved. The reference is the pattern that `passes.fuse` finds in models,
what runs where Triton does not, and the oracle of the tests. Read `gated` first. `table` has the kernels that graphs
call, `forms` the forms in which models write them, `launch` where Triton runs.
"""
