"""Call: a recorded node made ready: its function or module, and its arguments with the objects in place."""

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from evenflow.errors import RecordError
from evenflow.graph.nouns.graph import FunctionTarget, Graph, ModuleTarget, Node
from evenflow.graph.nouns.template import Ref, Template
from evenflow.graph.nouns.tree import BufferSource, ParameterSource, Value
from evenflow.graph.python.reach import PLAIN
from evenflow.runtime.program.compiled import Compiling, refusal
from evenflow.runtime.program.deferral import Deferral
from evenflow.runtime.program.kept import buffers_at
from evenflow.runtime.program.rng import Streams

# Finds the object that stands for a parameter in one node: the parameter, or that node's own accumulator.
ParameterOf = Callable[[str, Node], torch.nn.Parameter]
# Finds (module, attribute) places of a parameter by its first name.
PlacesOf = Callable[[str], list[tuple[torch.nn.Module, str]]]

# The function (None: its own) and the arguments that a node is called with on this rank.
StandIn = tuple[Callable[..., Any] | None, Template]
StandIns = Mapping[int, StandIn]  # by the node's index
Around = Callable[[], contextlib.AbstractContextManager[object]]
_Swaps = tuple[tuple[torch.nn.Module, str, torch.nn.Parameter], ...]  # (module, attribute, stand-in)


@dataclass(slots=True)
class Call:
    """One node, ready to be called.

    `args` is the node's (arguments, keywords) where only what the run itself makes is still a `Ref`.
    """

    node: Node
    function: Callable[..., Any]
    args: Template
    around: tuple[Around, ...]  # contexts to call it in, the outermost first
    before: Callable[[], None] | None  # what to do before it
    values: Sequence[Value]  # of the graph, by number
    is_compiled: bool = False

    @property
    def takes(self) -> tuple[int, ...]:
        """Values that it is given; parameters and buffers are in place already."""
        return tuple(dict.fromkeys((*self.args.refs, *(old for old, _ in self.node.rebinds))))

    def putting_off(self, deferral: Deferral) -> "Call":
        """The same call, which puts off the gradients of weights."""
        own = deferral.own(self.function)
        if own is not None:
            return replace(self, function=own)
        return self.within(lambda: deferral)

    def within(self, context: Around) -> "Call":
        """The same call, made in one more context, the innermost."""
        return replace(self, around=(*self.around, context))

    def check(self, result: Any, given: Mapping[int, Any]) -> None:
        """Refuse what a module returns whose inside was not seen, where it is not what was recorded.

        That are other Python values, an input that is not the same, or tensors of another form: what follows
        would not fit. `given` holds what it was called with.
        """
        made = set(self.node.makes)
        leaves, recorded = pytree.tree_leaves(result), self.node.output.leaves
        if len(leaves) != len(recorded):
            raise RecordError(
                f"{self.node.name} returned {len(leaves)} values, and {len(recorded)} when it was recorded: "
                "what it returns depends on more than its shapes; keep the code that uses it in the same "
                "module (atomic=[…])"
            )
        for found, leaf in zip(leaves, recorded, strict=True):
            match leaf:
                case Ref(value) if value not in made:
                    differs = found is not given.get(value, found)
                case Ref() if not isinstance(found, torch.Tensor):
                    differs = True
                case Ref(value):
                    differs = False
                    if self.node.opaque and value in self.node.results:
                        self._check_form(found, value)
                case _:
                    same = type(found) is type(leaf) and repr(found) == repr(leaf)
                    differs = isinstance(leaf, PLAIN) and not same
            if differs:
                raise RecordError(
                    f"{self.node.name} returned {_shown(found)}, and {_shown(leaf, made)} when it was "
                    "recorded: what it "
                    "returns depends on more than its shapes; keep the code that uses it in the same module "
                    "(atomic=[…])"
                )

    def _check_form(self, found: torch.Tensor, value: int) -> None:
        expected = self.values[value].info
        if tuple(found.shape) != expected.shape or found.dtype is not expected.dtype:
            raise RecordError(
                f"{self.node.name} returned a tensor {found.dtype} {list(found.shape)}, and {expected} when "
                f"it was recorded: the form of its results depends on its numbers ({self.node.whole}); "
                "keep the code that uses them in the same module (atomic=[…])"
            )


def _shown(leaf: Any, made: Collection[int] = ()) -> str:  # a leaf of a result, recorded or not
    match leaf:
        case torch.Tensor():
            return "a tensor"
        case Ref(value):
            return "a tensor" if value in made else "its input"
        case _:
            return repr(leaf)


