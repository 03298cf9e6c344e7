"""A torch optimizer over whole parameters -> the same optimizer over one rank's shares of them."""

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autopart.errors import PartitionError
from autopart.runtime.groups import Groups
from autopart.runtime.parameters import share_of

Optimizer = torch.optim.Optimizer
OPTIMIZERS: Mapping[str, tuple[type[Any], Mapping[str, Any]]] = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "adagrad": (torch.optim.Adagrad, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
}
"""A plan's optimizer -> its torch class, and its settings besides the learning rate."""
PROBE_SHAPE, PROBE_STEPS = (6, 4), 3
"""Shape of the parameter, and number of steps, on which an optimizer is tried."""
ON_CPU = {"capturable": False, "fused": None, "foreach": None}
"""Settings of torch's optimizers that choose an implementation, as they are for the trial."""


def over_shares(given: Optimizer, names: Mapping[int, str], shares: Sequence[Any], groups: Groups) -> Optimizer:
    """An optimizer of the same class, groups, settings and states as `given`, over a rank's shares.

    names   id of a parameter of the model -> the name in the shares' origins
    shares  what this rank trains

    A group has the shares of its parameters, none where this rank has none of them; all ranks have the same groups, so
    that schedulers work alike. States of a parameter's shape are split as the parameter is. Raises PartitionError for
    parameters that are not the model's, and for an optimizer that a scheduler steps already.
    """
    _check_known(_parameters(given.param_groups), names)
    if "step" in vars(given):
        raise PartitionError(
            "a learning-rate scheduler was made for this optimizer already",
            "the scheduler would go on setting the learning rates of this optimizer, which steps nothing",
            "optimizer = compiled.optimizer(...) first, then a scheduler of what it returns",
        )
    by_name: dict[str, list[Any]] = defaultdict(list)
    for share in shares:
        by_name[share.origin.name].append(share)
    here = [[s for p in group["params"] for s in by_name[names[id(p)]]] for group in given.param_groups]
    made = _like(given, [{**group, "params": params} for group, params in zip(given.param_groups, here, strict=True)])
    for parameter in _parameters(given.param_groups):
        for share in by_name[names[id(parameter)]]:
            if state := given.state.get(parameter):
                made.state[share] = {key: _state_share(v, parameter, share, groups) for key, v in state.items()}
    return made


def _check_known(parameters: Sequence[Any], names: Mapping[int, str]) -> None:
    """Raise PartitionError for parameters that are not the model's."""
    if strange := [p for p in parameters if id(p) not in names]:
        raise PartitionError(
            f"{len(strange)} of the optimizer's parameters are none of the model's",
            "each rank trains its shares of the parameters of the model that was compiled",
            "an optimizer over model.parameters(), of the model that autopart.compile was given",
        )


def take_groups_of(
    optimizer: Any, names: Mapping[int, str], shares: Sequence[Any], group_names: list[list[str]]
) -> None:
    """Let the optimizer's `add_param_group` take a group over parameters of the model, whose shares it adds.

    names, shares  as in `over_shares`
    group_names    names of every group's parameters; those of a new group are appended
    """
    add = type(optimizer).add_param_group

    def add_param_group(group: dict[str, Any]) -> None:
        given = group["params"]
        parameters = [given] if isinstance(given, Tensor) else [p[1] if isinstance(p, tuple) else p for p in given]
        _check_known(parameters, names)
        mine = list(dict.fromkeys(names[id(p)] for p in parameters))
        if twice := [name for name in mine if any(name in known for known in group_names)]:
            raise PartitionError(
                f"{twice[0]} is in a group of the optimizer already",
                "a parameter has the settings of one group",
                "a group of parameters that are in none, or other settings of the group that there is",
            )
        add(optimizer, {**group, "params": [share for share in shares if share.origin.name in mine]})
        group_names.append(mine)

    optimizer.add_param_group = add_param_group


