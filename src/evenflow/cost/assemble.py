"""From what was measured of single nodes to the chain that planning sees.

A node was measured alone, so what lies between nodes is added here: memory that several hold counts once, a
value that nobody holds for the backward is still there while it is needed, and so is the gradient of a value
that crosses a node in the backward. Nodes of a checkpoint region keep what the region was given, and nothing
else, until the backward computes the region again.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch

from evenflow.cost.handing import Places, handed_over
from evenflow.cost.measured import Measured
from evenflow.graph.cut import crossing_bytes, legal_positions, lifetimes, num_bytes, skips
from evenflow.graph.graph import Graph
from evenflow.graph.recomputable import may_be_recomputed
from evenflow.graph.tree import BatchLeaf, BufferSource, ParameterSource, TensorInfo
from evenflow.plan.chain import Chain, Held, Parameter, Seconds

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
    nodes = graph.chain
    costs = [measured[node.index] for node in nodes]
    sizes = _storage_bytes(graph, measured)
    saved, kept = (_by_storage(graph, costs, of) for of in ("saved", "kept"))
    private = [
        0 if n.region is not None else m.private_saved_bytes for n, m in zip(nodes, costs, strict=True)
    ]
    private_kept = [
        0 if n.region is not None else m.private_kept_bytes for n, m in zip(nodes, costs, strict=True)
    ]
    forward_transient = _forward_transients(graph, costs, saved, sizes)
    handed, places = handed_over(graph, sizes)
    return Chain(
        names=tuple(node.name for node in nodes),
        num_rows=num_rows,
        flops=tuple(float(node.flops) for node in nodes),
        seconds={kind: _seconds(graph, measured)},
        saved=_held(saved, sizes, private, places),
        kept=_held(kept, sizes, private_kept, places),
        parameters=parameters_used(graph, model),
        forward_transient_bytes=forward_transient,
        backward_transient_bytes=_backward_transients(graph, costs),
        cut_bytes=tuple(map(float, crossing_bytes(graph)[: len(nodes)])),
        legal=tuple(legal_positions(graph)[: len(nodes)]),
        skips=values_past_nodes(graph),
        handed=handed,
        recomputable=may_be_recomputed(graph),
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


def _not_counted(graph: Graph) -> frozenset[_Storage]:
    """Memories of parameters and buffers, which are there anyway."""
    own = ParameterSource | BufferSource
    return frozenset(value.storage for value in graph.values if isinstance(value.source, own))


def _storage_bytes(graph: Graph, measured: Mapping[int, Measured]) -> dict[_Storage, int]:
    """How large each memory of the graph is: as its maker left it, else as its largest value."""
    sizes: dict[_Storage, int] = {}
    for node in graph.nodes:
        found = measured[node.index].result_bytes if node.index in measured else (0,) * len(node.makes)
        for value, size in zip(node.makes, found, strict=True):
            storage = graph.values[value].storage
            sizes[storage] = max(sizes.get(storage, 0), size)
    for each in graph.values:
        if isinstance(each.source, BatchLeaf) or not sizes.get(each.storage):
            sizes[each.storage] = max(sizes.get(each.storage, 0), num_bytes(each.info))
    return sizes


def _by_storage(graph: Graph, costs: Sequence[Measured], which: str) -> _Users:
    """Which nodes hold each memory of a value."""
    users: defaultdict[_Storage, set[int]] = defaultdict(set)
    regions: defaultdict[int, list[int]] = defaultdict(list)
    for place, (node, one) in enumerate(zip(graph.chain, costs, strict=True)):
        if node.region is not None:
            regions[node.region].append(place)
            continue
        inputs, results = (
            (one.inputs_saved, one.results_saved) if which == "saved" else (one.inputs_kept, one.results_kept)
        )
        for value in (*(node.inputs[at] for at in inputs), *(node.makes[at] for at in results)):
            users[graph.values[value].storage].add(place)
    for places in regions.values() if which == "saved" else ():
        inside = {value for place in places for value in graph.chain[place].makes}
        for place in places:
            for value in graph.chain[place].inputs:
                if value not in inside:
                    users[graph.values[value].storage].add(place)
    skipped = _not_counted(graph)
    return {storage: frozenset(places) for storage, places in users.items() if storage not in skipped}


def _held(
    users: _Users, sizes: Mapping[_Storage, int], private: Sequence[int], places: Places
) -> tuple[Held, ...]:
    shared = [
        Held(float(sizes[storage]), tuple(sorted(nodes)), places.get(storage))
        for storage, nodes in users.items()
    ]
    own = [Held(float(size), (place,)) for place, size in enumerate(private) if size]
    return tuple(sorted((one for one in (*shared, *own) if one.num_bytes), key=lambda one: one.nodes))


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
        stays = 0 if node.region is not None else one.private_saved_bytes
        mine = {graph.values[value].storage for value in node.makes}
        stays += sum(sizes[each] for each in mine if each in saved and lives.get(each, (-1, -1))[0] == place)
        found.append(float(max(0, one.forward_peak_bytes - stays) + passing[place]))
    return tuple(found)


def _storage_lives(graph: Graph) -> dict[_Storage, tuple[int, int]]:
    """The first maker and the last user of each memory that nodes of the chain make."""
    lives: dict[_Storage, tuple[int, int]] = {}
    skipped = _not_counted(graph)
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
        again[node.region] += one.private_saved_bytes + sum(one.result_bytes)
    again[None] = 0
    waiting = [0] * len(graph.chain)
    for value, (born, last) in lifetimes(graph).items():
        info = graph.values[value].info
        for place in range(born, min(last, len(graph.chain))) if info.requires_grad else ():
            waiting[place] += num_bytes(info)
    parts = zip(graph.chain, costs, waiting, strict=True)
    return tuple(float(one.backward_peak_bytes + again[node.region] + size) for node, one, size in parts)


def values_past_nodes(graph: Graph, size_of: Callable[[TensorInfo], int] = num_bytes) -> tuple[Held, ...]:
    """`Chain.skips` of a graph."""
    return tuple(Held(float(size), places) for size, places in skips(graph, size_of))


def as_it_travels(chain: Chain, graph: Graph, size_of: Callable[[TensorInfo], int]) -> Chain:
    """The graph's chain where values have so many bytes when they cross a cut."""
    return replace(
        chain,
        cut_bytes=tuple(map(float, crossing_bytes(graph, size_of)[: chain.num_nodes])),
        skips=values_past_nodes(graph, size_of),
    )


# -- parameters


def parameters_used(graph: Graph, model: torch.nn.Module) -> tuple[Parameter, ...]:
    """The parameters that the nodes of the chain use, under the first of their names."""
    users: defaultdict[str, set[int]] = defaultdict(set)
    for place, node in enumerate(graph.chain):
        for name in node.parameters:
            users[name].add(place)
    return tuple(_parameter(name, model.get_parameter(name), places) for name, places in users.items())


def _parameter(name: str, own: torch.nn.Parameter, places: Iterable[int]) -> Parameter:
    size = own.numel() * own.element_size()
    return Parameter(name, own.numel(), size, own.requires_grad, tuple(sorted(places)))
