"""The question that partitioning answers, and its answer: which nodes of a chain make up each stage.

A stage is a run of nodes. What a rank does is the sum of its stages: their nodes' seconds on its kind of
device, and the price of the cuts on both their sides. Of all partitions that fit into memory the best has the
least loaded worst rank; among those the least loaded second-worst; among those the fewest bytes in its cuts.
A cut between two stages of one rank costs nothing, as nothing is sent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from evenflow.errors import ConfigError
from evenflow.ir.placement import Placement
from evenflow.plan.chain import Held


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of device: its name, the seconds that each node takes on it, and the bytes that fit into it.

    Raises `ConfigError` for seconds that are negative or not finite, and for a cap that is not above 0.
    """

    name: str
    seconds: tuple[float, ...]
    cap_bytes: float = math.inf

    def __post_init__(self) -> None:
        _check_numbers(f"seconds on {self.name}", self.seconds)
        if not self.cap_bytes > 0:
            raise ConfigError(f"{self.name} has room for {self.cap_bytes:g} bytes; it must be above 0")


@dataclass(frozen=True, slots=True)
class PartitionProblem:
    """A chain of nodes to be cut into the stages of `placement`, for one microbatch.

    - `kinds`: what stands at each rank. With `any_order` they may change places, so that the partition also
      says which device comes first and which last.
    - `legal[c]`, `cut_bytes[c]`, `cut_seconds[c]`: whether a cut may stand before node c, what crosses it,
      and what that takes on each of its two sides. Entries 0 are not used; without `cut_seconds` cuts cost
      none.
    - Memory: stage s needs static + `in_flight[s]` * held + transient bytes. `static` and `held` are counted
      once in each stage that has any of their nodes; `transient_bytes` of each node, of which the largest
      counts. A rank needs the sum of its stages, with the largest of their transients.

    Raises `ConfigError` for tuples of a wrong length, numbers that are negative or not finite, and fewer
    places to cut than cuts.

    >>> kind = Kind("A100", (1.0, 1.0, 1.0, 3.0))
    >>> problem = PartitionProblem(Placement.linear(2), (kind, kind), (True,) * 4, (0.0, 1.0, 1.0, 1.0))
    >>> problem.num_nodes, problem.in_flight
    (4, (1.0, 1.0))
    """

    placement: Placement
    kinds: tuple[Kind, ...]
    legal: tuple[bool, ...]
    cut_bytes: tuple[float, ...]
    cut_seconds: tuple[float, ...] = ()
    static: tuple[Held, ...] = ()
    held: tuple[Held, ...] = ()
    transient_bytes: tuple[float, ...] = ()
    in_flight: tuple[float, ...] = ()
    any_order: bool = False

    def __post_init__(self) -> None:
        if not self.cut_seconds:
            object.__setattr__(self, "cut_seconds", (0.0,) * self.num_nodes)
        if not self.transient_bytes:
            object.__setattr__(self, "transient_bytes", (0.0,) * self.num_nodes)
        if not self.in_flight:
            object.__setattr__(self, "in_flight", (1.0,) * self.placement.num_stages)
        self._check_lengths()
        for name in ("cut_bytes", "cut_seconds", "transient_bytes", "in_flight"):
            _check_numbers(name, getattr(self, name))
        for name in ("static", "held"):
            _check_numbers(name, [group.num_bytes for group in getattr(self, name)])
            _check_nodes(name, getattr(self, name), self.num_nodes)
        check_places(self.legal, self.placement.num_stages)

    def _check_lengths(self) -> None:
        if len(self.kinds) != self.placement.num_ranks:
            raise ConfigError(
                f"kinds of {len(self.kinds)} devices for {self.placement.num_ranks} ranks: give each rank one"
            )
        if len(self.in_flight) != self.placement.num_stages:
            raise ConfigError(
                f"in_flight of {len(self.in_flight)} stages where there are {self.placement.num_stages}: "
                "give each stage one"
            )
        per_node = {
            "cut_bytes": self.cut_bytes,
            "cut_seconds": self.cut_seconds,
            "transient_bytes": self.transient_bytes,
            **{f"seconds on {kind.name}": kind.seconds for kind in self.kinds},
        }
        for name, given in per_node.items():
            if len(given) != self.num_nodes:
                raise ConfigError(f"{name}: {len(given)} entries for {self.num_nodes} nodes; give each one")

    @property
    def num_nodes(self) -> int:
        """How many nodes the chain has."""
        return len(self.legal)

    @property
    def places(self) -> tuple[int, ...]:
        """Where a cut may stand, ascending."""
        return tuple(c for c in range(1, self.num_nodes) if self.legal[c])


