"""Which nodes may compute their forward again in the backward, and the regions in which a stage does so.

Running again must change nothing and must find what the first run found. So a node stays out that changes
state, or reads state that the program changes: a pipeline runs other microbatches' forwards in between. A
change in place of a tensor that other nodes see too would be made twice, or be missed.
"""

import itertools
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, replace

from evenflow.graph.cutting.cut import Section
from evenflow.graph.nouns.graph import Graph, Node, changed_buffers
from evenflow.graph.nouns.regions import memory_of
from evenflow.graph.nouns.template import Shared
from evenflow.plan.blocks import block_of


class Recomputable:
    """Asks of each node of a graph why it may not be computed again.

    >>> from evenflow.graph.kernels.fakes import FakeParameters
    >>> from evenflow.graph.leaves.leaves import flatten
    >>> from evenflow.graph.recording.record import record
    >>> import torch
    >>> model, cpu = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)), torch.device("cpu")
    >>> fakes = FakeParameters(model, cpu)
    >>> tree = record(lambda m, x: m(x).sum(), model, torch.ones(2, 4), device=cpu, fakes=fakes)
    >>> graph = flatten(tree, max_share=0.0)
    >>> [Recomputable(graph).refusal(node) for node in graph.chain]
    [None, 'it changes the buffer 1.num_batches_tracked', None]
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._changed = changed_buffers(graph.nodes)
        self._of_changed = {graph.storage_of_buffer[n] for n in self._changed if n in graph.storage_of_buffer}
        users: defaultdict[int, set[int]] = defaultdict(set)  # memory -> indexes of nodes
        for node in graph.nodes:
            for storage in memory_of(node, graph.values):
                users[storage].add(node.index)
        rebound = {graph.values[old].storage for node in graph.nodes for old, _ in node.rebinds}
        self._apart = {storage for storage in rebound if len(users[storage]) > 1}

    def refusal(self, node: Node) -> str | None:  # noqa: PLR0911 (one line for each reason)
        """Why a node of the chain may not be computed again; None where it may."""
        if node.region is not None:
            return "the model computes it again itself (torch.utils.checkpoint)"
        if node.changed_buffers:
            return f"it changes the buffer {node.changed_buffers[0]}"
        if read := self._changed.intersection(node.buffers):
            return f"it reads the buffer {min(read)}, which the program changes"
        memory = memory_of(node, self._graph.values)
        if memory & self._of_changed:
            return "it uses a buffer that the program changes"
        if node.stateful:
            return "it changes attributes of its modules"
        if node.hooks:
            return "it puts hooks on its backward"
        if node.unknown_to_autograd:
            return "it changes a tensor behind autograd's back (.data)"
        if memory & self._apart:
            return "it uses a tensor that is changed in place, and so do other nodes"
        shared = (leaf for leaf in node.args.leaves if isinstance(leaf, Shared))
        if any(each.number in self._graph.changing_objects for each in shared):
            return "it is handed an object whose Python state the program changes"
        if any(step.walks for step in node.steps):  # that frees what is to be made again
            return "autograd walks inside it"
        return None


@dataclass(frozen=True, slots=True)
class Again:
    """What of a graph's chain is recomputed: the indexes of its nodes, all of which may be."""

    nodes: frozenset[int]

    def section(self, section: Section, graph: Graph) -> Section:
        """The section with the regions that its stage computes again, as numbers on its nodes.

        Nodes in a row in one block are one region, unless autocast comes or goes between them. What depends
        on the batch alone, and is needed in the middle of one, is computed before it.
        """
        if self.nodes.isdisjoint(node.index for node in section.nodes):
            return section
        given = (node.region for node in graph.nodes if node.region is not None)
        number = itertools.count(1 + max(given, default=-1))
        nodes: list[Node] = []
        waiting: list[Node] = []  # glue since the last node of the region that may go on
        last: Node | None = None
        for node in section.nodes:
            if node.glue and last is not None and not node.rebinds:
                waiting.append(node)
                continue
            if node.index not in self.nodes:
                nodes += [*waiting, node]
                waiting, last = [], None
                continue
            if last is not None and _go_together(last, node):
                region = nodes[-1].region
                first = next(at for at, each in enumerate(nodes) if each.region == region)
                nodes[first:first] = waiting
            else:
                nodes += waiting
                region = next(number)
            waiting, last = [], node
            nodes.append(replace(node, region=region))
        return replace(section, nodes=(*nodes, *waiting))


def _go_together(before: Node, node: Node) -> bool:
    block = block_of(node.name)
    same = block is not None and block == block_of(before.name)
    return same and bool(node.autocast) == bool(before.autocast)


def without_refused(graph: Graph, nodes: Collection[int]) -> tuple[Again, list[tuple[Node, str]]]:
    """What of these nodes, by index, may be recomputed; and the others, each with the reason."""
    asks = Recomputable(graph)
    refused = [
        (node, why) for node in graph.chain if node.index in nodes and (why := asks.refusal(node)) is not None
    ]
    return Again(frozenset(nodes) - {node.index for node, _ in refused}), refused


def may_be_recomputed(graph: Graph) -> tuple[bool, ...]:
    """For each node of the chain whether it may be computed again."""
    asks = Recomputable(graph)
    return tuple(asks.refusal(node) is None for node in graph.chain)
