"""Work: a section made ready to run on one device.

Everything that does not change between microbatches is settled here once: which parameter object each node
uses, on which device its constants lie, and after which node each value can be dropped.
"""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from evenflow.graph.cut import Section
from evenflow.graph.graph import FunctionTarget, Graph, ModuleTarget, Node
from evenflow.graph.template import Ref, Shared, Template
from evenflow.graph.tree import BufferSource, ParameterSource
from evenflow.runtime.rng import Streams

# Finds the object that stands for a parameter in one node: the parameter, or that node's own accumulator.
ParameterOf = Callable[[str, Node], torch.nn.Parameter]
# Finds (module, attribute) places of a parameter by its first name.
PlacesOf = Callable[[str], list[tuple[torch.nn.Module, str]]]

Swaps = tuple[tuple[torch.nn.Module, str, torch.nn.Parameter], ...]  # (module, attribute, stand-in)


class Work:
    """A section's nodes as ready calls. `run` fills `values` from what it holds at the start."""

    def __init__(
        self,
        section: Section,
        graph: Graph,
        model: torch.nn.Module,
        *,
        device: torch.device,
        streams: Streams,
        parameter_of: ParameterOf,
        places_of: PlacesOf,
        keep: Iterable[int] = (),
    ) -> None:
        self.section = section
        self.graph = graph
        self.draws = any(node.target.draws for node in section.nodes)
        kept = {*keep, *(value for values in section.sends.values() for value in values)}
        kept |= set(graph.output.refs) if section.needs_output else set()
        drops = _last_uses(section.nodes, kept)
        prepare = _Prepare(graph, model, device, streams, parameter_of, places_of)
        calls = [prepare.call(node, drops[node.index]) for node in section.nodes]
        same = itertools.groupby(zip(section.nodes, calls, strict=True), key=lambda pair: _modes(pair[0]))
        self._runs = [(modes, [call for _, call in group]) for modes, group in same]
        self._output = prepare.template(graph.output, None) if section.needs_output else None

    def run(self, values: dict[int, Any]) -> None:
        """Run every node; afterwards `values` holds what the section sends and returns."""
        shared: dict[int, Any] = {}
        for (grad_enabled, autocast), calls in self._runs:
            with _mode(grad_enabled and torch.is_grad_enabled(), autocast):
                for call in calls:
                    call(values, shared)

    def output(self, values: Mapping[int, Any]) -> Any:
        """What the program returned, in its own shape; for the section that `needs_output`."""
        assert self._output is not None
        output = self._output.rewrite(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf)
        return output.fill(values, {})  # (a buffer that is returned may change with the next microbatch)


def _modes(node: Node) -> tuple[bool, tuple[tuple[str, Any], ...]]:
    return node.grad_enabled, node.autocast


