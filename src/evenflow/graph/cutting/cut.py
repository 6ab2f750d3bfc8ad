"""Cutting a graph: which nodes run on which stage, and what travels between stages.

A cut is a position in the chain of nodes that belong to stages. A value goes straight from the stage that
makes it to each stage that uses it. Its gradient does not come straight back: it is *relayed* from the last
user through the earlier ones to the maker, each adding its own share to what arrives, so that the sum is
associated as autograd associates it in the unsplit program. (Summing separate contributions at the maker
differs in the last bits.)
"""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from evenflow.graph.nouns.graph import Graph, Node, changed_buffers
from evenflow.graph.nouns.tree import BatchLeaf, BufferSource
from evenflow.ir.flow import Flow


@dataclass(frozen=True, slots=True)
class Section:
    """What one stage does for one microbatch of one recording: data only.

    Each of the four traffic maps takes the other stage to the values that travel, in one fixed order.
    `relayed` are received values whose gradient also arrives from a later stage, `cloned` are received or
    batch values that the section changes in place, `live` values that leave while their memory is that of a
    buffer which the next microbatch will change, `kept_buffers` changed ones that the backward may look at.
    """

    stage: int
    nodes: tuple[Node, ...]
    batch: tuple[tuple[int, int], ...]  # (tensor leaf of the microbatch, value)
    cloned: frozenset[int]
    receives: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    sends: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    gradient_receives: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    gradient_sends: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    relayed: frozenset[int] = frozenset()
    live: frozenset[int] = frozenset()
    kept_buffers: frozenset[str] = frozenset()
    needs_output: bool = False  # the last stage hands back what the loss function returned


@dataclass(frozen=True, slots=True)
class Cut:
    """A graph cut into sections, and the traffic between stages that follows."""

    graph: Graph
    positions: tuple[int, ...]
    sections: tuple[Section, ...]
    flow: Flow


def cut(graph: Graph, positions: Sequence[int]) -> Cut:
    """Cut the chain at `positions` (ascending; equal positions leave a stage empty)."""
    edges = (0, *positions, len(graph.chain))
    num_stages = len(edges) - 1
    owned = [graph.chain[a:b] for a, b in itertools.pairwise(edges)]
    stage_of = {node.index: stage for stage, nodes in enumerate(owned) for node in nodes}
    ends = [() if stage < num_stages - 1 else graph.output.refs for stage in range(num_stages)]
    needs = [_slice(graph, nodes, extra) for nodes, extra in zip(owned, ends, strict=True)]
    users: defaultdict[int, list[int]] = defaultdict(list)  # value -> stages that receive it, ascending
    for stage, need in enumerate(needs):
        for value in sorted(need.values):
            maker = graph.maker.get(value)
            if maker is not None and stage_of[maker.index] != stage:
                users[value].append(stage)
    traffic = _Traffic(num_stages)
    for value, stages in users.items():
        traffic.add(value, stage_of[graph.maker[value].index], stages, graph.values[value].info.requires_grad)
    sections = tuple(
        Section(
            stage=stage,
            nodes=need.nodes,
            batch=_batch_leaves(graph, need),
            receives=dict(traffic.receives[stage]),
            sends=dict(traffic.sends[stage]),
            gradient_receives=dict(traffic.gradient_receives[stage]),
            gradient_sends=dict(traffic.gradient_sends[stage]),
            relayed=frozenset(traffic.relayed[stage]),
            cloned=_changed(graph, need),
            live=_live(
                graph, (*graph.output.refs, *(v for sent in traffic.sends[stage].values() for v in sent))
            ),
            kept_buffers=frozenset(name for node in need.nodes for name in node.kept_buffers),
            needs_output=stage == num_stages - 1,
        )
        for stage, need in enumerate(needs)
    )
    return Cut(graph, tuple(positions), sections, traffic.flow())


def glue_section(graph: Graph, values: Sequence[int]) -> Section:
    """A section by itself that computes these batch-derived values."""
    need = _slice(graph, (), values)
    return Section(0, need.nodes, _batch_leaves(graph, need), _changed(graph, need))


# -- what a stage needs


@dataclass(frozen=True, slots=True)
class _Need:
    nodes: tuple[Node, ...]  # the stage's own and the glue it computes again, in program order
    values: frozenset[int]  # values that must be there before it starts


def _batch_leaves(graph: Graph, need: _Need) -> tuple[tuple[int, int], ...]:
    sources = ((graph.values[value].source, value) for value in sorted(need.values))
    return tuple((source.index, value) for source, value in sources if isinstance(source, BatchLeaf))


def _slice(graph: Graph, own: Sequence[Node], extra: Sequence[int]) -> _Need:
    """What it takes to run the stage's own nodes and to have `extra` values at hand."""
    made = {value for node in own for value in node.makes}
    wanted = [value for node in own for value in node.inputs if value not in made]
    wanted += [value for value in extra if value not in made]
    glue: dict[int, Node] = {}
    outside: set[int] = set()
    seen: set[int] = set()
    while wanted:
        value = wanted.pop()
        if value in seen or value in made:
            continue
        seen.add(value)
        maker = graph.maker.get(value)
        if maker is not None and maker.glue:
            glue[maker.index] = maker
            wanted.extend(maker.inputs)
        elif not graph.values[value].is_state:
            outside.add(value)
    return _Need(tuple(sorted((*own, *glue.values()), key=lambda node: node.index)), frozenset(outside))


def _changed(graph: Graph, need: _Need) -> frozenset[int]:
    """Values from outside that the section changes in place: it must work on a copy."""
    storages = {graph.values[old].storage for node in need.nodes for old, _ in node.rebinds}
    return frozenset(value for value in need.values if graph.values[value].storage in storages)


def _live(graph: Graph, leaving: Sequence[int]) -> frozenset[int]:
    changed = changed_buffers(graph.nodes)
    sources = ((value.source, value.storage) for value in graph.values)
    storages = {
        storage for source, storage in sources if isinstance(source, BufferSource) and source.name in changed
    }
    return frozenset(value for value in leaving if graph.values[value].storage in storages)


class _Traffic:
    """Collects what each stage sends and receives."""

    def __init__(self, num_stages: int) -> None:
        def empty() -> list[defaultdict[int, tuple[int, ...]]]:
            return [defaultdict(tuple) for _ in range(num_stages)]

        self.receives, self.sends = empty(), empty()
        self.gradient_receives, self.gradient_sends = empty(), empty()
        self.relayed: list[set[int]] = [set() for _ in range(num_stages)]

    def add(self, value: int, maker: int, users: Sequence[int], requires_grad: bool) -> None:
        for user in users:
            self.sends[maker][user] += (value,)
            self.receives[user][maker] += (value,)
        if requires_grad:
            for earlier, later in itertools.pairwise((maker, *users)):
                self.gradient_sends[later][earlier] += (value,)
                self.gradient_receives[earlier][later] += (value,)
                if earlier != maker:
                    self.relayed[earlier].add(value)

    def flow(self) -> Flow:
        forward = {(stage, target) for stage, sends in enumerate(self.sends) for target in sends}
        backward = {(stage, target) for stage, sends in enumerate(self.gradient_sends) for target in sends}
        return Flow(activations=frozenset(forward), gradients=frozenset(backward))
