"""Several batches that count as one: those of an update, and those of a data set that is evaluated."""

import dataclasses
from collections.abc import Sequence

from evenflow.errors import ConfigError
from evenflow.pipe.step.agree import Agreed
from evenflow.runtime.recorded.weights import Shares
from evenflow.runtime.stages.executor import Result


class Accumulated:
    """The batches since the last update, whose gradients add up to those of one mean.

    Gradients are in units of the first one's size.

    >>> batches = Accumulated()
    >>> [batches.add(Shares((1.0,), (1.0,), size, "tokens")) for size in (6, 3)]
    [1.0, 0.5]
    >>> batches.scale
    0.6666666666666666
    """

    def __init__(self) -> None:
        self._shares: list[Shares] = []

    def add(self, shares: Shares) -> float:
        """Note a batch that counts for as much as `shares` says, and return the factor of its loss.

        Raises `ConfigError` for one that is weighed by another unit than those before.
        """
        if self._shares and shares.unit != self._shares[0].unit:
            raise ConfigError(
                f"the batches accumulated so far are weighed by {self._shares[0].unit} and this one by "
                f"{shares.unit}, so that their losses have no common mean; give reduction="
            )
        self._shares.append(shares)
        return shares.size / self._unit

    @property
    def is_begun(self) -> bool:
        """Whether there was a batch since it was last cleared."""
        return bool(self._shares)

    @property
    def num_batches(self) -> int:
        """How many batches there were since it was last cleared."""
        return len(self._shares)

    def clear(self) -> None:
        """Begin anew, after an update."""
        self._shares.clear()

    @property
    def scale(self) -> float | None:
        """What turns gradients in units of the first batch into those of the mean over all, if several."""
        if len(self._shares) < 2 or self._shares[0].unit == "sums":
            return None
        return self._unit / (sum(shares.size for shares in self._shares) or 1.0)

    @property
    def _unit(self) -> float:
        return self._shares[0].size or 1.0


class OverBatches:
    """Results of several batches, put together as if they had been one; there where the last stage is."""

    def __init__(self) -> None:
        self._batches = Accumulated()
        self._losses: list[float] = []
        self._means: list[float] = []
        self._last: Agreed | None = None
        self.results: list[Result] | None = None

    def add(self, agreed: Agreed, results: Sequence[Result] | None) -> None:
        """Take in a batch; raises `ConfigError` for one that is weighed by another unit than those before."""
        shares = agreed.shares
        factor = self._batches.add(shares)
        amount = shares.num_rows if shares.unit == "sums" else shares.size
        self._losses += [part * factor for part in shares.losses]
        self._means += [part * amount for part in shares.means]
        self._last = agreed
        if results is not None:
            before = len(self._losses) - len(shares.losses)
            placed = (dataclasses.replace(each, number=before + each.number) for each in results)
            self.results = [*(self.results or ()), *placed]

    def agreed(self) -> Agreed:
        """All microbatches as those of one batch, with their shares in it; raises `ConfigError` for none."""
        if self._last is None:
            raise ConfigError("evaluate_all: the loader gave no batch at all")
        scale, total = self._batches.scale or 1.0, sum(self._means)
        shares = dataclasses.replace(
            self._last.shares,
            losses=tuple(part * scale for part in self._losses),
            means=tuple(part / total if total else 1 / len(self._means) for part in self._means),
        )
        return dataclasses.replace(self._last, shares=shares)
