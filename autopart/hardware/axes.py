"""The axes of a mesh whose degrees a user may fix."""

import math
from collections.abc import Iterable

from autopart.errors import PartitionError

AXES = ("pp", "dp", "tp")
"""Pipeline, data and tensor parallelism."""


def check_axes(axes: Iterable[tuple[str, int]], size: int) -> None:
    """Raise PartitionError for degrees of unknown axes, and for those that do not fit a number of devices."""
    axes = tuple(axes)
    names, degrees = [name for name, _ in axes], [degree for _, degree in axes]
    if len(set(names)) < len(names) or not set(names) <= set(AXES):
        raise PartitionError(f"bad mesh axes {names}", why=f"each must be one of {', '.join(AXES)}, once")
    product = math.prod(degrees)
    complete = len(names) == len(AXES)
    if min(degrees, default=1) < 1 or size % product or (complete and product != size):
        given = ", ".join(f"{name}={degree}" for name, degree in axes)
        raise PartitionError(
            f"the degrees {given} do not fit {size} devices",
            why=f"their product {product} must {'equal' if complete else 'divide'} {size}",
        )
