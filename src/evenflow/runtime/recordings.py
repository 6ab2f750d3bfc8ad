"""Recordings: one per kind of microbatch, found again by key and guards, each cut for the same owners.

A recording holds for one key: the tree, shapes, strides and types of the microbatch, its plain values, each
module's training flag, whether gradients are computed, autocast. Where the program looked at numbers of the
batch (`if mask.all():`), a *guard* is computed from each microbatch, and another answer means another
recording.
"""

import contextlib
import gc
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from evenflow.errors import ConfigError, RecordError
from evenflow.graph.compare import find_difference, forget_changes, keep_whole_alike, same_functions
from evenflow.graph.constants import FirstRun
from evenflow.graph.cut import Cut, cut, glue_section
from evenflow.graph.fakes import FakeParameters, RealParameters, storage_of
from evenflow.graph.graph import Graph, Guard
from evenflow.graph.leaves import flatten
from evenflow.graph.left_behind import LeftBehind
from evenflow.graph.modules import python_kept
from evenflow.graph.outside import (
    Snapshot,
    changed_names,
    frozen,
    seen_by_function,
)
from evenflow.graph.positions import positions_for_owners
from evenflow.graph.reach import Reach
from evenflow.graph.recomputable import Again
from evenflow.graph.record import record
from evenflow.graph.seen_modules import SeenModules
from evenflow.graph.template import Template, is_plain
from evenflow.graph.tree import CallTree
from evenflow.runtime.call import ParameterOf
from evenflow.runtime.compiled import Compiling
from evenflow.runtime.parameters import Accumulators, stages_of_parameters
from evenflow.runtime.rng import Streams
from evenflow.runtime.stage import Stage
from evenflow.runtime.vocabulary_loss import Vocabulary
from evenflow.runtime.work import Work

Program = Callable[[Any, Any], Any]  # (model, microbatch) -> what the user's function returns


@dataclass(frozen=True, slots=True)
class Recording:
    """A graph, its cut, what its stages recompute, and the works of this process's stages."""

    graph: Graph
    cut: Cut
    again: Again
    works: Mapping[int, Work]


@dataclass(frozen=True, slots=True)
class Leaves:
    """How a recorded program is taken apart: see `graph.leaves.flatten`."""

    max_share: float
    exact: bool
    opened: tuple[str, ...]
    atomic: tuple[type[torch.nn.Module], ...]


