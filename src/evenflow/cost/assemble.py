"""From what was measured of single nodes to the chain that planning sees.

A node was measured alone, so what lies between nodes is added here: memory that several hold counts once, a
value that nobody holds for the backward is still there while it is needed, and so is the gradient of a value
that crosses a node in the backward. Nodes of a checkpoint region keep what the region was given, and nothing
else, until the backward computes the region again.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch

from evenflow.cost.measured import NOTHING_KEPT, Kept, Measured
from evenflow.cost.outline import chain_with, given_to_regions, handed_over, held, memory_of_state
from evenflow.graph.cutting.positions import lifetimes, num_bytes
from evenflow.graph.nouns.graph import Graph
from evenflow.graph.nouns.tree import BatchLeaf
from evenflow.plan.chain import Chain, Seconds

_Storage: TypeAlias = int  # the number of a memory in the graph
_Users: TypeAlias = Mapping[_Storage, frozenset[int]]  # who holds it until the backward: places in the chain


def chain_of(
    graph: Graph,
    model: torch.nn.Module,
    measured: Mapping[int, Measured],
    *,
    num_rows: int,
    kind: str,
) -> Chain:
    """The chain of a graph. `measured` is by the index of a node; `kind` names the device."""
    costs = [measured[node.index] for node in graph.chain]
    sizes = _storage_bytes(graph, measured)
    saved = _outside_regions(graph, (one.saved for one in costs))
    kept = _outside_regions(graph, (one.kept for one in costs))
    savers = _holders(graph, saved, given_to_regions(graph))
    handed, places = handed_over(graph, sizes)
    return chain_with(
        graph,
        model,
        num_rows=num_rows,
        seconds={kind: _seconds(graph, measured)},
        saved=held(savers, [one.private_bytes for one in saved], sizes, places),
        kept=held(_holders(graph, kept), [one.private_bytes for one in kept], sizes, places),
        handed=handed,
        forward_transient_bytes=_forward_transients(graph, costs, savers, sizes),
        backward_transient_bytes=_backward_transients(graph, costs),
    )


def _seconds(graph: Graph, measured: Mapping[int, Measured]) -> Seconds:
    """Times of each node; what depends on the batch alone is computed with the first node that needs it."""
    forward = [measured[node.index].forward_seconds for node in graph.chain]
    for value, place in _first_users(graph).items():
        maker = graph.maker[value]
        forward[place] += measured[maker.index].forward_seconds / len(maker.makes)
    input_grad, weight_grad = [], []
    for place, node in enumerate(graph.chain):
        one = measured[node.index]
        again = forward[place] if node.region is not None else 0.0
        whole = one.backward_seconds + again
        first = whole if node.region is not None else one.input_grad_seconds
        input_grad.append(first)
        weight_grad.append(whole - first)
    return Seconds(tuple(forward), tuple(input_grad), tuple(weight_grad))


def _first_users(graph: Graph) -> dict[int, int]:
    """For each value that glue makes: the first node of the chain that needs it, or what is made of it."""
    found: dict[int, int] = {}
    for place, node in enumerate(graph.chain):
        waiting = list(node.inputs)
        while waiting:
            value = waiting.pop()
            maker = graph.maker.get(value)
            if maker is None or not maker.glue or value in found:
                continue
            found |= dict.fromkeys((each for each in maker.makes if each not in found), place)
            waiting.extend(maker.inputs)
    return found


# -- what is held


def _storage_bytes(graph: Graph, measured: Mapping[int, Measured]) -> dict[_Storage, int]:
    """How large each memory of the graph is: as its maker left it, else as its largest value."""
    sizes: dict[_Storage, int] = {}
    for node in graph.nodes:
        for value, size in zip(node.makes, measured[node.index].result_bytes, strict=True):
            storage = graph.values[value].storage
            sizes[storage] = max(sizes.get(storage, 0), size)
    for each in graph.values:
        if isinstance(each.source, BatchLeaf) or not sizes.get(each.storage):
            sizes[each.storage] = max(sizes.get(each.storage, 0), num_bytes(each.info))
    return sizes


def _outside_regions(graph: Graph, of_nodes: Iterable[Kept]) -> list[Kept]:
    """What nodes hold themselves: those of a checkpoint region hold nothing."""
    pairs = zip(graph.chain, of_nodes, strict=True)
    return [NOTHING_KEPT if node.region is not None else own for node, own in pairs]


def _holders(graph: Graph, of_nodes: Sequence[Kept], more: Iterable[tuple[int, int]] = ()) -> _Users:
    """Which nodes, by place, hold each memory of a value; `more` are places and values that they hold too."""
    users: defaultdict[_Storage, set[int]] = defaultdict(set)
    for place, (node, own) in enumerate(zip(graph.chain, of_nodes, strict=True)):
        for value in (*(node.inputs[at] for at in own.inputs), *(node.makes[at] for at in own.results)):
            users[graph.values[value].storage].add(place)
    for place, value in more:
        users[graph.values[value].storage].add(place)
    skipped = memory_of_state(graph)
    return {storage: frozenset(places) for storage, places in users.items() if storage not in skipped}


# -- what is there for a while


def _forward_transients(
    graph: Graph, costs: Sequence[Measured], saved: _Users, sizes: Mapping[_Storage, int]
) -> tuple[float, ...]:
    """What each node's forward has allocated at most, and what others will need and nobody holds."""
    lives = _storage_lives(graph)
    passing = [0] * len(graph.chain)
    for storage, (born, last) in lives.items():
        if storage not in saved:
            for place in range(born + 1, min(last + 1, len(graph.chain))):
                passing[place] += sizes[storage]
    found = []
    for place, (node, one) in enumerate(zip(graph.chain, costs, strict=True)):
        stays = 0 if node.region is not None else one.saved.private_bytes
        mine = {graph.values[value].storage for value in node.makes}
        stays += sum(sizes[each] for each in mine if each in saved and lives.get(each, (-1, -1))[0] == place)
        found.append(float(max(0, one.forward_peak_bytes - stays) + passing[place]))
    return tuple(found)


def _storage_lives(graph: Graph) -> dict[_Storage, tuple[int, int]]:
    """The first maker and the last user of each memory that nodes of the chain make."""
    lives: dict[_Storage, tuple[int, int]] = {}
    skipped = memory_of_state(graph)
    for value, (born, last) in lifetimes(graph).items():
        storage = graph.values[value].storage
        if storage not in skipped:
            before = lives.get(storage, (born, last))
            lives[storage] = min(before[0], born), max(before[1], last)
    return lives


def _backward_transients(graph: Graph, costs: Sequence[Measured]) -> tuple[float, ...]:
    """What each node's backward has allocated at most, and the gradients of what crosses it.

    In a checkpoint region that includes what the region's forward, computed again, keeps meanwhile.
    """
    again: defaultdict[int | None, int] = defaultdict(int)
    for node, one in zip(graph.chain, costs, strict=True):
        again[node.region] += one.saved.private_bytes + sum(one.result_bytes)
    again[None] = 0
    waiting = [0] * len(graph.chain)
    for value, (born, last) in lifetimes(graph).items():
        info = graph.values[value].info
        for place in range(born, min(last, len(graph.chain))) if info.requires_grad else ():
            waiting[place] += num_bytes(info)
    parts = zip(graph.chain, costs, waiting, strict=True)
    return tuple(float(one.backward_peak_bytes + again[node.region] + size) for node, one, size in parts)
