"""Cutting a graph: which nodes run on which stage, and what travels between stages.

A cut is a position in the chain of nodes that belong to stages. A value goes straight from the stage that
makes it to each stage that uses it. Its gradient does not come straight back: it is *relayed* from the last
user through the earlier ones to the maker, each adding its own share to what arrives, so that the sum is
associated as autograd associates it in the unsplit program. (Summing separate contributions at the maker
differs in the last bits.)
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from evenflow.errors import RecordError
from evenflow.graph.graph import Graph, Node
from evenflow.graph.regions import first_in_region, memory_of
from evenflow.graph.template import Shared
from evenflow.graph.tree import BatchLeaf, BufferSource, ParameterSource, TensorInfo
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
    receives: Mapping[int, tuple[int, ...]]
    sends: Mapping[int, tuple[int, ...]]
    gradient_receives: Mapping[int, tuple[int, ...]]
    gradient_sends: Mapping[int, tuple[int, ...]]
    relayed: frozenset[int]
    cloned: frozenset[int]
    live: frozenset[int]
    kept_buffers: frozenset[str]
    needs_output: bool  # the last stage hands back what the loss function returned


@dataclass(frozen=True, slots=True)
class Cut:
    """A graph cut into sections, and the traffic between stages that follows."""

    graph: Graph
    positions: tuple[int, ...]
    sections: tuple[Section, ...]
    flow: Flow


def num_bytes(info: TensorInfo) -> int:
    """Bytes of a tensor's elements."""
    return math.prod(info.shape) * int(info.dtype.itemsize)


def crossing_bytes(graph: Graph, size_of: Callable[[TensorInfo], int] = num_bytes) -> list[int]:
    """Bytes of activations alive across each position of the chain (entry `c`: a cut before node `c`).

    `size_of` says how many bytes a value has when it travels.
    """
    steps = [0] * (len(graph.chain) + 2)
    for value, (born, last) in lifetimes(graph).items():
        size = size_of(graph.values[value].info)
        steps[born + 1] += size
        steps[last + 1] -= size
    return list(itertools.accumulate(steps))[: len(graph.chain) + 1]


def legal_positions(graph: Graph) -> list[bool]:
    """Where a cut changes nothing.

    It must not separate a change in place from an alias that still matters, nor from an earlier user whose
    backward sees the change, nor the users of a buffer that is changed; and one tensor must not cross it
    under two numbers, whose gradients would be summed apart.
    """
    legal = [True] * (len(graph.chain) + 1)
    lives = lifetimes(graph)
    by_storage: defaultdict[int, list[int]] = defaultdict(list)
    for value in lives:
        by_storage[graph.values[value].storage].append(value)
    for at, node in enumerate(graph.chain):
        for storage in {graph.values[old].storage for old, _ in node.rebinds}:
            for position in range(1, at + 1):
                across = [v for v in by_storage[storage] if lives[v][0] < position <= lives[v][1]]
                legal[position] = legal[position] and len(across) < 2
            for position in range(_tied_to(graph, at, storage) + 1, at + 1):
                legal[position] = False
    for later in graph.same_tensor:
        earlier = later
        while earlier in graph.same_tensor:
            earlier = graph.same_tensor[earlier]
            if later in lives and earlier in lives:
                for position in range(lives[later][0] + 1, min(lives[later][1], lives[earlier][1]) + 1):
                    legal[position] = False
    changed = {name for node in graph.nodes for name in node.changed_buffers}
    for name in changed:
        users = [at for at, node in enumerate(graph.chain) if _uses_buffer(graph, node, name)]
        if any(_is_buffer(graph, value, name) for value in graph.output.refs):
            users.append(len(graph.chain) - 1)  # the last stage returns it as it is after this microbatch
        for position in range(users[0] + 1, users[-1] + 1):
            legal[position] = False
    for number in graph.changing_objects:  # each stage has a copy of its own
        users = [at for at, node in enumerate(graph.chain) if _is_handed(node, number)]
        for position in range(users[0] + 1, users[-1] + 1) if users else ():
            legal[position] = False
    return legal


def _tied_to(graph: Graph, at: int, storage: int) -> int:
    """The first node that must not be parted from node `at`, which changes a memory in place."""
    node = graph.chain[at]
    first = at
    if node.hidden:  # the backward of whoever used it sees the change
        first = next(
            place for place, each in enumerate(graph.chain) if storage in memory_of(each, graph.values)
        )
    if node.region is not None:  # computed again, a part would change twice what it was given
        first = min(first, first_in_region(graph.chain, graph.values, at, storage))
    return first


def _is_handed(node: Node, number: int) -> bool:
    return any(isinstance(leaf, Shared) and leaf.number == number for leaf in node.args.leaves)


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


