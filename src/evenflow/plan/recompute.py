"""Recomputation: which nodes compute their forward again in the backward instead of keeping what it made.

Of such nodes those that stand in a row in one block make a *region* (`blocks`): it keeps what it is given,
and all that it saves is there again while its own backward runs. Gradients of weights are put off as
otherwise, and keep what they take until then.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016; Korthikanti et al., "Reducing
Activation Recomputation in Large Transformer Models", 2022 (selective: what is large and quick to make).
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from evenflow.plan.blocks import regions_of
from evenflow.plan.chain import Chain, Handed, Held, Seconds


def recomputed(chain: Chain, nodes: Collection[int]) -> Chain:
    """The chain where these nodes, as far as they may, keep what their regions are given and run once more.

    A region whose chain does not say what nodes hand to each other is given all that crosses the cut before
    it. The input gradient of a node then takes its forward's time besides; what a region saves counts among
    what its backward allocates, until it is used (`backward_transients`).

    >>> chain = Chain(
    ...     names=("a", "b"),
    ...     num_rows=1,
    ...     flops=(1.0, 1.0),
    ...     seconds={"cpu": Seconds((1.0, 2.0), (1.0, 2.0), (1.0, 2.0))},
    ...     saved=(Held(8.0, (0, 1), 0), Held(50.0, (1,))),
    ...     forward_transient_bytes=(0.0, 4.0),
    ...     backward_transient_bytes=(2.0, 0.0),
    ...     cut_bytes=(0.0, 8.0),
    ...     handed=(Handed(8.0, 0, (1,)),),
    ... )
    >>> again = recomputed(chain, [1])
    >>> [(each.num_bytes, each.nodes) for each in again.saved]
    [(8.0, (0, 1))]
    >>> again.seconds["cpu"].input_grad, backward_transients(again, 0, 2)
    ((1.0, 4.0), (2.0, 54.0))
    """
    chosen = frozenset(node for node in nodes if chain.recomputable[node])
    if not chosen:
        return chain
    holding = _Holding(chain)
    regions = regions_of(chain.names, chosen)
    seconds = {
        kind: Seconds(
            each.forward,
            tuple(
                back + each.forward[node] if node in chosen else back
                for node, back in enumerate(each.input_grad)
            ),
            each.weight_grad,
        )
        for kind, each in chain.seconds.items()
    }
    again = {
        node: size
        for region in regions
        for node, size in zip(region, holding.made_again(region), strict=True)
    }
    return replace(
        chain,
        seconds=seconds,
        saved=holding.saved(regions),
        again_bytes=tuple(again.get(node) for node in range(chain.num_nodes)),
    )


def again_nodes(chain: Chain) -> tuple[int, ...]:
    """The nodes of a chain that are recomputed, ascending."""
    return tuple(node for node, size in enumerate(chain.again_bytes) if size is not None)


def forward_transients(chain: Chain, start: int, end: int) -> tuple[float, ...]:
    """The most that each node of a stage allocates in its forward; what it does not save is among it."""
    pairs = zip(chain.forward_transient_bytes[start:end], chain.again_bytes[start:end], strict=True)
    return tuple(own + (again or 0.0) for own, again in pairs)


def backward_transients(chain: Chain, start: int, end: int) -> tuple[float, ...]:
    """The most that each node of a stage allocates in its backward; what its region saves again is among it.

    A region that the stage has a part of is what it has of it.
    """
    found = list(chain.backward_transient_bytes[start:end])
    chosen = [node for node in again_nodes(chain) if start <= node < end]
    for region in regions_of(chain.names, chosen):
        # At each node's backward what later ones saved is freed.
        there = list(accumulate(chain.again_bytes[node] or 0.0 for node in region))
        alone = [chain.forward_transient_bytes[node] for node in region]
        running = max(had + own for had, own in zip(there, alone, strict=True))
        for node, had in zip(region, there, strict=True):
            found[node - start] += had
        last, after = region[-1] - start, region[-1] + 1
        waiting = chain.cut_bytes[after] if after < chain.num_nodes else 0.0  # the gradient that has come
        found[last] = max(found[last], running + waiting)
    return tuple(found)


def transients(chain: Chain) -> tuple[float, ...]:
    """The most that each node allocates in its forward or its backward, wherever the chain is cut."""
    whole = (chain, 0, chain.num_nodes)
    return tuple(map(max, forward_transients(*whole), backward_transients(*whole)))


def parted_bytes(chain: Chain, start: int, end: int) -> float:
    """What a stage's first region is given by its own first part, which a cut leaves to the stage before."""
    if start == 0 or None in (chain.again_bytes[start - 1], chain.again_bytes[start]):
        return 0.0
    parts = regions_of(chain.names, again_nodes(chain))
    region = next(part for part in parts if start in part)
    inside = {node for node in region if start <= node < end}
    return sum(
        each.num_bytes
        for each in chain.handed
        if each.maker in region and each.maker < start and not inside.isdisjoint(each.users)
    )


def cheapest_to_hold(chain: Chain, nodes: Collection[int]) -> Chain:
    """The chain that holds what it does where all these nodes are recomputed, but takes no longer."""
    return replace(recomputed(chain, nodes), seconds=chain.seconds)


@dataclass(frozen=True, slots=True)
class Unit:
    """Nodes that are worth to be recomputed together, and what that frees: bytes for each microbatch."""

    nodes: tuple[int, ...]
    freed_bytes: float


