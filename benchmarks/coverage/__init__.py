"""Which models and operators are exact: sweeps through the public API. Start at `zoo.py`."""
