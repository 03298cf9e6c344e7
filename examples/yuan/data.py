"""Batches of text as bytes."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from examples.text import VOCABULARY, batches
from examples.yuan.config import DataConfig


def batch(config: DataConfig, vocabulary: int, tokens: int) -> dict[str, Tensor]:
    """A batch for all ranks: input_ids and labels of (samples, tokens). Equal arguments give equal batches. Raises
    ValueError for a vocabulary that lacks bytes."""
    if vocabulary < VOCABULARY:
        raise ValueError(f"a vocabulary of {vocabulary} words lacks some of the {VOCABULARY} bytes")
    return next(batches(config.samples, tokens, 1, config.seed, Path(config.text) if config.text else None))
