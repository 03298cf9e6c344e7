"""What a step checks of its batch and of the model: what the trace and the first weights took for granted must hold."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from autopart.errors import PartitionError, few


class BatchForm:
    """The form that every batch must have: the keys of the traced batch, the dtypes of its tensors, and its other
    values, which are constants of the trace. A key whose value is None counts as absent."""

    def __init__(self, traced: Mapping[str, Any]) -> None:
        self.dtypes = {k: v.dtype for k, v in traced.items() if isinstance(v, Tensor)}
        self.constants = {k: v for k, v in traced.items() if v is not None and k not in self.dtypes}

    def check(self, batch: Mapping[str, Any]) -> None:
        """Raise PartitionError for a batch of another form."""
        given = {k: v for k, v in batch.items() if v is not None}
        known = {**self.dtypes, **self.constants}
        if added := [repr(k) for k in given if k not in known]:
            raise PartitionError(
                f"the batch has {few(added)}, which the batch at compile had not",
                "the emitted code has no such input and would train without it",
                f"autopart.compile with a batch that has {few(added)}, or a step without",
            )
        if lacking := [repr(k) for k in known if k not in given]:
            raise PartitionError(
                f"the batch lacks {few(lacking)}, which the batch at compile had",
                f"it has {', '.join(map(repr, given)) or 'nothing'}",
                f"a step with {few(lacking)}, or autopart.compile with a batch without",
            )
        for name, dtype in self.dtypes.items():
            value = given[name]
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            if found != dtype:
                raise PartitionError(
                    f"batch[{name!r}] is {found}, and was {dtype} at compile",
                    "the emitted code has the casts of the batch that was traced",
                    f"batch[{name!r}].to({dtype}), or autopart.compile with a batch as this one",
                )
        for name, value in self.constants.items():
            if given[name] is not value and (isinstance(given[name], Tensor) or given[name] != value):
                raise PartitionError(
                    f"batch[{name!r}] is {given[name]!r}, and was {value!r} at compile",
                    "a value that is no tensor with samples in dim 0 is a constant of the trace, "
                    "which the emitted code keeps",
                    "autopart.compile again for the new value, a tensor with a row a sample in its place, or a model "
                    "that computes it",
                )


class TrainingMode:
    """Whether the modules of a model are in training mode, as they were in the trace.

    same_trace  whether the model as it is now has the trace of the program. It is asked when modes have changed: a
                model without dropout computes the same in both
    """

    def __init__(self, model: nn.Module, same_trace: Callable[[], bool]) -> None:
        self.names, self.modules = zip(*model.named_modules(), strict=True)
        self.same_trace = same_trace
        self.modes = self._now()

    def _now(self) -> list[bool]:
        return [module.training for module in self.modules]

    def check(self) -> None:
        """Raise PartitionError where modes have changed and change what the model computes."""
        now = self._now()
        if now == self.modes:
            return
        if not self.same_trace():
            changed = [i for i, (before, after) in enumerate(zip(self.modes, now, strict=True)) if before != after]
            names = [self.names[i] or type(self.modules[i]).__name__ for i in changed]
            mode, call = ("training", "train") if now[changed[0]] else ("evaluation", "eval")
            raise PartitionError(
                f"{few(names)} changed to {mode} mode after compile",
                "the emitted code has the dropout and the norms of the mode that was traced",
                f"model.{call}() before autopart.compile, or the mode as it was",
            )
        self.modes = now


class ModelWeights:
    """The parameters of the user's model: which of them are trained, and whether they are as they were.

    names  id of a parameter -> its name in the emitted code
    """

    def __init__(self, model: nn.Module, aliases: Mapping[str, str]) -> None:
        found = list(model.named_parameters(remove_duplicate=False))
        self.parameters = {aliases.get(name, name): parameter for name, parameter in found}
        self.names = {id(parameter): aliases.get(name, name) for name, parameter in found}
        self.trained = {name for name, parameter in self.parameters.items() if parameter.requires_grad}
        self.seen()

    def seen(self) -> None:
        """Take the weights as they are now for those that the ranks have."""
        self.version = self._version()

    def _version(self) -> int:
        return sum(parameter._version for parameter in self.parameters.values())

    def check(self) -> None:
        """Raise PartitionError where a weight was written to since."""
        if self._version() != self.version:
            raise PartitionError(
                "the model's weights were changed after compile",
                "each rank trains its own shares of the weights, which were read at compile",
                "compiled.load_state_dict(model.state_dict()) to train the new weights, or a deepcopy of the model to "
                "change them elsewhere",
            )

    def frozen(self) -> frozenset[str]:
        """The trained parameters that do not require gradients any more. Raises PartitionError for one that was frozen
        at compile and is not any more."""
        now = {name for name, parameter in self.parameters.items() if parameter.requires_grad}
        if thawed := sorted(now - self.trained):
            raise PartitionError(
                f"{few(thawed)} requires a gradient, and did not at compile",
                "the emitted code has no gradients of parameters that were frozen",
                "autopart.compile again; or compile with it trainable, and freeze it until it is to be trained",
            )
        return frozenset(self.trained - now)


def refuse_parameters(*_: Any, **__: Any) -> Any:
    """In place of `parameters` of a stage, which optimizers, clipping and wrappers ask for."""
    raise PartitionError(
        "a stage's parameters are one rank's shares of the model's",
        "the norm, the update or the wrapping of shares is not that of the model",
        "compiled.optimizer(...), compiled.step(batch, clip_grad_norm=...), compiled.full_state_dict(); "
        "stage.named_parameters() to look at the shares",
    )
