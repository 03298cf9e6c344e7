"""The copy of a model that is traced: its tensors are fake, so that it takes no memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from autopart.frontend.inputs import main_dtype
from autopart.frontend.layer_sampling import Dropped, Sample
from autopart.frontend.torch_private import FakeTensorMode


def fake_tensor(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """A fake CPU tensor of the shape and dtype. Two inputs that are one tensor get one each."""
    with mode:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def fake_model(
    model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None, sampled: Sequence[Sample]
) -> nn.Module:
    """A copy of the model with fake tensors, the same structure and tied weights, without the blocks that `sampled`
    drops.

    Parameters of the model's main dtype are of `dtype`, if one is given. Other parameters keep their dtypes.
    """
    own = main_dtype(model)
    memo: dict[int, Any] = {}
    for sample in sampled:
        blocks = list(model.get_submodule(sample.path).children())
        memo |= {id(block): Dropped() for i, block in enumerate(blocks) if i not in sample.traced}
    with mode:
        for module in _kept_modules(model, frozenset(memo)):
            for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                if id(tensor) in memo:
                    continue
                is_parameter = isinstance(tensor, nn.Parameter)
                wanted = dtype if dtype and is_parameter and tensor.dtype == own else tensor.dtype
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=wanted, device="cpu")
                memo[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake
    skeleton = copy.deepcopy(model, memo)
    for sample in sampled:
        shortened: Any = skeleton.get_submodule(sample.path)
        for block in sorted(set(range(sample.blocks)).difference(sample.traced), reverse=True):
            del shortened[block]
        if sample.traced != tuple(range(sample.kept)):
            _shorten_lists(skeleton, sample)
    _renew_aliases(skeleton)
    return skeleton


def _shorten_lists(skeleton: nn.Module, sample: Sample) -> None:
    """Take what tells of the dropped blocks out of the lists, of modules and of their configurations, that have an item
    for each block, such as the kinds of attention: a forward pass may read them by a block's place."""
    configs = {id(c): c for c in (getattr(m, "config", None) for m in skeleton.modules()) if hasattr(c, "__dict__")}
    lists = {id(v): v for o in (*skeleton.modules(), *configs.values()) for v in vars(o).values() if type(v) is list}
    for value in lists.values():
        if len(value) == sample.blocks and all(isinstance(item, (str, int, float)) for item in value):
            value[:] = [value[block] for block in sample.traced]


def _renew_aliases(skeleton: nn.Module) -> None:
    """Have plain lists, tuples and dicts that hold parameters or buffers of a module hold its present ones in a forward
    pass: torch.export replaces the tensors of modules, and of nothing else."""
    modules = list(skeleton.modules())
    tensors = [(m, n, t) for m in modules for n, t in [*m._parameters.items(), *m._buffers.items()] if t is not None]
    owners = {id(t): (m, n) for m, n, t in tensors}

    def renewed(value: Any) -> Any:
        if id(value) in owners:
            return getattr(*owners[id(value)])
        if type(value) in (list, tuple):
            return type(value)(map(renewed, value))
        return {k: renewed(v) for k, v in value.items()} if type(value) is dict else value

    def holds(value: Any) -> bool:
        inner = value.values() if type(value) is dict else value if type(value) in (list, tuple) else ()
        return id(value) in owners or any(map(holds, inner))

    own = vars(nn.Module()).keys()
    held = [(vars(m), k, v) for m in modules for k, v in vars(m).items() if k not in own and holds(v)]

    def renew(*_: object) -> None:
        for attributes, name, value in held:
            attributes[name] = renewed(value)

    def restore(*_: object) -> None:
        for attributes, name, value in held:
            attributes[name] = value

    if held:
        skeleton.register_forward_pre_hook(renew)
        skeleton.register_forward_hook(restore)


def _kept_modules(module: nn.Module, dropped: frozenset[int]) -> Iterator[nn.Module]:
    yield module
    for child in module.children():
        if id(child) not in dropped:
            yield from _kept_modules(child, dropped)


def gather_experts(model: nn.Module) -> None:
    """Have the mixtures of experts of transformers gather each token's weights. It is the same function and can be
    traced; other implementations loop over the experts in use, or sort the tokens."""
    for module in model.modules():
        if hasattr(module, "_is_expert_parallel"):
            module.config._experts_implementation = "batched_mm"  # type: ignore[union-attr]


def without_caches(model: nn.Module) -> None:
    """Have transformers return no cache of keys and values, which training does not use and torch.export refuses."""
    for config in (getattr(module, "config", None) for module in model.modules()):
        if getattr(config, "use_cache", False):
            config.use_cache = False  # type: ignore[union-attr]