class Recordings:
    """All recordings of one model in one process. Learning happens in the same order on every rank."""

    def __init__(
        self,
        model: torch.nn.Module,
        fakes: FakeParameters,
        *,
        device: torch.device,
        leaves: Leaves,
        accumulators: Accumulators,
        compiling: Compiling | None = None,
        vocabulary: Vocabulary | None = None,
        recompute: Callable[..., Again] | None = None,  # of (cut, first=): what its stages recompute
    ) -> None:
        self.entries: list[Recording] = []
        self.stage_of_parameter: dict[str, int] = {}
        self.model = model
        self._fakes, self._device, self._leaves = fakes, device, leaves
        self._accumulators, self._compiling, self._vocabulary = accumulators, compiling, vocabulary
        self._recompute = recompute
        self._by_key: dict[Any, list[int]] = {}
        # By program: the names in its code, and itself, so that its id is not used again.
        self._names: dict[Any, tuple[frozenset[str], Program]] = {}
        self._catches: dict[Any, bool] = {}  # by program too: whether its code catches errors
        self._left, self._modules = LeftBehind(model), SeenModules(model)
        self._seen: Snapshot = {}  # what Python tells the program now
        self._outside: list[Snapshot] = []  # by recording: what Python told it
        self._same_outside: dict[int, bool] = {}  # whether it tells the same now; as far as that was asked
        self._last_spec: tuple[Any, str] = (
            None,
            "",
        )  # of a microbatch, and what it says: mostly all are alike
        self._self_changing: set[str] = set()  # attributes that modules, which stay whole, change themselves
        self._guards: list[list[tuple[Guard, Work]]] = []  # by recording, in program order
        self._places: dict[str, list[tuple[torch.nn.Module, str]]] = {}
        for module, key, fake in fakes.slots:
            self._places.setdefault(fakes.names[id(fake)], []).append((module, key))

    def look(self, program: Program) -> None:
        """See what Python tells the program now; to be called once before `find`, `trace` and `add`."""
        self._seen = self._look(program)
        self._same_outside.clear()

    def _look(self, program: Program) -> Snapshot:
        names = self._names_in(program)
        seen = {**seen_by_function(program, self.model, names), **self._modules.now(names)}
        return self._without_own(seen)

    def _without_own(self, seen: Snapshot) -> Snapshot:
        """A snapshot without what modules change themselves, but with what they leave behind.

        That is a part of it because what was recorded earlier was not asked about it.
        """
        own = self._self_changing | self._left.tensors
        rest = {where: value for where, value in seen.items() if where not in own}
        return rest | {"left behind": frozen(self._left.values)}

    def _names_in(self, program: Program) -> frozenset[str]:
        key = _name(program)
        if key not in self._names:
            reach = Reach(program, self.model)
            self._names[key] = (frozenset(reach.names), program)
            self._catches[key] = reach.catches_errors()
        return self._names[key][0]

    def key(self, microbatch: Any) -> Any:
        """What a recording depends on, apart from the numbers in tensors and what Python tells."""
        leaves, spec = pytree.tree_flatten(microbatch)
        first: dict[int, int] = {}  # one tensor given twice is another program than two tensors
        described = [(first.setdefault(id(leaf), at), describe(leaf)) for at, leaf in enumerate(leaves)]
        given = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        memory: dict[int, int] = {}
        shared = tuple(memory.setdefault(storage_of(tensor), at) for at, tensor in enumerate(given))
        kinds = tuple(
            torch.get_autocast_dtype(k) if torch.is_autocast_enabled(k) else None for k in ("cpu", "cuda")
        )
        modes = (kinds, torch.get_default_dtype(), torch.is_grad_enabled())
        if spec != self._last_spec[0]:
            self._last_spec = spec, repr(spec)
        return self._last_spec[1], tuple(described), shared, modes

    def find(self, program: Program, microbatch: Any, key: Any = None) -> int | None:
        """The recording that fits this microbatch, after `look`; with its `key`, where that is known."""
        for index in self._by_key.get(key or self.key(microbatch), ()):
            if self._tells_the_same(index) and self._guards_hold(index, tensors(microbatch)):
                return index
        return None

    def _tells_the_same(self, index: int) -> bool:
        """Whether Python tells the program what it told when this was recorded."""
        if index not in self._same_outside:
            self._same_outside[index] = self._outside[index] == self._seen
        return self._same_outside[index]

    def trace(self, program: Program, microbatch: Any) -> Graph:
        """Record the program on one microbatch, after `look`; everything is left as it was.

        The program runs twice. Raises `RecordError` where the second run differs from the first, or changes
        what a recording depends on: something that nobody can see from here would be frozen.
        """
        with python_kept(self.model), _host_random_kept(), _garbage_left():
            return self._rehearsed(program, microbatch)

    def _rehearsed(self, program: Program, microbatch: Any) -> Graph:
        self._names.pop(_name(program), None)  # its code may reach more by now than when it was last recorded
        self.look(program)
        host, states = frozen(_host_random()), [self._seen]
        attributes = self._left.now()

        def look() -> None:
            states.append(self._look(program))

        def by_others() -> contextlib.AbstractContextManager[list[str]]:
            return self._left.by_others(attributes)

        tree = first = self._run(program, microbatch, None, look, by_others)
        look()
        if first.difference is not None:
            tree = self._run(program, microbatch, first.as_first, look, by_others)
            look()
        if tree.dependence is not None:
            raise RecordError(
                "the program does something else once another kind of microbatch has changed an attribute "
                f"({tree.dependence}), and evenflow cannot carry that from one microbatch to the next: "
                "pass it in the batch, or keep it in a buffer"
            )
        changing = first.as_first.self_changed | tree.as_first.self_changed
        if frozen(_host_random()) != host:
            raise RecordError(
                "the program draws from Python's or numpy's random module, which cannot be keyed; draw with "
                "torch, or pass the number in the batch"
            )
        for before, after in itertools.pairwise(states[1:]):
            for name in changed_names(before, after, tensors=False):
                if name not in changing:
                    raise RecordError(
                        f"the program changes Python values that it also reads ({name}), so that no "
                        "two calls are the same; count outside of it, or pass the number in the batch"
                    )
        if tree is not first:
            self._check_second(first, tree, steady=not changed_names(*states[:2], tensors=False))
        else:  # what changed once and made no difference does not matter: a flag, hooks put in place
            changing &= frozenset(changed_names(*states[1:3]))
            forgotten = first.as_first.self_changed - changing
            forget_changes(first, forgotten)
            self._left.learn(forgotten, first.as_first.constants)
        graph = self._flat(tree)
        self._self_changing |= changing
        self._seen = self._without_own(self._seen)
        # What is pure was there to be compared.
        return replace(graph, pure={}, catches=self._catches[_name(program)])

    def _check_second(self, first: CallTree, second: CallTree, *, steady: bool) -> None:
        """Accept a second recording that differs from the first in what does not matter; refuse any other.

        What does not matter: what goes on inside of leaves, and, where Python's state is `steady` and a third
        run is as the second, what a cache that cannot be seen has taken over.
        """
        if same_functions(first, second):
            return
        keep_whole_alike(first, second)
        difference = find_difference(self._flat(first), self._flat(second))
        if difference and not (steady and second.difference is None):
            raise RecordError(difference)

    def observe(self, program: Program, microbatch: Any) -> tuple[Graph, dict[int, torch.Tensor]]:
        """Record with the parameters' own numbers: the graph, and what each of its values was.

        Buffers are left as they were; draws are whatever the generators give.
        """
        values: dict[int, torch.Tensor] = {}

        def keep(number: int, tensor: torch.Tensor) -> None:
            values[number] = tensor.detach().clone()

        real = RealParameters(self._fakes)
        with python_kept(self.model):
            tree = record(program, self.model, microbatch, device=self._device, fakes=real, seen=keep)
        return self._flat(tree), values

    def _run(
        self,
        program: Program,
        microbatch: Any,
        first: FirstRun | None,
        between: Callable[[], None],
        by_others: Callable[[], contextlib.AbstractContextManager[list[str]]],
    ) -> CallTree:
        return record(
            program,
            self.model,
            microbatch,
            device=self._device,
            fakes=self._fakes,
            first=first,
            between=between,
            by_others=by_others,
        )

    def _flat(self, tree: CallTree) -> Graph:
        return flatten(
            tree,
            max_share=self._leaves.max_share,
            exact=self._leaves.exact,
            opened=self._leaves.opened,
            is_atomic=lambda path: isinstance(self.model.get_submodule(path), self._leaves.atomic),
        )

    def cut_first(self, graph: Graph, positions: Sequence[int], names: Sequence[str]) -> Cut:
        """Cut the recording that decides which stage owns what.

        `names` are all parameters in the model's order; one that the program does not use goes with the one
        before it.
        """
        first = cut(graph, positions)
        stages = stages_of_parameters(first)
        before = 0
        for name in names:
            found = stages.get(name, (before,))
            before = found[0]
            if len(found) == 1:
                self.stage_of_parameter[name] = found[0]
        return first

    def cut_again(self, graph: Graph) -> Cut:
        """Cut a further recording for the owners that the first one chose."""
        model = self.entries[0]
        if [node.name for node in graph.chain] == [node.name for node in model.graph.chain]:
            return cut(graph, model.cut.positions)
        num_stages, uses = len(model.cut.sections), self._accumulators.stage_of_use
        return cut(graph, positions_for_owners(graph, self.stage_of_parameter, num_stages, uses))

    def add(self, program: Program, microbatch: Any, made: Cut, stages: Mapping[int, Stage]) -> int:
        """Keep a cut recording and make its works for these stages; returns its number."""
        serving = self._accumulators.learn(made)
        again = Again(frozenset())
        if self._recompute is not None:
            again = self._recompute(made, first=not self.entries)
        works = {
            stage.index: self._work(made, stage, partial(self._accumulators.parameter_of, serving), again)
            for stage in stages.values()
        }
        self._outside.append(self._seen)
        self._by_key.setdefault(self.key(microbatch), []).append(len(self.entries))
        self._guards.append(
            [(guard, self.glue_work(made.graph, guard.args, self._device)) for guard in made.graph.guards]
        )
        self.entries.append(Recording(made.graph, made, again, works))
        return len(self.entries) - 1

    def uncut(self, number: int, stage: Stage, accumulators: Accumulators) -> Work:
        """A recording as the only section, for a stage of its own, with accumulators of its own."""
        made = cut(self.entries[number].graph, ())
        parameter_of = partial(accumulators.parameter_of, accumulators.learn(made))
        return self._work(made, stage, parameter_of, Again(frozenset()))

    @property
    def compiles(self) -> bool:
        """Whether blocks are compiled."""
        return self._compiling is not None

    @property
    def exact(self) -> bool:
        """Whether shared parameters have an accumulator for each use."""
        return self._leaves.exact

    @property
    def first_names(self) -> Mapping[str, str]:
        """Every name of a parameter, and the first of its names."""
        return self._fakes.tied

    def _work(self, made: Cut, stage: Stage, parameter_of: ParameterOf, again: Again) -> Work:
        return Work(
            again.section(made.sections[stage.index], made.graph),
            made.graph,
            self.model,
            device=stage.device,
            streams=stage.streams,
            parameter_of=parameter_of,
            places_of=self._places.__getitem__,
            deferral=stage.deferral,
            compiling=self._compiling,
            vocabulary=self._vocabulary,
        )

    def glue_work(self, graph: Graph, wanted: Template, device: torch.device) -> Work:
        """What computes a template's values, which depend on the batch alone; `extra` is that template."""
        return Work(
            glue_section(graph, wanted.refs),
            graph,
            self.model,
            device=device,
            streams=Streams(0, device),
            parameter_of=partial(self._accumulators.parameter_of, {}),
            places_of=lambda _: [],
            extra=wanted,
        )

    def _guards_hold(self, index: int, batch: Sequence[torch.Tensor]) -> bool:
        """Whether the program would look and find the same.

        One guard after the other: what a later one computes may make sense only where the earlier ones hold.
        """
        for guard, work in self._guards[index]:
            try:
                values = glue_values(work, batch, self._device)
                with torch.no_grad():
                    args, kwargs = work.extra.fill(values, {})
                    if guard.function(*args, **kwargs) != guard.result:
                        return False
            except Exception:  # noqa: BLE001 (this batch does not even get there: recording it will tell)
                return False
        return True


