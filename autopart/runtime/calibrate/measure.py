"""A calibration: every case in turn on all ranks at once, round after round."""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from autopart.runtime.calibrate.communication_cases import CommunicationCases
from autopart.runtime.calibrate.compute_cases import ComputeCases
from autopart.runtime.calibrate.sizes import Sizes
from autopart.runtime.calibrate.timing import Seconds, Timer
from autopart.runtime.launch import cores_here


@dataclass
class Measurements:
    """What was measured.

    ranks    number of ranks that measured at once
    threads  number of threads of each rank
    cores    number of cores that the ranks share
    cases    (table, entry, sizes) -> the seconds of every round, each the mean over ranks
    """

    ranks: int
    threads: int
    cores: int
    cases: dict[tuple[str, str, tuple[float, ...]], list[Seconds]] = field(default_factory=lambda: defaultdict(list))


def measure(sizes: Sizes, dtypes: tuple[str, ...], rounds: int, device: torch.device) -> Measurements:
    """Time every case in every round."""
    timer = Timer(sizes, device)
    cases = [*ComputeCases(timer).cases(dtypes), *CommunicationCases(timer).cases()]
    found = Measurements(dist.get_world_size(), torch.get_num_threads(), cores_here())
    for case in (case for _ in range(rounds) for case in cases):
        timed = case.make()
        dist.barrier()
        seconds = torch.tensor(timed(), dtype=torch.float64)
        dist.all_reduce(seconds)
        mean = tuple((seconds / found.ranks).tolist())
        found.cases[case.table, case.entry, case.sizes].append(mean)
    return found
