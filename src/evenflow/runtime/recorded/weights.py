"""What each microbatch counts for, so that the step's loss equals the unsplit one over the whole batch.

A mean over tokens weighs microbatches by their tokens, a mean over rows by their rows, and sums are added up.
Which of them the loss function is, its recording says (`graph.cutting.reduction`) or the user does.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, assert_never

import torch

from evenflow.errors import ConfigError
from evenflow.graph.cutting.reduction import (
    Numbers,
    Quotient,
    Reduction,
    Targets,
    Total,
    Unread,
    read_reduction,
)
from evenflow.graph.nouns.template import Template
from evenflow.graph.nouns.tree import BatchLeaf
from evenflow.runtime.program.glue import Glue
from evenflow.runtime.recorded.microbatch import batch_size, place_of_given_count, tensors
from evenflow.runtime.recorded.recordings import Recordings

# How a loss function reduces over its microbatch: by name, or as a function of it; None: read it.
ReductionChoice: TypeAlias = Literal["item-mean", "token-mean", "sum"] | Callable[[Any], Any] | None
CHOICES = ("item-mean", "token-mean", "sum")
IGNORED = -100  # the label that torch's and Hugging Face's losses leave out
_TWO_MEANS = (
    "the loss is a sum of means over different numbers of things, and no weights of the microbatches make it "
    "the unsplit loss: they are weighted by rows"
)
_CPU = torch.device("cpu")

Unit: TypeAlias = Literal["tokens", "numbers", "items", "microbatches", "given weights", "sums"]


@dataclass(frozen=True, slots=True)
class Weight:
    """What one microbatch counts for. `amounts`: one for each term of the loss that is a mean of its own.

    `rows` is the length of its dim 0, where its tensors have a common one.
    """

    unit: Unit
    amounts: tuple[float, ...]
    rows: int | None


@dataclass(frozen=True, slots=True)
class Shares:
    """The microbatches' factors in the step's loss; in `means` they add up to 1, for metrics.

    `size` is what the batch counts for among accumulated ones, in `unit`, and `num_rows` are its rows, or
    microbatches where those are unknown. `differs` says why the step's loss
    is not the unsplit one, where it is not.
    """

    losses: tuple[float, ...]
    means: tuple[float, ...]
    size: float
    unit: Unit
    differs: str | None = None
    num_rows: int = 1


def shares_of(weights: Sequence[Weight]) -> Shares:
    """Each microbatch's share of the step's loss.

    >>> shares_of([Weight("tokens", (6,), 2), Weight("tokens", (2,), 2)]).losses
    (0.75, 0.25)
    """
    by_rows = _shares([weight.rows for weight in weights])
    units = {weight.unit for weight in weights}
    unit = weights[0].unit
    num_rows = sum(weight.rows or 1 for weight in weights)
    if len(units) > 1:
        return Shares(
            by_rows,
            by_rows,
            num_rows,
            "items",
            "the loss function reduces this step's microbatches in different ways "
            f"({' and '.join(sorted(units))}): they are weighted by rows",
            num_rows=num_rows,
        )
    if unit == "sums":
        return Shares((1.0,) * len(weights), by_rows, 1, unit, num_rows=num_rows)
    terms = list(zip(*(weight.amounts for weight in weights), strict=True))
    found = _shares(terms[0])
    if all(term == terms[0] for term in terms):
        return Shares(found, found, sum(terms[0]), unit, num_rows=num_rows)
    same = all(math.isclose(*pair) for t in terms for pair in zip(_shares(t), by_rows, strict=True))
    return Shares(by_rows, by_rows, num_rows, "items", None if same else _TWO_MEANS, num_rows)


def _shares(amounts: Sequence[float | None]) -> tuple[float, ...]:
    """In proportion; alike where an amount is unknown or all are zero."""
    known = [amount for amount in amounts if amount is not None]
    total = sum(known)
    if len(known) < len(amounts) or not total:
        return (1 / len(amounts),) * len(amounts)
    return tuple(amount / total for amount in known)


# -- the ways in which a microbatch of one recording is weighed


@dataclass(frozen=True, slots=True)
class _Given:
    """As the user's function says."""

    function: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class _Summed:
    """The loss is a sum; `more`: and something else, which every microbatch adds again."""

    more: bool = False


@dataclass(frozen=True, slots=True)
class _Counted:
    """Tokens, as terms of the loss count them; `glue` computes what is counted."""

    terms: tuple[Targets | Quotient, ...]
    glue: Glue


@dataclass(frozen=True, slots=True)
class _Labelled:
    """Tokens: labels that are not left out."""


@dataclass(frozen=True, slots=True)
class _Elementwise:
    """So many numbers, of each term."""

    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _ByRows:
    """Rows."""


@dataclass(frozen=True, slots=True)
class _Alike:
    """Nothing is known to count."""


_Way: TypeAlias = _Given | _Summed | _Counted | _Labelled | _Elementwise | _ByRows | _Alike