@dataclass(frozen=True, slots=True)
class Partition:
    """Where to cut, and what each rank then does and needs.

    - `positions`: a cut at c stands before node c.
    - `devices[rank]`: which of the problem's `kinds`, by index, stands there.
    - `load_seconds`, `needed_bytes`: of each rank, for one microbatch.
    - `sent_bytes`: of all cuts between ranks.
    - `bound_seconds`: no partition's most loaded rank does less. It is this one's load where it is exact.
    """

    positions: tuple[int, ...]
    devices: tuple[int, ...]
    load_seconds: tuple[float, ...]
    needed_bytes: tuple[float, ...]
    sent_bytes: float
    bound_seconds: float

    @property
    def gap(self) -> float:
        """How far the most loaded rank is above the bound, as a share of it: 0 where it is proven best.

        >>> Partition((1,), (0, 1), (2.0, 3.0), (0.0, 0.0), 5.0, bound_seconds=2.5).gap
        0.19999999999999996
        """
        most = max(self.load_seconds)
        return most / self.bound_seconds - 1 if self.bound_seconds else 0.0


class DoesNotFitError(ConfigError):
    """No partition fits into memory. Of the one that comes nearest, this is the rank that lacks most.

    "Nearest" is where the largest ratio of need to cap is smallest. If `is_proven`, every partition has a
    rank with at least that ratio; otherwise a heuristic found nothing better.
    """

    def __init__(
        self, rank: int, kind: str, *, needed_bytes: float, cap_bytes: float, is_proven: bool
    ) -> None:
        share = needed_bytes / cap_bytes
        proof = "every partition has a rank that lacks as much" if is_proven else "the best that was found"
        super().__init__(
            f"no partition fits: rank {rank} ({kind}) needs {needed_bytes:,.0f} bytes and has "
            f"{cap_bytes:,.0f}, {share:.4g} times as much as there is ({proof}); use more ranks, fewer "
            "microbatches in flight, smaller microbatches, recomputation or devices with more memory"
        )
        self.rank = rank
        self.kind = kind
        self.needed_bytes = needed_bytes
        self.cap_bytes = cap_bytes
        self.is_proven = is_proven


def check_places(legal: Sequence[bool], num_stages: int) -> None:
    """Raise `ConfigError` where a chain has fewer places to cut than so many stages need cuts.

    `legal[c]`: whether a cut may stand before node c; entry 0 is not used.
    """
    num_places = sum(legal[1:])
    if num_places < num_stages - 1:
        raise ConfigError(
            f"{num_stages} stages need {num_stages - 1} cuts, but the recorded program has {len(legal)} "
            f"nodes and {num_places} places to cut; ask for at most {num_places + 1} stages"
        )


def _check_numbers(name: str, given: Sequence[float]) -> None:
    if wrong := [number for number in given if not (math.isfinite(number) and number >= 0)]:
        raise ConfigError(f"{name} must be finite and at least 0, got {wrong[:5]}")


def _check_nodes(name: str, groups: Sequence[Held], num_nodes: int) -> None:
    for group in groups:
        if not group.nodes or not 0 <= min(group.nodes) <= max(group.nodes) < num_nodes:
            raise ConfigError(
                f"{name} names nodes {group.nodes}: give at least one, from 0 to {num_nodes - 1}"
            )
