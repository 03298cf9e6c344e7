"""Triton kernels, one file a kernel.

A file has the Triton forward and backward, and the least bytes that each reads and writes. Where `passes.fuse` replaces
operators by the kernel, the file also has their ``reference`` in plain PyTorch: the pattern that the pass matches, what
runs where the kernel does not apply, and the oracle of the tests.
"""
