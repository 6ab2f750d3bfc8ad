"""Work: a section made ready to run on one device.

Everything that does not change between microbatches is settled here once: which parameter object each node
uses, on which device its constants lie, and after which node each value can be dropped.
"""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from evenflow.errors import RecordError
from evenflow.graph.cut import Section
from evenflow.graph.graph import FunctionTarget, Graph, ModuleTarget, Node
from evenflow.graph.outside import PLAIN
from evenflow.graph.template import NOTHING, Ref, Shared, Shell, Template
from evenflow.graph.tree import BufferSource, ParameterSource, TensorInfo, Value
from evenflow.runtime.rng import Streams

# Finds the object that stands for a parameter in one node: the parameter, or that node's own accumulator.
ParameterOf = Callable[[str, Node], torch.nn.Parameter]
# Finds (module, attribute) places of a parameter by its first name.
PlacesOf = Callable[[str], list[tuple[torch.nn.Module, str]]]

# Is told a node that has run and the values that there are then, what it made among them.
Tell = Callable[[Node, Mapping[int, Any]], None]

Swaps = tuple[tuple[torch.nn.Module, str, torch.nn.Parameter], ...]  # (module, attribute, stand-in)


_Modes = tuple[bool, tuple[tuple[str, Any], ...]]  # gradients on or off; (device type, autocast dtype)
_Ready = Callable[[dict[int, Any], dict[int, Any]], None]  # runs a node on (values, shared objects)


class Work:
    """A section's nodes as ready calls. `run` fills `values` from what it holds at the start.

    `extra` is a template that somebody will fill afterwards: its values are kept, its buffers in place.
    """

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
        extra: Template = NOTHING,
    ) -> None:
        self.section = section
        self.graph = graph
        self.draws = any(node.target.draws for node in section.nodes)
        kept = {*extra.refs, *(value for values in section.sends.values() for value in values)}
        kept |= set(graph.output.refs) if section.needs_output else set()
        drops = _last_uses(section.nodes, kept)
        prepare = _Prepare(graph, model, device, streams, parameter_of, places_of)
        calls = [prepare.call(node, drops[node.index]) for node in section.nodes]
        self.runs = [
            _Run(tuple(part), kept, section.nodes, streams)
            for _, part in itertools.groupby(calls, key=lambda call: (_nested(call.node), call.node.region))
        ]
        self._output = prepare.template(graph.output, None) if section.needs_output else None
        self.extra = prepare.template(extra, None)

    def run(self, values: dict[int, Any]) -> None:
        """Run every node; afterwards `values` holds what the section sends and returns."""
        shared: dict[int, Any] = {}
        for run in self.runs:
            run(values, shared)

    def watched(self, tell: "Tell") -> "Work":
        """The same work, which tells of every node what it made."""
        told = copy.copy(self)
        told.runs = [run.watched(tell) for run in self.runs]
        return told

    def output(self, values: Mapping[int, Any]) -> Any:
        """What the program returned, in its own shape; for the section that `needs_output`."""
        assert self._output is not None
        output = self._output.rewrite(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf)
        return output.fill(values, {})  # (a buffer that is returned may change with the next microbatch)