def all_worthwhile(chain: Chain) -> tuple[int, ...]:
    """The nodes that "full" recomputation recomputes: all regions that hold less for it, else single nodes.

    >>> times = Seconds((1.0,) * 3, (1.0,) * 3, (1.0,) * 3)
    >>> chain = Chain(("a", "b", "c"), 1, (0.0,) * 3, {"cpu": times}, saved=(Held(9.0, (1,)),))
    >>> all_worthwhile(chain)
    (1,)
    """
    holding = _Holding(chain)
    found: set[int] = set()
    for region in regions_of(chain.names, [n for n, may in enumerate(chain.recomputable) if may]):
        if holding.freed_bytes(region) > 0:
            found.update(region)
        else:
            found.update(node for node in region if holding.freed_bytes((node,)) > 0)
    return tuple(sorted(found))


def by_worth(chain: Chain, kind: str) -> tuple[Unit, ...]:
    """Single nodes and whole regions that hold less when recomputed; first what frees most in a second."""
    holding, seconds = _Holding(chain), chain.seconds[kind].forward
    may = [node for node, may in enumerate(chain.recomputable) if may]
    every = dict.fromkeys((*((node,) for node in may), *regions_of(chain.names, may)))
    units = [Unit(nodes, holding.freed_bytes(nodes)) for nodes in every]

    def order(unit: Unit) -> tuple[float, tuple[int, ...]]:
        return -unit.freed_bytes / max(sum(seconds[node] for node in unit.nodes), 1e-12), unit.nodes

    return tuple(sorted((unit for unit in units if unit.freed_bytes > 0), key=order))


def curve(chain: Chain, kind: str) -> tuple[list[float], list[float]]:
    """Bytes that can be freed, and about the least seconds that this takes, both ascending from 0."""
    seconds = chain.seconds[kind].forward
    freed, took = [0.0], [0.0]
    done: dict[int, float] = {}  # what each node has freed so far
    for unit in by_worth(chain, kind):
        new = [node for node in unit.nodes if node not in done]
        more = unit.freed_bytes - sum(done.get(node, 0.0) for node in unit.nodes)
        if new and more > 0:
            freed.append(freed[-1] + more)
            took.append(took[-1] + sum(seconds[node] for node in new))
            done |= dict.fromkeys(new, more / len(new))
    return freed, took


class _Holding:
    """Who holds what of a chain between forward and backward, and what of it recomputation frees."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._own: defaultdict[int, float] = defaultdict(float)  # kept by one node, given to none
        self._others: list[Held] = []  # what several keep that no node is said to be given
        self._keepers: defaultdict[int, set[int]] = defaultdict(set)  # by place among `handed`
        for held in chain.saved:
            if held.handed is not None:
                self._keepers[held.handed].update(held.nodes)
            elif len(held.nodes) == 1:
                self._own[held.nodes[0]] += held.num_bytes
            else:
                self._others.append(held)
        self._near: defaultdict[int, list[int]] = defaultdict(list)  # node -> what it makes or is given
        for place, handed in enumerate(chain.handed):
            for node in {*handed.users, *(() if handed.maker is None else (handed.maker,))}:
                self._near[node].append(place)

    def saved(self, regions: Sequence[Sequence[int]]) -> tuple[Held, ...]:
        """`Chain.saved` where these regions are recomputed. One that saves nothing keeps nothing either."""
        saving = [region for region in regions if self._saves(region)]
        chosen = {node: number for number, region in enumerate(saving) for node in region}
        found = [Held(size, (node,)) for node, size in self._own.items() if node not in chosen]
        found += self._others
        for place, handed in enumerate(self._chain.handed):
            if holders := self._holders(place, handed, chosen):
                found.append(Held(handed.num_bytes, tuple(sorted(holders)), place))
        if not self._chain.handed:
            found += [Held(size, (r[0],)) for r in saving if (size := self._chain.cut_bytes[r[0]])]
        return tuple(found)

    def _saves(self, region: Iterable[int]) -> bool:
        return any(
            self._own[node] or any(node in self._keepers[place] for place in self._near[node])
            for node in region
        )

    def _holders(self, place: int, handed: Handed, chosen: dict[int, int]) -> set[int]:
        """The nodes for which memory is held: those that keep it, those of regions that are given it."""
        own = None if handed.maker is None else chosen.get(handed.maker)
        given = {node for node in handed.users if node in chosen and chosen[node] != own}
        return given | {node for node in self._keepers[place] if node not in chosen}

    def freed_bytes(self, region: Sequence[int]) -> float:
        """How much less is held for each microbatch where this region is recomputed, and nothing else."""
        chosen = dict.fromkeys(region, 0)
        freed = sum(self._own[node] for node in region)
        if not self._chain.handed:
            return freed - self._chain.cut_bytes[region[0]]
        for place in self._touched(region):
            handed = self._chain.handed[place]
            holders = self._holders(place, handed, chosen)
            freed += handed.num_bytes * (bool(self._keepers[place]) - bool(holders))
        return freed

    def made_again(self, region: Sequence[int]) -> list[float]:
        """What a region saves when it runs again, at the node whose backward needs it last."""
        found = {node: self._own[node] for node in region}
        for place in self._touched(region):
            inside = [node for node in self._keepers[place] if node in found]
            if inside and self._chain.handed[place].maker in found:
                found[min(inside)] += self._chain.handed[place].num_bytes
        return [found[node] for node in region]

    def _touched(self, region: Iterable[int]) -> set[int]:
        return {place for node in region for place in self._near[node]}