class Weigher:
    """Weighs microbatches: as the user said, or as their recordings say."""

    def __init__(self, recordings: Recordings, choice: ReductionChoice) -> None:
        self._recordings, self._choice = recordings, choice
        self._ways: dict[int, _Way] = {}  # by recording

    def of_loss(self, number: int, microbatch: Any) -> Weight:
        """What this microbatch of recording `number` counts for in the step's loss.

        Raises `ConfigError` where that cannot be told.
        """
        rows = rows_of(microbatch)
        match self._way(number, microbatch):
            case _Given(function):
                return Weight("given weights", (_given(function, microbatch),), rows)
            case _Summed():
                return Weight("sums", (1,), rows)
            case _Counted(terms, glue):
                values = glue.values(tensors(microbatch))
                return Weight("tokens", tuple(self._count(one, values) for one in terms), rows)
            case _Labelled():
                labels = labels_of(microbatch)
                assert labels is not None, "seen when the way was found"
                return Weight("tokens", (int((labels != IGNORED).sum()),), rows)
            case _Elementwise(numbers):
                return Weight("numbers", numbers, rows)
            case _ByRows():
                return Weight("items", (batch_size(microbatch),), rows)
            case _Alike():
                return Weight("microbatches", (1,), rows)
            case way:
                assert_never(way)

    def of_rows(self, number: int, microbatch: Any) -> Weight:
        """What a microbatch counts for where nothing is a loss: its rows."""
        rows = rows_of(microbatch)
        return Weight("microbatches" if rows is None else "items", (rows or 1,), rows)

    def describe(self, number: int, microbatch: Any) -> str:
        """How the step's loss is put together, for people. Raises as `of_loss` does."""
        self.of_loss(number, microbatch)
        match self._way(number, microbatch):
            case _Given():
                return "mean with the weights that reduction= gives"
            case _Summed():
                return "sum over microbatches"
            case _Counted(terms) if any(isinstance(one, Quotient) for one in terms):
                return "mean over tokens (the sum's divisor)"
            case _Counted():
                return f"mean over tokens (targets of its cross-entropy, without {IGNORED})"
            case _Labelled():
                return f"mean over tokens (labels of the batch, without {IGNORED})"
            case _Elementwise() | _ByRows():
                return "mean over items (rows)"
            case _Alike():
                return "mean over microbatches, each counted alike"
            case way:
                assert_never(way)

    def guesses(self, number: int, microbatch: Any) -> bool:
        """Whether tokens are counted in labels, some of them ignored, for want of the loss's own count."""
        labels = labels_of(microbatch)
        unseen = isinstance(self._way(number, microbatch), _Labelled)
        return unseen and labels is not None and labels.dim() > 1 and bool((labels == IGNORED).any())

    def sums_more(self, number: int, microbatch: Any) -> bool:
        """Whether the loss was read as a sum and something else, which every microbatch adds again."""
        way = self._way(number, microbatch)
        return isinstance(way, _Summed) and way.more

    def _way(self, number: int, microbatch: Any) -> _Way:
        if number not in self._ways:
            self._ways[number] = self._found(number, microbatch)
        return self._ways[number]

    def _found(self, number: int, microbatch: Any) -> _Way:
        if callable(self._choice):
            return _Given(self._choice)
        if self._choice == "sum":
            return _Summed()
        if self._choice == "item-mean":
            return _ByRows()
        graph, model = self._recordings.entries[number].graph, self._recordings.model
        rows, given = rows_of(microbatch), place_of_given_count(microbatch)
        terms: tuple[Reduction, ...] = read_reduction(graph, model, rows=rows, given_count=given)
        counted = tuple(term for term in terms if isinstance(term, Targets | Quotient))
        if counted:
            wanted = [one.target if isinstance(one, Targets) else one.divisor for one in counted]
            return _Counted(counted, Glue(graph, model, Template.of_values(wanted), _CPU))
        has_labels = labels_of(microbatch) is not None
        if self._choice == "token-mean":
            if not has_labels:
                raise ConfigError(
                    "reduction='token-mean': the loss function calls no cross_entropy that averages, and "
                    "the batch has no whole numbers named 'labels' to count; give a function that returns "
                    "how many tokens of a microbatch the loss counts: reduction=lambda microbatch: …"
                )
            return _Labelled()
        numbers = tuple(term.count for term in terms if isinstance(term, Numbers))
        if numbers:
            return _Elementwise(numbers)
        uses = {graph.values[ref].source for node in graph.nodes for ref in node.inputs}
        if Total() in terms or (given is not None and BatchLeaf(given) in uses):
            return _Summed(more=Unread() in terms)
        if has_labels:
            return _Labelled()
        return _Alike() if rows is None else _ByRows()

    def _count(self, counted: Targets | Quotient, values: Mapping[int, torch.Tensor]) -> float:
        if isinstance(counted, Quotient):
            return float(values[counted.divisor])
        target = values[counted.target]
        target = target[target != counted.ignore_index]
        if counted.class_weights is None:
            return target.numel()
        return float(self._recordings.model.get_buffer(counted.class_weights).to(_CPU)[target].sum())


def rows_of(microbatch: Any) -> int | None:
    """The common length of dim 0 of a microbatch's tensors, if they have one."""
    try:
        return batch_size(microbatch)
    except ConfigError:
        return None


def labels_of(microbatch: Any) -> torch.Tensor | None:
    """The whole numbers that a microbatch calls its labels."""
    labels = microbatch.get("labels") if isinstance(microbatch, Mapping) else None
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.is_complex():
        return None
    return labels if labels.dim() > 0 else None


def _given(choice: Callable[[Any], Any], microbatch: Any) -> float:
    try:
        found = float(choice(microbatch))
    except Exception as error:
        raise ConfigError(f"reduction= failed for a microbatch: {type(error).__name__}: {error}") from error
    if not 0 <= found < math.inf:
        raise ConfigError(f"reduction= returned {found} for a microbatch; a weight is at least 0 and finite")
    return found
