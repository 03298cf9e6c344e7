"""Kernels against torch. One file a kernel."""
