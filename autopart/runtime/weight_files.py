"""Files of weights as Hugging Face lays them out: one model.safetensors, or numbered ones with an index.

Tensors come one at a time. No more of them are held than fill one file.
"""

import json
import re
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from autopart.errors import PartitionError

UNITS = {
    "B": 1,
    **{f"{k}B": 1000**i for i, k in enumerate("KMGT", 1)},
    **{f"{k}IB": 1024**i for i, k in enumerate("KMGT", 1)},
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def size_of(given: int | str) -> int:
    """The bytes of a size such as 5000, "5GB" (10^9 each) or "5GiB" (2^30 each). Raises PartitionError for others."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(given).strip())
    size = int(float(found[1]) * UNITS.get(found[2].upper() or "B", 0)) if found else 0
    if size <= 0:
        raise PartitionError(
            f"max_shard_size={given!r} is no size", "it is a number of bytes, or a text with a unit", '"5GB", "500MB"'
        )
    return size


class WeightFiles:
    """Writes tensors into files of at most `limit` bytes each; a larger tensor has a file of its own.

    Files have temporary names until `close`.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.waiting: dict[str, Tensor] = {}
        self.written: list[list[str]] = []
        self.bytes = self.elements = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one more tensor; write those before it where it does not fit beside them."""
        if self.waiting and sum(t.nbytes for t in self.waiting.values()) + tensor.nbytes > self.limit:
            self._write()
        self.waiting[name] = tensor.contiguous()
        self.bytes += tensor.nbytes
        self.elements += tensor.numel()

    def _write(self) -> None:
        save_file(self.waiting, self.folder / self._temporary(len(self.written)), metadata={"format": "pt"})
        self.written.append(list(self.waiting))
        self.waiting = {}

    def _temporary(self, number: int) -> str:
        return f"{SINGLE}.{number}.partial"

    def close(self) -> None:
        """Write what is left, give all files their names, and remove those of an earlier save."""
        if self.waiting or not self.written:
            self._write()
        count = len(self.written)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        for old in self.folder.glob("model*.safetensors*"):
            numbered = re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", old.name)
            if (numbered and old.name not in names) or old.name == INDEX:
                old.unlink()
        for number, name in enumerate(names):
            (self.folder / self._temporary(number)).replace(self.folder / name)
        if count > 1:
            index = {
                "metadata": {"total_parameters": self.elements, "total_size": self.bytes},
                "weight_map": {key: name for name, keys in zip(names, self.written, strict=True) for key in keys},
            }
            (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
