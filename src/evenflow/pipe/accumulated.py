"""The batches since the last update, whose gradients add up to those of one mean."""

from evenflow.errors import ConfigError
from evenflow.runtime.weights import Shares


class Accumulated:
    """What each batch since the last update counts for. Gradients are in units of the first one's size.

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
