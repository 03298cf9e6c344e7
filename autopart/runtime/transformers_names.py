"""What transformers calls a model's tensors in files: tied weights, prefixes of base models, converted checkpoints.

transformers is imported inside of functions: a plain module is trained without it.
"""

import copy
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from autopart.errors import PartitionError

Tensors = Mapping[str, Tensor]


def is_pretrained(model: nn.Module) -> bool:
    """Whether a model is one of transformers'."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def names_of(model: nn.Module) -> list[tuple[str, ...]]:
    """The names of the state dict, those of one tensor together, its first name first."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    same: dict[str, list[str]] = {}
    for name, tensor in tensors:
        same.setdefault(first.setdefault(id(tensor), name), []).append(name)
    known = model.state_dict().keys()
    return [kept for names in same.values() if (kept := tuple(name for name in names if name in known))]


def saved_names(model: nn.Module) -> list[tuple[str, str]]:
    """(name in the file, first name of the tensor) of all that is saved, in the order of the state dict.

    A plain module saves its whole state dict. A model of transformers saves tied weights once, under the name that
    others are tied to, and leaves out what its class says.
    """
    pretrained = is_pretrained(model)
    targets = getattr(model, "all_tied_weights_keys", None) or {}
    skipped = set(getattr(model, "_keys_to_ignore_on_save", None) or ()) if pretrained else set()
    saved: dict[str, str] = {}
    for names in names_of(model):
        kept = [name for name in names if name not in targets] or [sorted(names)[-1]]
        saved |= dict.fromkeys((kept[:1] if pretrained else names), names[0])
    order = (name for name in model.state_dict() if name in saved and name not in skipped)
    return [(name, saved[name]) for name in order]


def original_format(model: nn.Module, shapes: Tensors) -> Callable[[str, Tensor], Tensors]:
    """How a tensor of the model lies in files: transformers fuses some tensors of a checkpoint as it loads them.

    shapes  what is saved, on meta

    A model that fuses several of its tensors into one of a file is saved as it is: transformers reads this too.
    """

    def as_it_is(name: str, tensor: Tensor) -> Tensors:
        return {name: tensor}

    if not is_pretrained(model):
        return as_it_is
    from transformers.core_model_loading import revert_weight_conversion

    def reverted(name: str, tensor: Tensor) -> Tensors:
        found: Tensors = revert_weight_conversion(model, {name: tensor})  # type: ignore[arg-type]
        return {key: value.clone() if len(found) > 1 else value for key, value in found.items()}

    every = revert_weight_conversion(model, dict(shapes))  # type: ignore[arg-type]
    if every.keys() == shapes.keys():
        return as_it_is
    try:
        alone = {key: value.shape for name, tensor in shapes.items() for key, value in reverted(name, tensor).items()}
    except Exception:  # a conversion that lacks the other tensors
        return as_it_is
    return reverted if alone == {key: value.shape for key, value in every.items()} else as_it_is


@dataclass(frozen=True)
class FileTensors:
    """Tensors of a file that give tensors of the model.

    keys     in the file
    convert  what makes the model's tensors of them, by name; None: the only key is the only tensor
    """

    keys: tuple[str, ...]
    convert: Callable[[Tensors], Tensors] | None = None


def tensors_in_file(model: nn.Module, shapes: Tensors) -> Iterator[tuple[str, FileTensors]]:
    """Names of tensors and what of a file gives them; names need not be the model's.

    shapes  the file's keys with their tensors on meta

    For a model of transformers keys may lack the prefix of its base model, or have it, or be in the checkpoint's
    original format.
    """
    if not is_pretrained(model):
        yield from ((key, FileTensors((key,))) for key in shapes)
        return
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    renamings: list[Any] = [each for each in transforms if not isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    prefix, own = str(model.base_model_prefix), model.state_dict()
    groups: dict[str, list[tuple[str, str]]] = {}
    for key in sorted(shapes, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, own)
        if name not in own:
            plain, _ = rename_source_key(key, [], [], prefix, own)
            name, pattern = (plain, None) if plain in own or pattern is None else (name, pattern)
        if pattern is None:
            yield name, FileTensors((key,))
        else:
            groups.setdefault(name, []).append((pattern, key))
    for name, members in groups.items():
        convert = _conversion(model, name, by_pattern[members[0][0]], members)
        keys = tuple(key for _, key in members)
        for target in convert({key: shapes[key] for key in keys}):
            yield target, FileTensors(keys, convert)


def _conversion(
    model: Any, name: str, converter: Any, members: Sequence[tuple[str, str]]
) -> Callable[[Tensors], Tensors]:
    """What makes tensors of the model, `name` and perhaps others, of the keys in `members`."""

    def convert(tensors: Tensors) -> Tensors:
        mine = copy.deepcopy(converter)
        for pattern, key in members:
            mine.add_tensor(name, key, pattern, tensors[key])
        try:
            found = mine.convert(name, model=model, config=model.config)
        except Exception as error:  # whatever transformers' operations raise
            raise PartitionError(
                f"the weights cannot be converted to {name}",
                f"{type(error).__name__}: {error}",
                "model.save_pretrained of a model that was loaded whole",
            ) from error
        return {key: value[0] if isinstance(value, list) else value for key, value in found.items()}

    return convert


def may_be_missing(model: nn.Module, name: str) -> bool:
    """Whether transformers loads a model from a file without this tensor."""
    return _matches(getattr(model, "_keys_to_ignore_on_load_missing", None), name)


def may_be_unexpected(model: nn.Module, name: str) -> bool:
    """Whether a file may have this tensor that the model has not: a buffer that is not saved, or was in old files."""
    buffers = {buffer for buffer, _ in model.named_buffers(remove_duplicate=False)}
    if name in buffers or _matches(getattr(model, "_keys_to_ignore_on_load_unexpected", None), name):
        return True
    return is_pretrained(model) and name.endswith(("rotary_emb.inv_freq", "position_ids"))


def _matches(patterns: Any, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())
