"""Flow: which stages hand values to which, forward and backward."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from evenflow.errors import ScheduleError


@dataclass(frozen=True, slots=True)
class Flow:
    """The edges between stages: `(source, target)` pairs for activations and for gradients.

    A plain stack of layers is a chain. A *skip connection* is one more activation edge, straight from the
    producer to each consumer, past the stages between them.

    Gradient edges are not simply the activation edges turned round. A value that is used on several stages
    has its gradient *relayed*: last consumer -> earlier consumers, last to first -> producer, each adding
    its own share on the way, because sums then associate as autograd's do in one process. A value that
    carries no gradient (a mask, say) has an activation edge and no gradient edge.

    Activations always go up (`source < target`) and gradients always down (`source > target`);
    anything else raises `ScheduleError`, listing the wrong edges.

    Stage 0's value, used on stages 1 and 3, has activation edges 0>1 and 0>3; its gradient goes 3>1>0:

    >>> flow = Flow(activations=frozenset({(0, 1), (0, 3)}), gradients=frozenset({(3, 1), (1, 0)}))
    >>> Flow(activations=frozenset({(1, 0)}), gradients=frozenset())
    Traceback (most recent call last):
      ...
    evenflow.errors.ScheduleError: activation edge 1>0 does not lead to a later stage
    """

    activations: frozenset[tuple[int, int]]
    gradients: frozenset[tuple[int, int]]
    # Derived: the edges by target, because whoever walks a schedule asks once per op.
    _activations_into: dict[int, tuple[int, ...]] = field(init=False, repr=False, compare=False)
    _gradients_into: dict[int, tuple[int, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        faults = [
            f"activation edge {source}>{target} does not lead to a later stage"
            for source, target in sorted(self.activations)
            if source >= target
        ]
        faults += [
            f"gradient edge {source}>{target} does not lead to an earlier stage"
            for source, target in sorted(self.gradients)
            if source <= target
        ]
        if faults:
            raise ScheduleError("; ".join(faults))
        object.__setattr__(self, "_activations_into", _sources_by_target(self.activations))
        object.__setattr__(self, "_gradients_into", _sources_by_target(self.gradients))

    def activations_into(self, stage: int) -> tuple[int, ...]:
        """Return the stages whose activations `stage` takes, ascending.

        >>> Flow.chain(3).activations_into(1)
        (0,)
        """
        return self._activations_into.get(stage, ())

    def gradients_into(self, stage: int) -> tuple[int, ...]:
        """Return the stages that send `stage` a gradient, ascending.

        >>> Flow.chain(3).gradients_into(1)
        (2,)
        """
        return self._gradients_into.get(stage, ())

    @staticmethod
    def union(flows: "Iterable[Flow]") -> "Flow":
        """Return all edges that any of these has.

        >>> skip = Flow(activations=frozenset({(0, 2)}), gradients=frozenset({(2, 0)}))
        >>> sorted(Flow.union([Flow.chain(3), skip]).activations)
        [(0, 1), (0, 2), (1, 2)]
        """
        found = set(flows)
        return Flow(
            activations=frozenset(edge for flow in found for edge in flow.activations),
            gradients=frozenset(edge for flow in found for edge in flow.gradients),
        )

    @staticmethod
    def chain(num_stages: int) -> "Flow":
        """Return the flow of a plain stack: each stage feeds the next, and is fed its gradient by it.

        >>> sorted(Flow.chain(3).activations), sorted(Flow.chain(3).gradients)
        ([(0, 1), (1, 2)], [(1, 0), (2, 1)])
        """
        return Flow(
            activations=frozenset((stage, stage + 1) for stage in range(num_stages - 1)),
            gradients=frozenset((stage + 1, stage) for stage in range(num_stages - 1)),
        )


def _sources_by_target(edges: frozenset[tuple[int, int]]) -> dict[int, tuple[int, ...]]:
    sources: dict[int, tuple[int, ...]] = {}
    for source, target in sorted(edges):
        sources[target] = (*sources.get(target, ()), source)
    return sources
