"""The recorded program as a flat list of nodes: what gets cut into stages.

A node is one call of a module that stays whole (a *leaf*) or of one torch function. Nodes stand in program
order; values connect them. *Glue* nodes depend on the batch alone (masks, positions, rotary tables): they
belong to no stage and are computed again wherever their results are needed, instead of being sent.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from evenflow.graph.nouns.template import Template
from evenflow.graph.nouns.tree import BufferSource, Draws, Value


@dataclass(frozen=True, slots=True)
class ModuleTarget:
    """Call the model's module at `path`. `draws` names the module calls inside that draw random numbers."""

    path: str
    call: int
    draws: tuple[Draws, ...]
    keyed_at_entry: bool  # each of them draws once, before any of its children: seeding on entry is enough


@dataclass(frozen=True, slots=True)
class FunctionTarget:
    """Call a torch function."""

    function: Callable[..., Any]
    draws: Draws | None


Target: TypeAlias = ModuleTarget | FunctionTarget


# Functions in which autograd walks.
_WALKS = frozenset(("grad", "backward", "func.grad", "func.grad_and_value", "func.vjp"))


@dataclass(frozen=True, slots=True)
class Step:
    """One torch function that ran inside a node, and its values: from these its cost is estimated."""

    name: str
    takes: tuple[int, ...]
    gives: tuple[int, ...]
    flops: int
    in_place: bool
    grad_enabled: bool
    autocast: bool = False  # it ran where autocast was on
    region: int | None = None  # the checkpoint region in which it ran, if any

    @property
    def walks(self) -> bool:
        """Whether autograd walks in it."""
        return self.name in _WALKS


@dataclass(frozen=True, slots=True)
class Node:
    """One step of the program.

    `results` are the values that it makes; `rebinds` pairs (old, new) of what it changes in place: the same
    tensor under a new number. `flops` counts one forward pass over the recorded microbatch.
    """

    index: int
    name: str
    target: Target
    args: Template
    output: Template
    results: tuple[int, ...]
    rebinds: tuple[tuple[int, int], ...]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    changed_buffers: tuple[str, ...]
    kept_buffers: tuple[str, ...]  # those of changed ones whose numbers autograd may keep for the backward
    flops: int
    grad_enabled: bool
    autocast: tuple[tuple[str, Any], ...]  # (device type, dtype) of each active one; ("nesting", depth)
    region: int | None = None  # the checkpoint region in which it ran: recomputed in the backward
    whole: str | None = None  # why a module was not taken apart, where something forbade it
    stateful: bool = False  # it keeps Python state, so it must run once per microbatch, on its owner
    opaque: bool = False  # what it does inside was not seen: only running it shows what it returns
    hooks: bool = False  # it puts hooks on its backward, so that must run once per microbatch
    unknown_to_autograd: bool = False  # what it changes in place
    glue: bool = False
    steps: tuple[Step, ...] = ()  # all that ran inside, in program order

    @property
    def function_name(self) -> str:
        """The name of the torch function that it calls; empty where it calls a module."""
        match self.target:
            case FunctionTarget(function):
                return getattr(function, "__name__", "")
            case ModuleTarget():
                return ""

    @property
    def inputs(self) -> tuple[int, ...]:
        """Values that must exist before the node runs, each once."""
        return tuple(dict.fromkeys((*self.args.refs, *(old for old, _ in self.rebinds))))

    @property
    def makes(self) -> tuple[int, ...]:
        """Values that exist once it has run."""
        return tuple(dict.fromkeys((*self.results, *(new for _, new in self.rebinds))))


def changed_buffers(nodes: Iterable[Node]) -> frozenset[str]:
    """Names of the buffers that nodes change."""
    return frozenset(name for node in nodes for name in node.changed_buffers)


@dataclass(frozen=True, slots=True)
class Guard:
    """The recording holds only while this function of batch-derived values gives this result."""

    function: Callable[..., Any]
    args: Template
    result: Any  # a number, bool or nested list of them
    name: str


@dataclass(frozen=True)
class Graph:
    """A recorded program, flattened. `output` is what the loss function returned."""

    nodes: tuple[Node, ...]
    values: tuple[Value, ...]
    output: Template
    guards: tuple[Guard, ...]
    apart: tuple[str, ...]  # paths of the modules that were taken apart
    same_tensor: dict[int, int]  # a value -> the earlier value of which it was the very same tensor
    constants: dict[str, Any]  # tensors of Python's own, by the name of the `BufferSource` for them
    pure: dict[int, Any]  # values that only Python's constants decided -> equal for equal numbers
    changing_objects: frozenset[int]  # numbers of the `Shared` objects that the program changes
    changed_leaves: frozenset[int]  # places of the batch's tensors that the program changes in place
    device: Any  # torch.device of the recording; arguments that name it are moved to the stage's own
    catches: bool = False  # the program's own code catches errors

    @cached_property
    def maker(self) -> dict[int, Node]:
        """Which node makes a value."""
        return {value: node for node in self.nodes for value in node.makes}

    @cached_property
    def storage_of_buffer(self) -> dict[str, int]:
        """The memory of each buffer that the program used."""
        return {v.source.name: v.storage for v in self.values if isinstance(v.source, BufferSource)}

    @cached_property
    def chain(self) -> tuple[Node, ...]:
        """The nodes that belong to stages, in program order; a cut is a position in it."""
        return tuple(node for node in self.nodes if not node.glue)
