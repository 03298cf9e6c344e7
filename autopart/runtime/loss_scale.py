"""Dynamic loss scaling for float16 (Micikevicius et al., arXiv 1710.03740)."""

from dataclasses import dataclass


@dataclass
class LossScale:
    """The factor of the loss by which small gradients stay above float16's smallest number. Factors and interval are
    those of torch.amp.GradScaler.

    factor  of the next backward
    finite  updates with finite gradients since the factor changed
    """

    factor: float = 2.0**16
    finite: int = 0
    GROWTH = 2.0
    BACKOFF = 0.5
    INTERVAL = 2000

    def updated(self, finite: bool) -> None:
        """Halve the factor after gradients that overflowed, double it after INTERVAL updates without."""
        if not finite:
            self.factor, self.finite = self.factor * self.BACKOFF, 0
            return
        self.finite += 1
        if self.finite == self.INTERVAL:
            self.factor, self.finite = self.factor * self.GROWTH, 0