class _Run:
    """Calls in a row, of one autocast region and one checkpoint region, which is computed again later."""

    def __init__(
        self, calls: "tuple[_Call, ...]", kept: set[int], nodes: tuple[Node, ...], streams: Streams
    ) -> None:
        first, last = calls[0].node, calls[-1].node
        self.nested, self.recomputed, self.streams = _nested(first), first.region is not None, streams
        groups = itertools.groupby(calls, key=lambda call: _modes(call.node))
        self.groups: list[tuple[_Modes, tuple[_Ready, ...]]] = [(modes, tuple(g)) for modes, g in groups]
        made = {value for call in calls for value in call.node.makes}
        later = kept.union(*(node.inputs for node in nodes if node.index > last.index))
        self.takes = tuple(dict.fromkeys(v for call in calls for v in call.held if v not in made))
        self.gives = tuple(value for value in made if value in later)
        self.drops = tuple(value for value in self.takes if value not in later)

    def __call__(self, values: dict[int, Any], shared: dict[int, Any]) -> None:
        if self.nested:
            torch.autocast_increment_nesting()  # casts of weights are kept until the region's end
        try:
            if self.recomputed and torch.is_grad_enabled():
                self.checkpointed(values, shared)
            else:
                self.plainly(values, shared)
        finally:
            if self.nested and torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()

    def watched(self, tell: "Tell") -> "_Run":
        """The same calls, which tell of every node what it made."""
        told = copy.copy(self)
        told.groups = [(modes, tuple(_told(call, tell) for call in calls)) for modes, calls in self.groups]
        return told

    def plainly(self, values: dict[int, Any], shared: dict[int, Any]) -> None:
        for (grad_enabled, autocast), calls in self.groups:
            with _mode(grad_enabled and torch.is_grad_enabled(), autocast):
                for call in calls:
                    call(values, shared)

    def checkpointed(self, values: dict[int, Any], shared: dict[int, Any]) -> None:
        base = self.streams.base

        def run(*tensors: torch.Tensor) -> tuple[Any, ...]:
            inside = dict(zip(self.takes, tensors, strict=True))
            with self.streams.as_at(base):
                self.plainly(inside, shared)
            return tuple(inside[value] for value in self.gives)

        given = [values[value] for value in self.takes]
        # Every draw is keyed, so the generator's state is no matter.
        made = checkpoint(run, *given, use_reentrant=False, preserve_rng_state=False)
        values.update(zip(self.gives, made, strict=True))
        for value in self.drops:
            values.pop(value, None)


def _nested(node: Node) -> bool:
    """Whether a node ran inside an autocast region."""
    return bool(node.autocast)


def _modes(node: Node) -> "_Modes":
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
                case BufferSource(name) if name in self.graph.constants:
                    return self.graph.constants[name].to(self.device)
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
                    _plain_call(module),
                    drops,
                    self.swaps(node, module),
                    self.streams,
                    self.graph.values,
                )
            case FunctionTarget(function):
                filled = self.template(node.args, node)
                return _Call(node, filled, function, drops, (), self.streams, self.graph.values)

    def on_device(self, module: torch.nn.Module, *, glue: bool) -> torch.nn.Module:
        """A leaf's module, its buffers where the stage computes; glue, which other stages use, as a copy."""
        if all(buffer.device == self.device for buffer in module.buffers()):
            return module
        return copy.deepcopy(module).to(self.device) if glue else module.to(self.device)

    def swaps(self, node: Node, module: torch.nn.Module) -> Swaps:
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


def _attribute(model: torch.nn.Module, name: str) -> torch.Tensor:
    path, _, key = name.rpartition(".")
    found = getattr(model.get_submodule(path), key)
    assert isinstance(found, torch.Tensor), f"{name} was a tensor when it was recorded"
    return found


def _plain_call(module: torch.nn.Module) -> Callable[..., Any]:
    """A module's call without what a `__call__` of its class does around it, which was recorded by itself."""
    plain = torch.nn.Module.__call__
    return module if type(module).__call__ is plain else partial(plain, module)


