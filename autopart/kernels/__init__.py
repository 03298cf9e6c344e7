"""Hand-written kernels, one file a kernel.

Each file holds the plain PyTorch ``reference`` (the pattern a fusing pass matches, the fallback and the
oracle of the tests), the Triton forward and backward, and the bytes both must move.
"""
