"""What a checkpoint holds besides tensors of the weights' shapes, as one file that is read without running code."""

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from autopart.errors import PartitionError

FORMAT = 1

Record = dict[str, Any]
"""
format      FORMAT
step, seed  what random numbers depend on; `step` is the number of steps that were made
skipped     updates that were skipped; loss_scale: None, or factor and finite of `LossScale`
parameters  name -> whole shape
beside      tensors of the state dict that no stage computes with
optimizer   None, or {"class", "groups": [{"settings", "names"}], "scalars": {name: {state: value}}}
scheduler   None, or {"class", "state"}
extra       what the user gave
"""


def encode(record: Mapping[str, Any]) -> bytes:
    """A record as a file's content. Raises PartitionError where a part of it could not be read again."""
    for part, value in record.items():
        try:
            decode(_saved(value))
        except Exception as error:  # what pickle meets may raise anything
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            why = f"it holds a {named[1]}" if named else f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise PartitionError(
                f"a checkpoint cannot hold this {part}",
                f"{why}; checkpoints are read without running code",
                "numbers, texts, tensors, and lists, tuples and dicts of them",
            ) from error
    return _saved(dict(record))


def decode(content: bytes) -> Any:
    """The inverse of `encode`."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def read(file: Path) -> Record:
    """The record in a file. Raises PartitionError for a format that is newer than this program."""
    record: Record = decode(file.read_bytes())
    if record["format"] > FORMAT:
        raise PartitionError(
            f"{file} has format {record['format']}, and this program reads up to {FORMAT}", try_="a newer autopart"
        )
    return record


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
