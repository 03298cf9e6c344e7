"""Benchmarks, run from the root of the repository: python -m benchmarks.GROUP.NAME. docs/benchmarks.md lists them."""
