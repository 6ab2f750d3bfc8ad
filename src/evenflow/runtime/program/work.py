"""Work: a section made ready to run on one device.

Everything that does not change between microbatches is settled here once: which parameter object each node
uses, on which device its constants lie, and the code that makes the calls.
"""

import contextlib
import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from evenflow.graph.cutting.cut import Section
from evenflow.graph.cutting.weight_uses import WeightUses
from evenflow.graph.nouns.graph import Graph, ModuleTarget, Node
from evenflow.graph.nouns.template import NOTHING, Template
from evenflow.runtime.program.call import Around, Call, ParameterOf, PlacesOf, Prepare
from evenflow.runtime.program.compiled import Compiling
from evenflow.runtime.program.deferral import Deferral
from evenflow.runtime.program.rng import Streams
from evenflow.runtime.program.straight import Straight, Tell, filling, straight
from evenflow.runtime.program.vocabulary_loss import Vocabulary

_KINDS = ("cpu", "cuda")  # devices that autocast may be on for
_Modes = tuple[bool, tuple[tuple[str, Any], ...]]  # gradients on or off; a node's `autocast`


class Work:
    """A section's nodes as ready calls. `run` fills `values` from what it holds at the start.

    `extra` is a template that somebody will fill afterwards: its values are kept, its buffers in place.
    `deferral` is that of the stage, and learns what the section says of its parameters. With `compiling`
    blocks are compiled.
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
        deferral: Deferral | None = None,
        compiling: Compiling | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.section = section
        self.graph = graph
        self._device, self._is_gpu = device, device.type == "cuda"
        self.parameters = tuple(
            dict.fromkeys(parameter_of(name, node) for node in section.nodes for name in node.parameters)
        )
        self.draws = any(node.target.draws for node in section.nodes)
        self.gives = any(section.gradient_sends.values())  # whether other stages wait for gradients of it
        self.awaited = tuple(value for group in section.gradient_receives.values() for value in group)
        self.entering = tuple(
            (source, tuple((value, graph.values[value].info.requires_grad) for value in group))
            for source, group in section.receives.items()
        )
        kept = {*extra.refs, *(value for values in section.sends.values() for value in values)}
        kept |= set(graph.output.refs) if section.needs_output else set()
        stand_ins = {} if vocabulary is None else vocabulary.stand_ins(graph, section.nodes, model)
        prepare = Prepare(graph, model, device, streams, parameter_of, places_of, compiling, stand_ins)
        calls = [prepare.call(node) for node in section.nodes]
        self.compiled = frozenset(call.node.index for call in calls if call.is_compiled)
        nodes = [replace(n, opaque=True) if n.index in self.compiled else n for n in section.nodes]
        put_off = _learnt(nodes, graph, parameter_of, deferral)
        self.runs = [*_runs(calls, kept, streams, put_off)]
        self._output = filling(prepare.template(graph.output, None)) if section.needs_output else None
        self.extra = prepare.template(extra, None)

    def given(self, batch: Mapping[int, torch.Tensor] | Sequence[torch.Tensor]) -> dict[int, Any]:
        """What `run` begins with of a microbatch's tensors: copies of those that the section changes.

        `batch` holds, by place, (at least) the tensor leaves that the section needs.
        """
        values: dict[int, Any] = {}
        for leaf, value in self.section.batch:
            tensor = batch[leaf].to(self._device, non_blocking=self._is_gpu)
            values[value] = tensor.clone() if value in self.section.cloned else tensor
        return values

    def run(self, values: dict[int, Any], *, put_off: bool = False) -> None:
        """Run every node; afterwards `values` holds what the section sends and returns.

        With `put_off` the gradients of weights are put off as far as can be.
        """
        shared: dict[int, Any] = {}
        for nested, runs in itertools.groupby(self.runs, lambda run: run.nested):
            if nested:
                torch.autocast_increment_nesting()  # casts of weights are kept until the stretch's end
            try:
                for run in runs:
                    run(values, shared, put_off=put_off)
            finally:
                if nested and torch.autocast_decrement_nesting() == 0:
                    torch.clear_autocast_cache()

    def watched(self, tell: Tell, *, inside: Around | None = None) -> "Work":
        """The same work, which tells of every node what it took and made; no gradient is put off.

        Modules that stay whole and are not compiled are called in the context `inside`.
        """
        told = copy.copy(self)
        told.runs = [run.watched(tell, inside) for run in self.runs]
        return told

    def output(self, values: dict[int, Any]) -> Any:
        """What the program returned, in its own shape; for the section that `needs_output`."""
        assert self._output is not None
        return self._output(values)


class _Run:
    """Calls in a row, of one autocast region and one checkpoint region, which is computed again later.

    `later` are the values that are needed afterwards.
    """

    def __init__(
        self, calls: tuple[Call, ...], later: set[int], streams: Streams, put_off: Mapping[int, Deferral]
    ) -> None:
        self.calls, self.streams, self.put_off = calls, streams, put_off
        self.nested, self.recomputed = _nested(calls[0].node), calls[0].node.region is not None
        made = {value for call in calls for value in call.node.makes}
        self.takes = tuple(dict.fromkeys(v for call in calls for v in call.takes if v not in made))
        self.gives = tuple(value for value in made if value in later)
        self.drops = tuple(value for value in self.takes if value not in later)
        self.tell: Tell | None = None

    def __call__(self, values: dict[int, Any], shared: dict[int, Any], *, put_off: bool) -> None:
        calls = self.putting_off if put_off else self.plainly
        if self.recomputed and torch.is_grad_enabled():
            self.checkpointed(calls, values)
        else:
            calls(values, shared)

    def watched(self, tell: Tell, inside: Around | None) -> "_Run":
        """The same calls, which tell of every node; see `Work.watched`."""
        told = copy.copy(self)
        for made in ("plainly", "putting_off"):
            vars(told).pop(made, None)
        told.tell, told.put_off = tell, {}
        if inside is not None:
            told.calls = tuple(call.within(inside) if _is_whole(call) else call for call in self.calls)
        return told

    @cached_property
    def plainly(self) -> Straight:
        """The function that makes the calls."""
        return self._straight(self.calls)

    @cached_property
    def putting_off(self) -> Straight:
        """The same function, which puts off the gradients of weights."""
        if self.put_off.keys().isdisjoint(call.node.index for call in self.calls):
            return self.plainly
        return self._straight(
            call.putting_off(self.put_off[call.node.index]) if call.node.index in self.put_off else call
            for call in self.calls
        )

    def _straight(self, calls: Iterable[Call]) -> Straight:
        groups = [(modes, tuple(g)) for modes, g in itertools.groupby(calls, lambda c: _modes(c.node))]
        return straight(
            [(partial(_mode, *modes), group) for modes, group in groups],
            takes=self.takes,
            last=set(self.drops),
            gives=self.gives,
            tell=self.tell,
        )

    def checkpointed(self, calls: Straight, values: dict[int, Any]) -> None:
        base = self.streams.base

        def run(*tensors: torch.Tensor) -> tuple[Any, ...]:
            inside = dict(zip(self.takes, tensors, strict=True))
            with self.streams.as_at(base):
                calls(inside, {})
            return tuple(inside[value] for value in self.gives)

        given = [values[value] for value in self.takes]
        # Every draw is keyed, so the generator's state is no matter.
        made = checkpoint(run, *given, use_reentrant=False, preserve_rng_state=False)
        values.update(zip(self.gives, made, strict=True))
        for value in self.drops:
            values.pop(value, None)


def _runs(
    calls: Sequence[Call], kept: set[int], streams: Streams, put_off: Mapping[int, Deferral]
) -> Iterator[_Run]:
    """The runs of a section: one for each checkpoint region, and for what is between them."""

    def kind(at: int) -> tuple[bool, int | None]:
        return _nested(calls[at].node), calls[at].node.region

    for _, part in itertools.groupby(range(len(calls)), kind):
        own = list(part)
        later = kept.union(*(call.node.inputs for call in calls[own[-1] + 1 :]))
        yield _Run(tuple(calls[at] for at in own), later, streams, put_off)


def _learnt(
    nodes: Sequence[Node], graph: Graph, parameter_of: ParameterOf, deferral: Deferral | None
) -> dict[int, Deferral]:
    """Tell the stage's deferral of the nodes' parameters; those that put off, by index."""
    if deferral is None:
        return {}
    uses = WeightUses(nodes, graph.values)
    pairs = [(node, name) for node in nodes for name in node.parameters]
    deferral.learn(
        (parameter_of(name, node) for node, name in pairs if name in uses.splittable),
        (parameter_of(name, node) for node, name in pairs if name in uses.others),
    )
    return dict.fromkeys(uses.nodes, deferral)


def _is_whole(call: Call) -> bool:
    """Whether a call is that of a module, as Python runs it."""
    return isinstance(call.node.target, ModuleTarget) and not call.is_compiled


def _nested(node: Node) -> bool:
    """Whether a node ran inside an autocast region."""
    return bool(node.autocast)


def _modes(node: Node) -> _Modes:
    return node.grad_enabled, node.autocast


def _mode(
    grad_enabled: bool, autocast: tuple[tuple[str, Any], ...]
) -> contextlib.AbstractContextManager[None]:
    """The context in which nodes of these modes run: gradients are off where the caller has them off."""
    on = torch.is_grad_enabled()
    wanted = {kind: dtype for kind, dtype in autocast if kind in _KINDS}
    now = {k: torch.get_autocast_dtype(k) for k in _KINDS if torch.is_autocast_enabled(k)}
    if now == wanted and (grad_enabled or not on):
        return contextlib.nullcontext()
    return _changed(grad_enabled and on, now, wanted)


@contextlib.contextmanager
def _changed(grad_enabled: bool, now: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(grad_enabled))
        for kind in _KINDS:
            if now.get(kind) != wanted.get(kind):
                stack.enter_context(torch.autocast(kind, dtype=wanted.get(kind), enabled=kind in wanted))
        yield
