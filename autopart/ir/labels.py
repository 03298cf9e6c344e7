"""What the labels of a model's layers say."""

from __future__ import annotations


def is_block(label: str) -> bool:
    """Whether a run is a numbered block."""
    return label.rpartition(".")[2].isdigit()
