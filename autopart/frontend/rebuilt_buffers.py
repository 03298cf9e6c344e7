"""Buffers of a module on meta, from the same module made again on the CPU."""

import inspect
from typing import Any

import torch
from torch import nn

PLAIN = (str, int, float, bool, complex, type(None), torch.dtype)
NOT_GIVEN = ("device", "dtype", "factory_kwargs")
"""Arguments of constructors that need not be given, since they say nothing of values."""


def rebuilt_buffer(model: nn.Module, name: str) -> torch.Tensor | None:
    """The value of a buffer on meta: that of the smallest module around it that can be made again, but for the whole
    model. None where there is none.

    A module can be made again where it has kept every argument of its constructor under the argument's name. All that
    is made must have the plain attributes, and the shapes and dtypes of tensors, of what stands in the model.
    """
    parts = name.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        module = model.get_submodule(".".join(parts[:depth]))
        again = _made_again(module)
        if again is not None:
            value = again.get_buffer(".".join(parts[depth:]))
            return None if value.is_meta else value
    return None


def _made_again(module: nn.Module) -> nn.Module | None:
    arguments: dict[str, Any] = {}
    for parameter in inspect.signature(type(module)).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            return None
        if parameter.name in NOT_GIVEN and parameter.default is not parameter.empty:
            continue
        value = vars(module).get(parameter.name, parameter.empty)
        if value is parameter.empty or isinstance(value, (nn.Module, torch.Tensor)):
            return None
        arguments[parameter.name] = value
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            again = type(module)(**arguments)
    except Exception:  # whatever a constructor may raise
        return None
    return again if _form(again) == _form(module) else None


def _form(module: nn.Module) -> list[Any]:
    """What a module and its submodules are, but for the values of tensors."""
    return [
        (
            path,
            type(each),
            {
                k: v
                for k, v in vars(each).items()
                if isinstance(v, PLAIN) and k != "training" and not k.startswith("_is_hf")
            },
            {k: t if t is None else (t.shape, t.dtype) for k, t in [*each._parameters.items(), *each._buffers.items()]},
        )
        for path, each in module.named_modules()
    ]