def _state_share(value: Any, parameter: Tensor, share: Any, groups: Groups) -> Any:
    """A rank's share of one state of a parameter."""
    if isinstance(value, Tensor) and value.shape == parameter.shape:
        dtype = share.dtype if value.dtype == parameter.dtype else value.dtype
        return share_of(value, share.origin, groups).to(share.device, dtype, copy=True)
    return copy.deepcopy(value)


def names_by_group(given: Optimizer, names: Mapping[int, str]) -> list[list[str]]:
    """The names of every group's parameters, those that other ranks train included."""
    return [[names[id(p)] for p in group["params"]] for group in given.param_groups]


def check(given: Optimizer, shares: Sequence[Any], groups: Groups) -> None:
    """Raise PartitionError on every rank for an optimizer that asks for a closure; and where one rank trains parts of
    parameters with an optimizer whose update of a part is not that part of the whole parameter's update."""
    closure = inspect.signature(type(given).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise PartitionError(
            f"{type(given).__name__} asks for a closure",
            "its step evaluates the loss several times, and a step of the compiled model does once",
            "an optimizer that steps by gradients alone, such as AdamW",
        )
    split = any(s.origin.sliced or any(p.kind == "S" for p in s.origin.placed.values()) for s in shares)
    groups_here = [group for group in given.param_groups if group["params"]]
    found = torch.tensor(int(split and not all(_elementwise(given, group) for group in groups_here)))
    if groups.host.size > 1:
        groups.host.all_reduce(found, "max")
    if found:
        raise PartitionError(
            f"{type(given).__name__} cannot train parts of parameters",
            "with tensor parallelism or ZeRO a rank has a part of a parameter, and this optimizer's update of one "
            "element depends on others",
            "tp=1 and zero=0, or an optimizer that treats every element alone, such as AdamW",
        )


def _elementwise(given: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether rows, columns and flat slices of a random parameter are updated as in the whole parameter."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(PROBE_SHAPE, generator=generator)
    gradients = [torch.randn(PROBE_SHAPE, generator=generator) for _ in range(PROBE_STEPS)]
    parts: Iterable[Callable[[Tensor], Sequence[Tensor]]] = (
        lambda x: x.chunk(2, 0),
        lambda x: x.chunk(2, 1),
        lambda x: x.flatten().chunk(2),
    )
    (whole,) = _tried(given, group, [value], [[g] for g in gradients]) or (None,)
    if whole is None:
        return False
    for part in parts:
        found = _tried(given, group, part(value), [part(g) for g in gradients])
        if found is None or not all(map(torch.allclose, found, part(whole))):
            return False
    return True


def _tried(
    given: Optimizer, group: Mapping[str, Any], values: Sequence[Tensor], gradients: Sequence[Sequence[Tensor]]
) -> list[Tensor] | None:
    """The values after some steps with these gradients; None where the optimizer does not take them. States that the
    optimizer has before its first step, such as Adagrad's, are uniform."""
    parameters = [nn.Parameter(value.clone()) for value in values]
    like = group["params"][0]
    try:
        made = _like(given, [{**group, **{key: v for key, v in ON_CPU.items() if key in group}, "params": parameters}])
        for key, state in given.state.get(like, {}).items():
            uniform = isinstance(state, Tensor) and state.shape == like.shape
            for parameter in parameters:
                first = torch.full_like(parameter, state.flatten()[0]) if uniform else copy.deepcopy(state)
                made.state[parameter][key] = first
        for each in gradients:
            for parameter, gradient in zip(parameters, each, strict=True):
                parameter.grad = gradient.clone()
            made.step()
    except Exception:  # an optimizer of the user's may raise anything
        return None
    return [parameter.detach() for parameter in parameters]


def _like(given: Optimizer, param_groups: list[dict[str, Any]]) -> Optimizer:
    """An optimizer of the class and settings of `given` over other groups, without state."""
    made: Optimizer = object.__new__(type(given))
    vars(made).update({key: copy.copy(value) for key, value in vars(given).items()})
    made.param_groups, made.state = param_groups, defaultdict(dict)
    return made


def _parameters(param_groups: Iterable[Mapping[str, Any]]) -> list[Any]:
    return [parameter for group in param_groups for parameter in group["params"]]