def positions_for_owners(
    graph: Graph,
    stage_of_parameter: Mapping[str, int],
    num_stages: int,
    stage_of_use: Mapping[tuple[str, int], int] = MappingProxyType({}),
) -> tuple[int, ...]:
    """Cuts of another recording of the same model under which every stage uses only parameters it owns.

    `stage_of_parameter` names the parameters that one stage alone uses, `stage_of_use` the stage of single
    uses (by name and how many came before) of shared ones. Raises `RecordError` when the recording uses them
    in an order that no cut follows.
    """
    highest, free, positions = 0, 0, []  # free: the first position after the last node that has a stage
    legal = legal_positions(graph)
    uses: Counter[str] = Counter()
    for at, node in enumerate(graph.chain):
        stages = {stage_of_parameter[name] for name in node.parameters if name in stage_of_parameter}
        used = [(name, uses[name]) for name in node.parameters]
        uses.update(node.parameters)
        held = {use: stage_of_use[use] for use in used if use in stage_of_use}
        for (name, before), stage in held.items():
            if {stage, *stages} != {stage} or stage < highest:
                raise RecordError(
                    f"for this batch {node.name} is use number {before + 1} of the shared parameter {name}, "
                    f"which was on stage {stage} before and cannot be there now; exact=True adds up the "
                    "gradients of each use on one stage: use fewer stages, or exact=False, which may differ "
                    "in the last bits"
                )
        stages.update(held.values())
        if not stages:
            continue
        if len(stages) > 1 and node.whole is not None:
            raise RecordError(
                f"for this batch {node.name} stays whole ({node.whole}), and it uses parameters of stages "
                f"{', '.join(map(str, sorted(stages)))}, which another kind of batch parted; use one stage, "
                "or leave out what needs this kind of batch"
            )
        if len(stages) > 1 or min(stages) < highest:
            raise RecordError(
                f"for this batch {node.name} runs after parameters of stage {highest} but owns some of stage "
                f"{min(stages)}: the program changes the order of its modules with the batch; use fewer "
                "stages, or split= so that these modules share a stage"
            )
        places = [position for position in range(free, at + 1) if legal[position]]
        if min(stages) > highest and not places:
            raise RecordError(
                f"for this batch {node.name} begins stage {min(stages)}, but between stages {highest} and "
                f"{min(stages)} is no place to cut: a tensor that is changed in place, or what else cannot "
                "be parted, is used on both; use fewer stages, or split= so that these modules share a stage"
            )
        positions += places[-1:] * (min(stages) - highest)
        highest, free = min(stages), at + 1
    return tuple(positions + [len(graph.chain)] * (num_stages - 1 - len(positions)))


def glue_section(graph: Graph, values: Sequence[int]) -> Section:
    """A section of no stage that computes these batch-derived values."""
    need = _slice(graph, (), values)
    return Section(
        stage=-1,
        nodes=need.nodes,
        batch=_batch_leaves(graph, need),
        receives={},
        sends={},
        gradient_receives={},
        gradient_sends={},
        relayed=frozenset(),
        cloned=_changed(graph, need),
        live=frozenset(),
        kept_buffers=frozenset(),
        needs_output=False,
    )


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
        elif not isinstance(graph.values[value].source, ParameterSource | BufferSource):
            outside.add(value)
    return _Need(tuple(sorted((*own, *glue.values()), key=lambda node: node.index)), frozenset(outside))


def _changed(graph: Graph, need: _Need) -> frozenset[int]:
    """Values from outside that the section changes in place: it must work on a copy."""
    storages = {graph.values[old].storage for node in need.nodes for old, _ in node.rebinds}
    return frozenset(value for value in need.values if graph.values[value].storage in storages)


def _uses_buffer(graph: Graph, node: Node, name: str) -> bool:
    """Whether a node uses a buffer, by name or through a view of its memory."""
    return name in node.buffers or any(
        graph.storage_of_buffer.get(name) == graph.values[v].storage for v in node.inputs
    )


def _is_buffer(graph: Graph, value: int, name: str) -> bool:
    source = graph.values[value].source
    return isinstance(source, BufferSource) and source.name == name


def _live(graph: Graph, leaving: Sequence[int]) -> frozenset[int]:
    changed = {name for node in graph.nodes for name in node.changed_buffers}
    sources = ((value.source, value.storage) for value in graph.values)
    storages = {
        storage for source, storage in sources if isinstance(source, BufferSource) and source.name in changed
    }
    return frozenset(value for value in leaving if graph.values[value].storage in storages)


def skips(
    graph: Graph, size_of: Callable[[TensorInfo], int] = num_bytes
) -> list[tuple[int, tuple[int, ...]]]:
    """The values that more than the node after their maker needs, each with its bytes as it travels.

    They stand with the positions in the chain of their maker and of their users, ascending; what the program
    returns is used by the last node.
    """
    uses = [(value, at) for at, node in enumerate(graph.chain) for value in node.inputs]
    users: defaultdict[int, set[int]] = defaultdict(set)
    for value, at in (*uses, *((value, len(graph.chain) - 1) for value in graph.output.refs)):
        users[value].add(at)
    return [
        (size_of(graph.values[value].info), (born, *sorted(users[value] - {born})))
        for value, (born, last) in lifetimes(graph).items()
        if last > born + 1
    ]


def lifetimes(graph: Graph) -> dict[int, tuple[int, int]]:
    """For each value that a chain node makes: the chain positions of its maker and of its last user."""
    at = {node.index: position for position, node in enumerate(graph.chain)}
    lives = {value: (at[node.index], at[node.index]) for node in graph.chain for value in node.makes}
    uses: Iterator[tuple[int, int]] = (
        (v, position) for position, node in enumerate(graph.chain) for v in node.inputs
    )
    for value, position in itertools.chain(uses, ((v, len(graph.chain)) for v in graph.output.refs)):
        if value in lives:
            lives[value] = (lives[value][0], max(lives[value][1], position))
    return lives


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