@dataclass(frozen=True, slots=True)
class Prepare:
    """Makes calls of a graph's nodes, for one device."""

    graph: Graph
    model: torch.nn.Module
    device: torch.device
    streams: Streams
    parameter_of: ParameterOf
    places_of: PlacesOf
    compiling: Compiling | None = None
    stand_ins: StandIns = field(default_factory=dict)

    def call(self, node: Node) -> Call:
        """The node with its parameters, buffers and constants in place."""
        if node.index in self.stand_ins:
            return self._stood_in(node, *self.stand_ins[node.index])
        args, values = self.template(node.args, node), self.graph.values
        match node.target:
            case ModuleTarget(draws=draws) as target:
                module = self._on_device(self.model.get_submodule(target.path), glue=node.glue)
                self.streams.hook(self.model, (drawn.path for drawn in draws))
                swaps = self._swaps(node, module)
                around: list[Around] = [partial(_swapped, swaps)] if swaps else []
                around += [partial(self.streams.module, target)] if draws else []
                if self.compiling is not None and not swaps and refusal(node, self.model) is None:
                    compiled = self.compiling.of_module(module)
                    return Call(node, compiled, args, (), None, values, is_compiled=True)
                return Call(node, _plain_call(module), args, tuple(around), None, values)
            case FunctionTarget(function, None):
                return Call(node, function, args, (), None, values)
            case FunctionTarget(function, draws):
                assert draws is not None, "that was the case before"
                if draws.count > 1:
                    return Call(node, function, args, (partial(self.streams.function, draws),), None, values)
                seed = partial(self.streams.seed, draws.path, draws.call, draws.first)
                return Call(node, function, args, (), seed, values)

    def _stood_in(self, node: Node, function: Callable[..., Any] | None, given: Template) -> Call:
        """The node with other arguments, and perhaps another function; neither draws."""
        around: tuple[Around, ...] = ()
        match node.target:
            case ModuleTarget(path):
                swaps = self._swaps(node, self.model.get_submodule(path))
                around = (partial(_swapped, swaps),) if swaps else ()
            case FunctionTarget(own) if function is None:
                function = own
        assert function is not None, "a module has a function in its place"
        known = replace(node, opaque=False)  # what it returns here is not what was recorded
        return Call(known, function, self.template(given, node), around, None, self.graph.values)

    def template(self, template: Template, node: Node | None) -> Template:
        """A template with its parameters, buffers and constants in place; no node is for a result."""
        return template.rewrite(lambda leaf: self._leaf(leaf, node))

    def _leaf(self, leaf: Any, node: Node | None) -> Any:
        """Parameters and buffers become the objects themselves, the recording's device the stage's."""
        if isinstance(leaf, Ref):
            match self.graph.values[leaf.value].source:
                case ParameterSource(name):
                    assert node is not None, "a bare parameter is not a result"
                    return self.parameter_of(name, node)
                case BufferSource(name) if name in self.graph.constants:
                    return self.graph.constants[name].to(self.device)
                case BufferSource(name):
                    return self._buffer(name)
                case _:
                    return leaf
        if isinstance(leaf, torch.device) and leaf.type == self.graph.device.type:
            return self.device
        if self.graph.device.type == "cuda" and leaf in ("cuda", str(self.graph.device)):
            return self.device  # `x.to("cuda")`
        return leaf

    def _buffer(self, name: str) -> torch.Tensor:
        """A buffer where the stage computes: the model's own, moved there, if the program changes it."""
        found = buffers_at(self.model, [name])
        assert found, f"{name} was a tensor when it was recorded"
        moved = found[0].to(self.device)
        if moved is not found[0] and any(name in node.changed_buffers for node in self.graph.nodes):
            tables = [table for m in self.model.modules() for table in (m._buffers, vars(m))]
            for table in tables:
                table.update({key: moved for key, held in table.items() if held is found[0]})
        return moved

    def _on_device(self, module: torch.nn.Module, *, glue: bool) -> torch.nn.Module:
        """A leaf's module, its buffers where the stage computes; glue, which other stages use, as a copy."""
        if all(buffer.device == self.device for buffer in module.buffers()):
            return module
        return copy.deepcopy(module).to(self.device) if glue else module.to(self.device)

    def _swaps(self, node: Node, module: torch.nn.Module) -> _Swaps:
        """Places where this node's own accumulator stands in for a shared parameter.

        Those inside the leaf, or all if there is none: then it reaches another module (an argument, a list).
        """
        inside = {id(inner) for inner in module.modules()}

        def places(name: str) -> list[tuple[torch.nn.Module, str]]:
            every = self.places_of(name)
            return [place for place in every if id(place[0]) in inside] or every

        return tuple(
            (owner, key, self.parameter_of(name, node))
            for name in node.parameters
            for owner, key in places(name)
            if owner._parameters[key] is not self.parameter_of(name, node)
        )


def _plain_call(module: torch.nn.Module) -> Callable[..., Any]:
    """A module's call without what a `__call__` of its class does around it, which was recorded by itself."""
    plain = torch.nn.Module.__call__
    return module if type(module).__call__ is plain else partial(plain, module)


@contextlib.contextmanager
def _swapped(swaps: _Swaps) -> Iterator[None]:
    """Let a leaf use this node's accumulators, and give it its own parameters back."""
    own = [module._parameters[key] for module, key, _ in swaps]
    try:
        for module, key, accumulator in swaps:
            module._parameters[key] = accumulator
        yield
    finally:
        for (module, key, _), parameter in zip(swaps, own, strict=True):
            module._parameters[key] = parameter
