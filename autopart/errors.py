"""The one error this package raises on purpose."""

from __future__ import annotations


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
