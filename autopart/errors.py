"""The one error this package raises on purpose."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

SPELLINGS = {
    "half": "float16",
    "single": "float32",
    "float": "float32",
    "double": "float64",
    **{f"{f}{bits}": f"float{bits}" for f in ("f", "fp") for bits in (16, 32, 64)},
    **{f"{bf}16": "bfloat16" for bf in ("b", "bf")},
}
"""Other names of dtypes -> torch's."""


class PartitionError(ValueError):
    """A request that cannot be met, with the reason and a way out where one is known.

    `what` states the failure, `why` its cause, `try_` what to do instead; ``str`` shows each that is
    given on its own line.
    """

    def __init__(self, what: str, why: str = "", try_: str = "") -> None:
        self.what, self.why, self.try_ = what, why, try_
        details = (f"\n  {label}: {text}" for label, text in (("why", why), ("try", try_)) if text)
        super().__init__(what + "".join(details))

    def __reduce__(self) -> tuple[type[PartitionError], tuple[str, str, str]]:
        """Pickle by parts: the default would hand the joined text back as `what`."""
        return type(self), (self.what, self.why, self.try_)


class OperatorError(PartitionError):
    """What the forward pass does in one place is refused: other operators, traced or not, would not change that."""


def closest(name: str, known: Iterable[str]) -> list[str]:
    """What may have been meant by a name: those that begin with it, else the one most alike.

    Names that begin alike go before difflib's, to which "h200" is closer to "h100" than "h100-80gb" is.
    """
    known, name = list(known), name.lower().removeprefix("torch.")
    if SPELLINGS.get(name) in known:
        return [SPELLINGS[name]]
    return [other for other in known if name and other.startswith(name)] or difflib.get_close_matches(name, known, n=1)


def not_known(setting: str, value: object, known: Iterable[object]) -> PartitionError:
    """The error for a setting that is none of a few values, with the one that may have been meant."""
    values = {str(each): each for each in known}
    meant = [f"{setting}={values[name]!r}" for name in closest(str(value), values)]
    return PartitionError(
        f"{setting}={value!r} is not known",
        f"known are {', '.join(values)}",
        " or ".join(meant) or f"one of {', '.join(values)}",
    )


def few(texts: Sequence[str], shown: int = 4, joint: str = ", ") -> str:
    """The first of some texts, and how many more there are."""
    more = len(texts) - shown
    return joint.join(texts[:shown]) + (f"{joint}and {more} more" if more > 0 else "")
