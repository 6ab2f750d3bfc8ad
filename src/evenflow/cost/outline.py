"""The outline of a chain: what follows from the recorded graph alone, whoever says what its nodes cost."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from evenflow.graph.cutting.positions import crossing_bytes, legal_positions, num_bytes, skips
from evenflow.graph.cutting.recomputable import may_be_recomputed
from evenflow.graph.nouns.graph import Graph
from evenflow.graph.nouns.tree import BatchLeaf, TensorInfo
from evenflow.plan.chain import Chain, Handed, Held, Parameter, Seconds

Places = Mapping[int, int]  # of memories, by their numbers in the graph, among what is handed


def chain_with(
    graph: Graph,
    model: torch.nn.Module,
    *,
    num_rows: int,
    seconds: Mapping[str, Seconds],
    saved: tuple[Held, ...],
    kept: tuple[Held, ...],
    handed: tuple[Handed, ...],
    forward_transient_bytes: tuple[float, ...],
    backward_transient_bytes: tuple[float, ...],
) -> Chain:
    """The chain of a graph whose nodes cost that, as the fields of `Chain` say it."""
    return Chain(
        names=tuple(node.name for node in graph.chain),
        num_rows=num_rows,
        flops=tuple(float(node.flops) for node in graph.chain),
        seconds=seconds,
        saved=saved,
        kept=kept,
        parameters=_parameters_used(graph, model),
        forward_transient_bytes=forward_transient_bytes,
        backward_transient_bytes=backward_transient_bytes,
        cut_bytes=_cut_bytes(graph, num_bytes),
        legal=tuple(legal_positions(graph)[: len(graph.chain)]),
        skips=_skips(graph, num_bytes),
        handed=handed,
        recomputable=may_be_recomputed(graph),
    )


def as_it_travels(chain: Chain, graph: Graph, size_of: Callable[[TensorInfo], int]) -> Chain:
    """The graph's chain where values have so many bytes when they cross a cut."""
    return replace(chain, cut_bytes=_cut_bytes(graph, size_of), skips=_skips(graph, size_of))


def _cut_bytes(graph: Graph, size_of: Callable[[TensorInfo], int]) -> tuple[float, ...]:
    return tuple(map(float, crossing_bytes(graph, size_of)[: len(graph.chain)]))


def _skips(graph: Graph, size_of: Callable[[TensorInfo], int]) -> tuple[Held, ...]:
    return tuple(Held(float(size), places) for size, places in skips(graph, size_of))


def memory_of_state(graph: Graph) -> frozenset[int]:
    """Memories of parameters and buffers, which are there anyway."""
    return frozenset(value.storage for value in graph.values if value.is_state)


def given_to_regions(graph: Graph) -> Iterator[tuple[int, int]]:
    """What a checkpoint region keeps: what it was given; as pairs of a place in the chain and a value."""
    regions: defaultdict[int | None, list[int]] = defaultdict(list)
    for place, node in enumerate(graph.chain):
        regions[node.region].append(place)
    regions.pop(None, None)
    for places in regions.values():
        inside = {value for place in places for value in graph.chain[place].makes}
        for place in places:
            yield from ((place, value) for value in graph.chain[place].inputs if value not in inside)


def held(
    holders: Mapping[int, Iterable[int]],
    private_bytes: Sequence[float],
    sizes: Mapping[int, float],
    places: Places,
) -> tuple[Held, ...]:
    """What is held of memories, each under the places of all nodes that do, and privately by each node."""
    shared = [
        Held(float(sizes[storage]), tuple(sorted(nodes)), places.get(storage))
        for storage, nodes in holders.items()
    ]
    own = [Held(float(size), (place,)) for place, size in enumerate(private_bytes)]
    return tuple(sorted((one for one in (*shared, *own) if one.num_bytes), key=lambda one: one.nodes))


def handed_over(graph: Graph, sizes: Mapping[int, float]) -> tuple[tuple[Handed, ...], Places]:
    """All that nodes of the chain hand to each other, and that they are given of the batch; and its places.

    `sizes` are bytes by the number of a memory. Parameters and buffers are there anyway.
    """
    skipped = memory_of_state(graph)
    batch = {v.storage for v in graph.values if isinstance(v.source, BatchLeaf)}
    made_by_glue = {graph.values[v].storage for node in graph.nodes if node.glue for v in node.makes}
    makers: dict[int, int] = {}
    users: defaultdict[int, set[int]] = defaultdict(set)
    for place, node in enumerate(graph.chain):
        for value in node.inputs:
            users[graph.values[value].storage].add(place)
        for value in node.makes:
            storage = graph.values[value].storage
            if storage not in batch and storage not in made_by_glue:
                makers.setdefault(storage, place)
    found: list[Handed] = []
    places: dict[int, int] = {}
    for storage in dict.fromkeys((*makers, *users)):
        if storage in skipped:
            continue
        maker = makers.get(storage)
        others = tuple(sorted(users[storage] - {maker}))
        places[storage] = len(found)
        found.append(Handed(float(sizes.get(storage, 0.0)), maker, others))
    return tuple(found), places


def _parameters_used(graph: Graph, model: torch.nn.Module) -> tuple[Parameter, ...]:
    """The parameters that the nodes of the chain use, under the first of their names."""
    users: defaultdict[str, set[int]] = defaultdict(set)
    for place, node in enumerate(graph.chain):
        for name in node.parameters:
            users[name].add(place)
    return tuple(_parameter(name, model.get_parameter(name), places) for name, places in users.items())


def _parameter(name: str, own: torch.nn.Parameter, places: Iterable[int]) -> Parameter:
    size = own.numel() * own.element_size()
    return Parameter(name, own.numel(), size, own.requires_grad, tuple(sorted(places)))