def _name(program: Program) -> Any:
    """What a program goes by in a dictionary that keeps it: itself, unless it has no hash."""
    return program if getattr(program, "__hash__", None) else id(program)


def _host_random() -> tuple[Any, Any]:
    """The states of Python's and numpy's random modules."""
    return random.getstate(), np.random.get_state()


@contextlib.contextmanager
def _host_random_kept() -> Iterator[None]:
    """Put the states of Python's and numpy's random modules back."""
    python, numpy = _host_random()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def _garbage_left() -> Iterator[None]:
    """Let Python collect no garbage meanwhile: a recording makes many objects, which nearly all stay."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def glue_values(work: Work, batch: Sequence[torch.Tensor], device: torch.device) -> dict[int, Any]:
    """What a work that depends on the batch alone computes for this microbatch."""
    values: dict[int, Any] = {}
    for leaf, value in work.section.batch:
        tensor = batch[leaf].to(device)
        values[value] = tensor.clone() if value in work.section.cloned else tensor
    with torch.no_grad():
        work.run(values)
    return values


def tensors(microbatch: Any) -> list[torch.Tensor]:
    """The tensor leaves of a microbatch, in order."""
    return [leaf for leaf in pytree.tree_leaves(microbatch) if isinstance(leaf, torch.Tensor)]


def describe(leaf: Any) -> Any:
    """The part of a key that a leaf of a microbatch is: all of it, but for a tensor's numbers."""
    if isinstance(leaf, torch.Tensor):
        form = tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype, leaf.requires_grad
        return (*form, frozen(vars(leaf))) if vars(leaf) else form
    if is_plain(leaf) and not callable(leaf):
        return type(leaf).__name__, repr(leaf)
    raise ConfigError(
        f"the batch holds a {type(leaf).__name__}; a batch is a tree of tensors, numbers, strings and None "
        "(torch.as_tensor makes a tensor of an array)"
    )
