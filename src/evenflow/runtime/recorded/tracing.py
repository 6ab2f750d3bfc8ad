"""Tracing: a program recorded on one microbatch, and everything left as it was.

The program runs twice. Where the second run differs from the first, or changes what the program reads,
something that nobody can see from here would be frozen: it is refused by name.
"""

import contextlib
import gc
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from evenflow.errors import RecordError
from evenflow.graph.kernels.fakes import FakeParameters, RealParameters
from evenflow.graph.leaves.compare import find_difference, forget_changes, keep_whole_alike, same_functions
from evenflow.graph.leaves.leaves import flatten
from evenflow.graph.nouns.graph import Graph
from evenflow.graph.nouns.tree import CallTree
from evenflow.graph.python.left_behind import LeftBehind
from evenflow.graph.python.modules import python_kept
from evenflow.graph.python.outside import Snapshot, changed_names, frozen, seen_by_function
from evenflow.graph.python.reach import Reach
from evenflow.graph.python.seen_modules import SeenModules
from evenflow.graph.recording.record import record

Program = Callable[[Any, Any], Any]  # (model, microbatch) -> what the user's function returns


@dataclass(frozen=True, slots=True)
class Leaves:
    """How a recorded program is taken apart: see `graph.leaves.leaves.flatten`."""

    max_share: float
    exact: bool
    opened: tuple[str, ...]
    atomic: tuple[type[torch.nn.Module], ...]


class Tracing:
    """Records the programs of one model. `seen`: what Python told the program that was looked at last."""

    def __init__(
        self, model: torch.nn.Module, fakes: FakeParameters, *, device: torch.device, leaves: Leaves
    ) -> None:
        self.model, self.fakes, self.device, self.leaves = model, fakes, device, leaves
        self.seen: Snapshot = {}
        # By program: the names in its code, and itself, so that its id is not used again.
        self._names: dict[Any, tuple[frozenset[str], Program]] = {}
        self._catches: dict[Any, bool] = {}  # by program too: whether its code catches errors
        self._left, self._modules = LeftBehind(model), SeenModules(model)
        self._self_changing: set[str] = set()  # attributes that modules, which stay whole, change themselves

    def look(self, program: Program) -> None:
        """See what Python tells the program now."""
        self.seen = self._look(program)

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

    def trace(self, program: Program, microbatch: Any) -> Graph:
        """Record the program on one microbatch; `seen` is then what it was told meanwhile.

        Raises `RecordError` where the second run differs from the first, or changes what a recording depends
        on.
        """
        with python_kept(self.model), _host_random_kept(), _garbage_left():
            return self._rehearsed(program, microbatch)

    def _rehearsed(self, program: Program, microbatch: Any) -> Graph:
        self._names.pop(_name(program), None)  # its code may reach more by now than when it was last recorded
        self.look(program)
        host, states = frozen(_host_random()), [self.seen]
        attributes = self._left.now()

        def look() -> None:
            states.append(self._look(program))

        def by_others() -> contextlib.AbstractContextManager[list[str]]:
            return self._left.by_others(attributes)

        run = partial(record, program, self.model, microbatch, device=self.device, fakes=self.fakes)
        tree = first = run(between=look, by_others=by_others)
        look()
        if first.difference is not None:
            tree = run(first=first.as_first, between=look, by_others=by_others)
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
        self.seen = self._without_own(self.seen)
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

        real = RealParameters(self.fakes)
        with python_kept(self.model):
            tree = record(program, self.model, microbatch, device=self.device, fakes=real, seen=keep)
        return self._flat(tree), values

    def _flat(self, tree: CallTree) -> Graph:
        return flatten(
            tree,
            max_share=self.leaves.max_share,
            exact=self.leaves.exact,
            opened=self.leaves.opened,
            is_atomic=lambda path: isinstance(self.model.get_submodule(path), self.leaves.atomic),
        )


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
