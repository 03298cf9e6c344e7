"""A model's own initialisation, one module at a time, of a model that may be on meta.

A module is initialised by torch's `reset_parameters`, then by the `_init_weights` of the model of transformers that it
is in. Each may write tensors of submodules too, as GPT-2 does with its output projections. What writes what is found by
running all of them on a copy of the model on meta. One module's tensors are then made on the CPU, and what writes them
runs again, with all other tensors on meta. Random numbers depend on the seed and on the module's name.
"""

import copy
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autopart.errors import PartitionError
from autopart.frontend.rebuilt_buffers import rebuilt_buffer
from autopart.frontend.torch_private import StorageWeakRef, TorchDispatchMode

Step = Callable[[], Any]
IS_META = Tensor.is_meta.__get__  # type: ignore[attr-defined]


def on_meta(model: nn.Module, buffers: bool) -> Any:
    """A copy of a model with its parameters on meta and, with `buffers`, its buffers too."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in model.buffers() if buffers else ():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


class InitialValues:
    """The values that a model's own initialisation gives its tensors, by their first names."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.given, self.seed = model, seed
        self.last: tuple[tuple[int, str], Mapping[str, Tensor]] = (0, ""), {}
        """Seed and path of the module that was initialised last, with the tensors that were written."""

    @cached_property
    def model(self) -> Any:
        """A copy on meta."""
        return on_meta(self.given, buffers=True)

    @cached_property
    def steps(self) -> dict[str, list[Step]]:
        """Path of a module -> what writes its own tensors."""
        return _steps_that_write(self.model)

    def find(self, name: str) -> Tensor:
        """The whole tensor. Raises PartitionError where nothing initialises it."""
        path, _, key = name.rpartition(".")
        if self.last[0] != (self.seed, path) or not self.last[1]:
            self.last = (self.seed, path), {}
            self.last = (self.seed, path), self._initialised(path)
        if (value := self.last[1].get(key)) is not None:
            return value
        module = self.model.get_submodule(path)
        if key in module._buffers:
            if (value := rebuilt_buffer(self.model, name)) is not None:
                return value
            raise PartitionError(
                f"the buffer {name} has no value",
                "it is on the meta device, no file has it, and nothing that initialises the model writes it",
                f"its value in the model before autopart.compile; or {type(module).__name__} with every argument of "
                "its constructor as an attribute of the same name",
            )
        raise PartitionError(
            f"nothing initialises {name} of {type(module).__name__}",
            "neither a reset_parameters of its module nor the model's _init_weights writes it",
            f"def reset_parameters(self) in {type(module).__name__}; or weights=folder",
        )

    def _initialised(self, path: str) -> dict[str, Tensor]:
        """The tensors of one module, on the CPU, that its initialisation writes."""
        module = self.model.get_submodule(path)
        kept = dict(module._parameters), dict(module._buffers)
        made: dict[str, Tensor] = {}
        for held in (module._parameters, module._buffers):
            for key, old in held.items():
                if old is not None:
                    value: Tensor = torch.empty_like(old, device="cpu")
                    held[key] = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
                    made[key] = held[key]
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"), _Writes() as writes:
                torch.manual_seed(zlib.crc32(f"{self.seed} {path}".encode()))
                for step in self.steps.get(path, ()):
                    step()
        except Exception as error:  # whatever an initialisation may raise
            raise PartitionError(
                f"{path or type(module).__name__} cannot be initialised by itself",
                f"{type(error).__name__}: {error}",
                "weights=folder; or the model on the CPU",
            ) from error
        finally:
            module._parameters.update(kept[0])
            module._buffers.update(kept[1])
        return {key: value.detach() for key, value in made.items() if writes.of(value) or not value.numel()}


class _Skips(TorchFunctionMode):
    """Notes the tensors that are asked whether they are on meta: some of torch.nn.init return at once for these."""

    def __init__(self, written: set[StorageWeakRef]) -> None:
        super().__init__()
        self.written = written

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == IS_META:
            self.written.add(StorageWeakRef(args[0].untyped_storage()))
        return func(*args, **(kwargs or {}))


class _Writes(TorchDispatchMode):
    """Notes the memory that operators write."""

    def __init__(self) -> None:
        super().__init__()
        self.written: set[StorageWeakRef] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(given, Tensor):
                self.written.add(StorageWeakRef(given.untyped_storage()))
        return result

    def of(self, tensor: Tensor) -> bool:
        """Whether a tensor's memory was written."""
        return StorageWeakRef(tensor.untyped_storage()) in self.written


def _steps_that_write(model: nn.Module) -> dict[str, list[Step]]:
    """Path of a module -> what writes its own tensors, in order; of steps of other modules, those of its ancestors."""
    owners: dict[StorageWeakRef, str] = {}
    for path, module in model.named_modules():
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            owners.setdefault(StorageWeakRef(tensor.untyped_storage()), path)
    steps: dict[str, list[Step]] = defaultdict(list)
    for path, step in [*_constructions(model, ""), *_initialisations(model, "", None)]:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _Writes() as writes, _Skips(writes.written):
            try:
                step()
                paths = {owners[memory] for memory in writes.written if memory in owners}
            except Exception:  # whatever cannot be done on meta; it is run again for the module's own tensors
                paths = {path}
        for owner in paths:
            if owner == path or not path or owner.startswith(f"{path}."):
                steps[owner].append(step)
    return steps


def _constructions(module: nn.Module, path: str) -> Iterator[tuple[str, Step]]:
    """What torch's modules do when they are made: submodules first."""
    for name, child in module.named_children():
        yield from _constructions(child, f"{path}.{name}" if path else name)
    step = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if callable(step):
        yield path, step


def _initialisations(
    module: nn.Module, path: str, step: Callable[[nn.Module], Any] | None
) -> Iterator[tuple[str, Step]]:
    """What transformers does once a model is made: submodules first, each by the innermost model that it is in."""
    step = getattr(module, "_init_weights", step) if hasattr(module, "init_weights") else step
    for name, child in module.named_children():
        yield from _initialisations(child, f"{path}.{name}" if path else name, step)
    if step is not None:
        yield path, lambda: step(module)
