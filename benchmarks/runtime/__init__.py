"""Step times of emitted programs against PyTorch's own ways. Start at `step_time.py`."""
