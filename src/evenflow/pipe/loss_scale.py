"""The factor of the loss in float16, in whose small numbers gradients would vanish.

It grows until a gradient overflows somewhere; that step is left out, on all ranks, and it shrinks. The rule
and its numbers are those of `torch.amp.GradScaler`, which decides for each optimizer of each process alone:
ranks would part. Here the norm of all gradients tells, which is the same on every rank.
"""

from dataclasses import dataclass

GROWTH, BACKOFF, INTERVAL = 2.0, 0.5, 2000


@dataclass(slots=True)
class LossScale:
    """The factor, and how many steps in a row went well with it.

    >>> scale = LossScale(1024.0)
    >>> scale.update(overflowed=True)
    >>> scale.factor
    512.0
    """

    factor: float = 65536.0
    num_good: int = 0

    def go_on(self, factor: float, num_good: int) -> None:
        """Go on where another one was."""
        self.factor, self.num_good = factor, num_good

    def update(self, *, overflowed: bool) -> None:
        """Learn how a step went."""
        if overflowed:
            self.factor, self.num_good = self.factor * BACKOFF, 0
            return
        self.num_good += 1
        if self.num_good == INTERVAL:
            self.factor, self.num_good = self.factor * GROWTH, 0
