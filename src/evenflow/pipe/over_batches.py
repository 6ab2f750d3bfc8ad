"""Results of several batches, put together as if they had been one: a whole data set's loss and metrics."""

import dataclasses
from collections.abc import Sequence

from evenflow.errors import ConfigError
from evenflow.pipe.accumulated import Accumulated
from evenflow.pipe.agree import Agreed
from evenflow.runtime.executor import Result


class OverBatches:
    """Collects the microbatches of batch after batch; `results` are there where the last stage is."""

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
