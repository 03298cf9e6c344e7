"""The row of the table of devices for a CUDA device."""

import math
import re
import warnings

from autopart.hardware import CUDA_NAMES, DEVICES, load_environment

from .rows import Device


def of_cuda(name: str, memory_bytes: int) -> Device:
    """The row for the device that the CUDA driver calls `name`; with a warning the row nearest in memory, where no
    row's pattern matches.

    Rows that compute nothing in bfloat16 are for names with their model alone: unknown devices are mostly newer. Among
    rows of equal memory, preferred are: a row whose model is part of the name, then a PCIe card if the name says so and
    none if not, then the newest.
    """
    load_environment()
    rows = list(CUDA_NAMES.items())[::-1]
    for pattern, row in rows:
        if re.fullmatch(pattern, name):
            return DEVICES[row]

    def distance(row: str) -> tuple[bool, float, bool, bool]:
        model, said = row.partition("-")[0], name.lower()
        older = "bfloat16" not in DEVICES[row].flops and model not in said
        nearness = abs(math.log(memory_bytes / DEVICES[row].memory_bytes))
        return older, nearness, model not in said, ("pcie" in row) != ("pcie" in said)

    nearest = min((row for _, row in rows), key=distance)
    warnings.warn(f"unknown CUDA device {name!r}: taken for the nearest known one, {nearest}", stacklevel=5)
    return DEVICES[nearest]