class _Call:
    """One node, ready to be called."""

    __slots__ = (
        "args",
        "checked",
        "checks",
        "draws",
        "drops",
        "flat",
        "function",
        "held",
        "node",
        "plain",
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
        infos: Sequence[Value],
    ) -> None:
        self.node, self.args, self.function, self.drops, self.swaps = node, args, function, drops, swaps
        self.streams = streams
        self.rebinds = node.rebinds
        # Values that must lie in the environment; parameters and buffers are in place already.
        self.held = (*args.refs, *(old for old, _ in node.rebinds))
        self.draws = node.target.draws
        self.flat = _flat(args)
        results = set(node.results)
        leaves = [
            leaf.value if isinstance(leaf, Ref) and leaf.value in results else None
            for leaf in node.output.leaves
        ]
        single = len(leaves) == 1 and pytree.tree_unflatten([0], node.output.spec) == 0
        self.results: int | list[int | None] | None = leaves[0] if single else leaves
        self.checked = {value: infos[value].info for value in node.results} if node.opaque else {}
        self.checks = node.opaque or node.stateful
        # Most nodes: one tensor comes out, and nothing is to be done around the call.
        special = (swaps, self.draws, node.rebinds, self.checks, self.flat is None)
        self.plain = isinstance(self.results, int) and not any(special)

    def __call__(self, values: dict[int, Any], shared: dict[int, Any]) -> None:
        if self.flat is None:
            args, kwargs = self.args.fill(values, shared)
        else:
            constants, holes, names = self.flat
            filled = constants.copy()
            for position, value in holes:
                filled[position] = values[value]
            args = filled[: len(filled) - len(names)]
            kwargs = dict(zip(names, filled[len(args) :], strict=True)) if names else {}
        if self.plain:
            assert isinstance(self.results, int), "so it is where a call is plain"
            values[self.results] = self.function(*args, **kwargs)
            for value in self.drops:
                values.pop(value, None)
            return
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
        if self.checks:
            self.check_plain(values, result)
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
        for value, info in self.checked.items():
            self.check(values[value], info)
        for value in self.drops:
            values.pop(value, None)

    def check_plain(self, values: Mapping[int, Any], result: Any) -> None:
        """Refuse a leaf that returns other Python values than when it was recorded, or not the same input."""
        expected, made = self.node.output.leaves, set(self.node.makes)
        for mine, leaf in zip(pytree.tree_leaves(result), expected, strict=True):
            if isinstance(leaf, Ref):
                differs = leaf.value not in made and mine is not values.get(leaf.value, mine)
            else:
                differs = isinstance(leaf, PLAIN) and (
                    type(mine) is not type(leaf) or repr(mine) != repr(leaf)
                )
            if differs:
                raise RecordError(
                    f"{self.node.name} returned {_shown(mine)}, and {_shown(leaf)} when it was "
                    "recorded: what it "
                    "returns depends on more than its shapes; keep the code that uses it in the same module "
                    "(atomic=[…])"
                )

    def check(self, found: torch.Tensor, expected: TensorInfo) -> None:
        """Refuse a result of another form than when it was recorded: what follows would not fit."""
        if tuple(found.shape) != expected.shape or found.dtype is not expected.dtype:
            raise RecordError(
                f"{self.node.name} returned a tensor {found.dtype} {list(found.shape)}, and {expected} when "
                f"it was recorded: the form of its results depends on its numbers ({self.node.whole}); "
                "keep the code that uses them in the same module (atomic=[…])"
            )


def _shown(leaf: Any) -> str:  # a leaf of a result
    return (
        "a tensor" if isinstance(leaf, torch.Tensor) else "its input" if isinstance(leaf, Ref) else repr(leaf)
    )


def _told(call: _Ready, tell: Tell) -> _Ready:
    """A call that tells of its node before it lets go of what nobody needs any more."""
    assert isinstance(call, _Call), "a work that is watched already"
    kept = copy.copy(call)
    kept.drops = ()

    def run(values: dict[int, Any], shared: dict[int, Any]) -> None:
        kept(values, shared)
        tell(call.node, values)
        for value in call.drops:
            values.pop(value, None)

    return run


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
    """(arguments, [(position, value)], keyword names) where no container holds a tensor; else nothing.

    A tuple of plain values (the slices of an index) is handed over as it is; other containers are made anew.
    """
    if any(isinstance(leaf, Shared | Shell) for leaf in args.leaves):
        return None
    positional, keywords = pytree.tree_unflatten(list(args.leaves), args.spec)
    given = [*positional, *keywords.values()]
    if not all(isinstance(argument, Ref) or _is_constant(argument) for argument in given):
        return None
    holes = [(at, argument.value) for at, argument in enumerate(given) if isinstance(argument, Ref)]
    return given, holes, list(keywords)


def _is_constant(argument: Any) -> bool:
    """Whether an argument may be handed over again and again: nobody can change it."""
    if type(argument) is tuple:
        return all(_is_constant(each) for each in argument)
    return not isinstance(argument, Ref) and pytree.tree_is_leaf(argument)
