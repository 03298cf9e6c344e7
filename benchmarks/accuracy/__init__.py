"""Predictions against measurements: published runs, kernels, memory, this machine. Start at `published_runs.py`."""
