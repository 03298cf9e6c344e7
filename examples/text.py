"""Byte-level training text: the source of Python's own standard library."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256
LIMIT = 2_000_000


@lru_cache(maxsize=1)
def corpus(file: Path | None = None) -> Tensor:
    """The first `LIMIT` bytes of a file, or of the standard library's top-level modules in order of their names."""
    text = bytearray()
    for path in [file] if file else sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= LIMIT:
            break
    return torch.frombuffer(text[:LIMIT], dtype=torch.uint8)


def batches(
    batch_size: int, sequence: int, steps: int, seed: int, file: Path | None = None
) -> Iterator[dict[str, Tensor]]:
    """`steps` batches of random windows of a file or of the standard library; equal arguments give equal batches."""
    windows = corpus(file).unfold(0, sequence, 1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens = windows[torch.randint(len(windows), (batch_size,), generator=generator)].long()
        yield {"input_ids": tokens, "labels": tokens.clone()}
