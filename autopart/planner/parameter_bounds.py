"""Lower bounds on the bytes that the parameters of a position take, each parameter in the strategy of fewest bytes."""

import numpy as np

from autopart.cost.compute import Array
from autopart.cost.prices import Prices


def end_of_step_bytes(prices: Prices) -> Array:
    """[positions]: parameters, gradients, optimizer states, and the optimizer's temporaries where it steps all
    parameters at once; of the parameters that the position alone reads."""
    temporaries = prices.optimizer_workspace * prices.terms.training.foreach
    least = _least(prices, prices.state + temporaries)
    found = np.zeros(len(prices.sizes.table.labels))
    for index, (own, _) in prices.sizes.holders.items():
        np.add.at(found, own, least[index])
    return found


def backward_bytes(prices: Prices) -> tuple[Array, Array]:
    """[positions] each: whole parameters that are gathered for the backward of a position; what ranks have allocated
    while they reduce its gradients."""
    training, n = prices.terms.training, len(prices.sizes.table.labels)
    least, total, largest = _least(prices, prices.reduced_bytes), np.zeros(n), np.zeros(n)
    for index, (_, every) in prices.sizes.holders.items():
        np.add.at(total, every, least[index])
        np.maximum.at(largest, every, least[index])
    reduce = training.grad_reduce_workspace(total, largest, prices.sizes.single_parameter)
    return training.gathered_bytes(total), reduce


def _least(prices: Prices, each: Array) -> Array:
    """[nodes]: the least of an array of strategies over the strategies of every node."""
    return np.asarray(np.minimum.reduceat(each, prices.sizes.first[:-1]))