@contextlib.contextmanager
def _mode(grad_enabled: bool, autocast: tuple[tuple[str, Any], ...]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if grad_enabled != torch.is_grad_enabled():
            stack.enter_context(torch.set_grad_enabled(grad_enabled))
        wanted = dict(autocast)
        for kind in ("cpu", "cuda"):
            now = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            if now != wanted.get(kind):
                stack.enter_context(torch.autocast(kind, dtype=wanted.get(kind), enabled=kind in wanted))
        yield


def _last_uses(nodes: tuple[Node, ...], kept: set[int]) -> dict[int, tuple[int, ...]]:
    """For each node, the values that nobody needs after it."""
    seen = set(kept)
    drops: dict[int, tuple[int, ...]] = {}
    for node in reversed(nodes):
        drops[node.index] = tuple(value for value in (*node.inputs, *node.makes) if value not in seen)
        seen.update(node.inputs, node.makes)
    return drops


@dataclass(frozen=True, slots=True)
class _Prepare:
    graph: Graph
    model: torch.nn.Module
    device: torch.device
    streams: Streams
    parameter_of: ParameterOf
    places_of: PlacesOf

    def template(self, template: Template, node: Node | None) -> Template:
        return template.rewrite(lambda leaf: self.leaf(leaf, node))

    def leaf(self, leaf: Any, node: Node | None) -> Any:
        """Parameters and buffers become the objects themselves, the recording's device the stage's."""
        if isinstance(leaf, Ref):
            match self.graph.values[leaf.value].source:
                case ParameterSource(name):
                    assert node is not None, "a bare parameter is not a result"
                    return self.parameter_of(name, node)
                case BufferSource(name):
                    return _attribute(self.model, name).to(self.device)
                case _:
                    return leaf
        if isinstance(leaf, torch.device) and leaf.type == self.graph.device.type:
            return self.device
        if self.graph.device.type == "cuda" and leaf in ("cuda", str(self.graph.device)):
            return self.device  # `x.to("cuda")`
        return leaf

    def call(self, node: Node, drops: tuple[int, ...]) -> "_Call":
        match node.target:
            case ModuleTarget() as target:
                module = self.on_device(self.model.get_submodule(target.path), glue=node.glue)
                self.streams.hook(self.model, (drawn.path for drawn in target.draws))
                return _Call(
                    node,
                    self.template(node.args, node),
                    module,
                    drops,
                    self.swaps(node, module),
                    self.streams,
                )
            case FunctionTarget(function):
                return _Call(node, self.template(node.args, node), function, drops, (), self.streams)

    def on_device(self, module: torch.nn.Module, *, glue: bool) -> torch.nn.Module:
        """A leaf's module, its buffers where the stage computes; glue, which other stages use, as a copy."""
        if all(buffer.device == self.device for buffer in module.buffers()):
            return module
        return copy.deepcopy(module).to(self.device) if glue else module.to(self.device)

    def swaps(self, node: Node, module: torch.nn.Module) -> Swaps:
        """Places inside a leaf where this node's own accumulator stands in for a shared parameter."""
        inside = {id(inner) for inner in module.modules()}
        return tuple(
            (owner, key, self.parameter_of(name, node))
            for name in node.parameters
            for owner, key in self.places_of(name)
            if id(owner) in inside and owner._parameters[key] is not self.parameter_of(name, node)
        )


def _attribute(model: torch.nn.Module, name: str) -> torch.Tensor:
    path, _, key = name.rpartition(".")
    found = getattr(model.get_submodule(path), key)
    assert isinstance(found, torch.Tensor), f"{name} was a tensor when it was recorded"
    return found


class _Call:
    """One node, ready to be called."""

    __slots__ = (
        "args",
        "draws",
        "drops",
        "flat",
        "function",
        "node",
        "rebinds",
        "results",
        "streams",
        "swaps",
    )

    def __init__(
        self,
        node: Node,
        args: Template,
        function: Callable[..., Any],
        drops: tuple[int, ...],
        swaps: Swaps,
        streams: Streams,
    ) -> None:
        self.node, self.args, self.function, self.drops, self.swaps = node, args, function, drops, swaps
        self.streams = streams
        self.rebinds = node.rebinds
        self.draws = node.target.draws
        self.flat = _flat(args)
        results = set(node.results)
        leaves = [
            leaf.value if isinstance(leaf, Ref) and leaf.value in results else None
            for leaf in node.output.leaves
        ]
        single = len(leaves) == 1 and pytree.tree_unflatten([0], node.output.spec) == 0
        self.results: int | list[int | None] | None = leaves[0] if single else leaves

    def __call__(self, values: dict[int, Any], shared: dict[int, Any]) -> None:
        if self.flat is None:
            args, kwargs = self.args.fill(values, shared)
        else:
            constants, holes, names = self.flat
            filled = list(constants)
            for position, value in holes:
                filled[position] = values[value]
            args = filled[: len(filled) - len(names)]
            kwargs = dict(zip(names, filled[len(args) :], strict=True))
        if self.swaps:
            with _swapped(self.swaps):
                result = self.called(args, kwargs)
        else:
            result = self.called(args, kwargs)
        self.keep(values, result)

    def called(self, args: Any, kwargs: Any) -> Any:
        if not self.draws:
            return self.function(*args, **kwargs)
        match self.node.target:
            case ModuleTarget() as target:
                with self.streams.module(target):
                    return self.function(*args, **kwargs)
            case FunctionTarget(_, draws):
                assert draws is not None
                with self.streams.function(draws):
                    return self.function(*args, **kwargs)

    def keep(self, values: dict[int, Any], result: Any) -> None:
        for old, new in self.rebinds:
            values[new] = values[old]
        match self.results:
            case None:
                pass
            case int() as value:
                values[value] = result
            case list() as expected:
                leaves = pytree.tree_leaves(result)
                assert len(leaves) == len(expected), (
                    f"{self.node.name} returned another tree than when it was recorded"
                )
                pairs = zip(expected, leaves, strict=True)
                values.update((value, leaf) for value, leaf in pairs if value is not None)
        for value in self.drops:
            values.pop(value, None)


@contextlib.contextmanager
def _swapped(swaps: Swaps) -> Iterator[None]:
    """Let a leaf use this node's accumulators, and give it its own parameters back."""
    own = [module._parameters[key] for module, key, _ in swaps]
    try:
        for module, key, accumulator in swaps:
            module._parameters[key] = accumulator
        yield
    finally:
        for (module, key, _), parameter in zip(swaps, own, strict=True):
            module._parameters[key] = parameter


def _flat(args: Template) -> tuple[list[Any], list[tuple[int, int]], list[str]] | None:
    """(leaves, [(position, value)], keyword names) where no argument is a container; else nothing."""
    if any(isinstance(leaf, Shared) for leaf in args.leaves):
        return None
    positional, keywords = pytree.tree_unflatten(list(range(len(args.leaves))), args.spec)
    if not all(type(argument) is int for argument in (*positional, *keywords.values())):
        return None
    holes = [(at, leaf.value) for at, leaf in enumerate(args.leaves) if isinstance(leaf, Ref)]
    return list(args.leaves), holes, list(keywords)
