"""What nodes hand to each other, by the memory that it lies in: a region that is recomputed keeps it."""

from collections import defaultdict
from collections.abc import Mapping

from evenflow.graph.graph import Graph
from evenflow.graph.tree import BatchLeaf, BufferSource, ParameterSource
from evenflow.plan.chain import Handed

Places = Mapping[int, int]  # of memories, by their numbers in the graph, among what is handed


def handed_over(graph: Graph, sizes: Mapping[int, float]) -> tuple[tuple[Handed, ...], Places]:
    """All that nodes of the chain hand to each other, and that they are given of the batch; and its places.

    `sizes` are bytes by the number of a memory. Parameters and buffers are there anyway.
    """
    skipped = {v.storage for v in graph.values if isinstance(v.source, ParameterSource | BufferSource)}
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
