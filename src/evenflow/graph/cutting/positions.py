"""Positions in the chain of a graph: where it may be cut, and what lives across each of them.

Position `c` lies before node `c` of the chain; the last one lies behind all nodes.
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TypeAlias

from evenflow.errors import RecordError
from evenflow.graph.nouns.graph import Graph, Node, changed_buffers
from evenflow.graph.nouns.regions import first_in_region, memory_of
from evenflow.graph.nouns.template import Shared
from evenflow.graph.nouns.tree import BufferSource, TensorInfo

_Lifetimes: TypeAlias = Mapping[int, tuple[int, int]]  # value -> places of its maker and of its last user


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


# -- where a cut changes nothing


def legal_positions(graph: Graph) -> list[bool]:
    """Where a cut changes nothing: nowhere between nodes that must be on one stage."""
    legal = [True] * (len(graph.chain) + 1)
    lives = lifetimes(graph)
    together = itertools.chain(
        _aliases_of_changes(graph, lives),
        _earlier_users_of_changes(graph),
        _users_of_tensors_with_two_numbers(graph, lives),
        _users_of_changed_buffers(graph),
        _users_of_changing_objects(graph),
    )
    for first, last in together:
        for position in range(first + 1, last + 1):
            legal[position] = False
    return legal


_Span: TypeAlias = tuple[int, int]  # the places of the first and the last node that must be on one stage


def _changes(graph: Graph) -> Iterator[tuple[int, int]]:
    """Each node that changes a memory in place, by its place in the chain, and the memory."""
    for at, node in enumerate(graph.chain):
        for storage in {graph.values[old].storage for old, _ in node.rebinds}:
            yield at, storage


def _aliases_of_changes(graph: Graph, lives: _Lifetimes) -> Iterator[_Span]:
    """A change in place, and what comes before it as long as an alias is there that still matters."""
    by_storage: defaultdict[int, list[int]] = defaultdict(list)
    for value in lives:
        by_storage[graph.values[value].storage].append(value)
    for at, storage in _changes(graph):
        for position in range(1, at + 1):
            across = [v for v in by_storage[storage] if lives[v][0] < position <= lives[v][1]]
            if len(across) > 1:
                yield position - 1, position


def _earlier_users_of_changes(graph: Graph) -> Iterator[_Span]:
    """A change in place, and earlier users whose backward sees it, or runs again."""
    for at, storage in _changes(graph):
        node = graph.chain[at]
        if node.unknown_to_autograd:
            users = (
                place for place, each in enumerate(graph.chain) if storage in memory_of(each, graph.values)
            )
            yield next(users), at
        if node.region is not None:  # computed again, a part would change twice what it was given
            yield first_in_region(graph.chain, graph.values, at, storage), at


def _users_of_tensors_with_two_numbers(graph: Graph, lives: _Lifetimes) -> Iterator[_Span]:
    """One tensor must not cross a cut under two numbers, whose gradients would be summed apart."""
    for later in graph.same_tensor:
        earlier = later
        while earlier in graph.same_tensor:
            earlier = graph.same_tensor[earlier]
            if later in lives and earlier in lives:
                yield lives[later][0], min(lives[later][1], lives[earlier][1])


def _users_of_changed_buffers(graph: Graph) -> Iterator[_Span]:
    for name in changed_buffers(graph.nodes):
        users = [at for at, node in enumerate(graph.chain) if _uses_buffer(graph, node, name)]
        if any(_is_buffer(graph, value, name) for value in graph.output.refs):
            users.append(len(graph.chain) - 1)  # the last stage returns it as it is after this microbatch
        yield users[0], users[-1]


def _users_of_changing_objects(graph: Graph) -> Iterator[_Span]:
    """Each stage has a copy of its own of an object."""
    for number in graph.changing_objects:
        users = [at for at, node in enumerate(graph.chain) if _is_handed(node, number)]
        if users:
            yield users[0], users[-1]


def _is_handed(node: Node, number: int) -> bool:
    return any(isinstance(leaf, Shared) and leaf.number == number for leaf in node.args.leaves)


def _uses_buffer(graph: Graph, node: Node, name: str) -> bool:
    """Whether a node uses a buffer, by name or through a view of its memory."""
    return name in node.buffers or any(
        graph.storage_of_buffer.get(name) == graph.values[v].storage for v in node.inputs
    )


def _is_buffer(graph: Graph, value: int, name: str) -> bool:
    source = graph.values[value].source
    return isinstance(source, BufferSource) and source.name == name


# -- the same owners in another recording


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
