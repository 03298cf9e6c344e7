"""Batches of transformers.Trainer as `Compiled` takes them, and the model's outputs for them on every rank."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor

from autopart.frontend.batch import Batch, samples_of, take
from autopart.runtime.agreement import from_rank_zero
from autopart.runtime.compiled import Compiled


@contextmanager
def preserved_rng_states() -> Iterator[None]:
    """Give the generators of Python, numpy and torch on the CPU their states back after the block."""
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(states[0])
    numpy.random.set_state(states[1])


def divisible(batch: Batch, ranks: int) -> tuple[Batch, int]:
    """(the batch repeated n times along the samples, n), for n = ranks / gcd(samples, ranks).

    `ranks` divides the samples of the repeated batch. A mean over its samples is that over the batch.
    """
    rows = samples_of(batch)
    times = ranks // math.gcd(rows, ranks)
    return (batch if times == 1 else take(batch, rows * times)), times


def evaluated(
    compiled: Compiled, batch: Batch, outputs: Sequence[str], targets: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch in evaluation mode, and the outputs of these names on the CPU of every rank.

    All ranks call this function. `targets` is as in `Compiled.backward`.
    """
    whole, times = divisible(batch, compiled.data_ranks)
    targets = None if targets is None else targets * times
    if not outputs:
        return compiled.evaluate(whole, targets=targets), {}
    loss, mine = compiled.evaluate(whole, outputs=outputs, targets=targets)
    host = compiled.groups.host
    everywhere = dict(from_rank_zero(mine, host, lambda shapes: None)) if host.size > 1 else mine
    rows = samples_of(batch)
    return loss, {name: everywhere[name] if times == 1 else everywhere[name][:rows] for name in outputs}


def nested(named: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """Tensors by dotted names -> tensors and tuples of tensors, in order: (logits, (h0, h1)) of the names "logits",
    "hidden_states.0" and "hidden_states.1"."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in named.items():
        first, _, rest = name.partition(".")
        groups.setdefault(first, {})[rest] = value
    return tuple(each[""] if "" in each else nested(each) for each in groups.values())
