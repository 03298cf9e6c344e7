"""What planning takes and how good plans are: CPU seconds, gaps, certificates, regret. Start at `cold.py`."""
