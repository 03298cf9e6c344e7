"""Rules of the fused kernels, which stand beside the kernels themselves."""

from autopart.kernels.table import KERNELS
from autopart.sharding.rules.base import Rule

RULES = {f"autopart.{name}": Rule(kernel.rule) for name, kernel in KERNELS.items() if kernel.rule}
