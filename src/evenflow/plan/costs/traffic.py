"""What the stages of a cut chain hand to each other, in bytes for one microbatch.

An activation goes from the stage that makes it straight to each stage that uses it. Its gradient comes back
from the last of them over the others, each of which adds its own (`ir.flow`).
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from evenflow.ir.flow import Flow
from evenflow.plan.chain import Chain

Edge = tuple[int, int]  # from stage, to stage


@dataclass(frozen=True, slots=True)
class Parcels:
    """What a stage exchanges with other ranks for one microbatch: the bytes of each parcel."""

    received: list[float]
    sent: list[float]
    gradients_received: list[float]
    gradients_sent: list[float]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes along each edge; neighbours always have one."""

    activations: Mapping[Edge, float]
    gradients: Mapping[Edge, float]

    @property
    def flow(self) -> Flow:
        """The edges alone."""
        return Flow(frozenset(self.activations), frozenset(self.gradients))

    def rank_pairs(self, rank_of: Sequence[int]) -> frozenset[tuple[int, int]]:
        """The ranks that something goes between, from one to the other."""
        edges = (*self.activations, *self.gradients)
        return frozenset((rank_of[source], rank_of[target]) for source, target in edges)

    def parcels(self, rank_of: Sequence[int]) -> tuple[Parcels, ...]:
        """What each stage exchanges with other ranks.

        >>> Traffic({(0, 1): 8.0, (1, 2): 4.0}, {}).parcels(rank_of=(0, 1, 1))[1]
        Parcels(received=[8.0], sent=[], gradients_received=[], gradients_sent=[])
        """
        by_stage = (*_leaving_ranks(self.activations, rank_of), *_leaving_ranks(self.gradients, rank_of))
        return tuple(Parcels(*own) for own in zip(*by_stage, strict=True))


def traffic_of(chain: Chain, positions: Sequence[int]) -> Traffic:
    """What crosses the cuts, by edge.

    `cut_bytes` are all that crosses a cut; of that, `chain.skips` go past stages, and travel by themselves.

    >>> from evenflow.plan.chain import Held, Seconds
    >>> zeros, skips = (0.0,) * 3, (Held(4.0, (0, 2)),)
    >>> seconds = {"cpu": Seconds(zeros, zeros, zeros)}
    >>> chain = Chain(("a", "b", "c"), 1, zeros, seconds, cut_bytes=(0.0, 10.0, 10.0), skips=skips)
    >>> traffic_of(chain, (1, 2)).activations
    {(0, 1): 6.0, (1, 2): 6.0, (0, 2): 4.0}
    """
    activations: defaultdict[Edge, float] = defaultdict(float)
    for stage, position in enumerate(positions):
        activations[stage, stage + 1] = chain.cut_bytes[position]
    gradients = defaultdict(float, {(b, a): size for (a, b), size in activations.items()})
    for value in chain.skips:
        maker, *users = sorted({bisect_right(positions, node) for node in value.nodes})
        if not users or users == [maker + 1]:
            continue  # it crosses one cut at most
        for stage in range(maker, users[-1]):  # `cut_bytes` count it at every cut
            activations[stage, stage + 1] -= value.num_bytes
            gradients[stage + 1, stage] -= value.num_bytes
        for user in users:
            activations[maker, user] += value.num_bytes
        for earlier, later in pairwise((maker, *users)):
            gradients[later, earlier] += value.num_bytes
    return Traffic(
        *({edge: max(0.0, size) for edge, size in each.items()} for each in (activations, gradients))
    )


def _leaving_ranks(
    edges: Mapping[Edge, float], rank_of: Sequence[int]
) -> tuple[list[list[float]], list[list[float]]]:
    """What each stage receives from stages of other ranks, and what it sends to them."""
    received: list[list[float]] = [[] for _ in rank_of]
    sent: list[list[float]] = [[] for _ in rank_of]
    for (source, target), size in edges.items():
        if size and rank_of[source] != rank_of[target]:
            sent[source].append(size)
            received[target].append(size)
    return received, sent
