"""Watching for bad numbers: which node's call made NaNs or infinities, forward or backward.

Forward, a watched work tells of each node what it took and made. Backward, a hook on each of autograd's
functions that a node's call has left sees what came to it and what it hands on. Nothing of a step's numbers
is changed by that; but no gradient of a weight is put off, so that all of a microbatch's backward is in one
graph.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from evenflow.graph.nouns.graph import Graph, Node
from evenflow.graph.nouns.tree import BatchLeaf, BufferSource, ParameterSource, Source
from evenflow.runtime.program.kept import buffers_at
from evenflow.runtime.program.weight_grads import is_leaf
from evenflow.runtime.program.work import Work
from evenflow.runtime.stages.executor import Job
from evenflow.runtime.stages.finite import Count, is_finite

_MARK = "evenflow_watched"  # on autograd's functions
_UNSET = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
_MOST_STEPS = 4  # from where a weight is used to the weight


@dataclass(frozen=True, slots=True)
class Place:
    """Where a node was called. `rank` counts all processes of the run, or the ranks that one process has."""

    microbatch: int
    node: int
    stage: int
    rank: int


@dataclass(frozen=True, slots=True)
class BadCall:
    """A call that made bad numbers in the forward: `made`, by value, those that are.

    `took` counts the numbers that it was given by other nodes. `leaves` are the parameters, buffers and
    tensors of the batch that it uses and that hold bad numbers. `inside` is the first function that made some
    inside of a module that stays whole.
    """

    place: Place
    made: Mapping[int, Count]
    took: Count
    leaves: tuple[tuple[Source, Count], ...]
    inside: str | None


@dataclass(frozen=True, slots=True)
class BadGradient:
    """One of autograd's functions that made bad gradients of finite ones.

    `parameter` is the one whose gradient is bad, where it hands gradients to parameters.
    """

    place: Place
    function: str
    made: Count
    came: Count
    parameter: str | None


class NanWatch:
    """Notes of one process's stages what is bad. `named` are its parameters, and what stands for them.

    >>> watch = NanWatch(torch.nn.Linear(1, 1), lambda stage: stage, lambda: ())
    >>> watch.begin()
    >>> watch.calls, watch.gradients
    ([], [])
    """

    def __init__(
        self,
        model: torch.nn.Module,
        rank_of: Callable[[int], int],
        named: Callable[[], Iterable[tuple[str, torch.nn.Parameter]]],
    ) -> None:
        self._model, self._rank_of, self._named = model, rank_of, named
        self._works: dict[tuple[int, int, int], Work] = {}  # by recording, stage and microbatch
        self._parameters: dict[str, torch.nn.Parameter] = {}
        self._names: dict[int, str] = {}  # of parameters, by id
        self._told: set[tuple[int, int, int]] = set()  # a checkpoint's nodes run twice
        self._inside: str | None = None
        self.calls: list[BadCall] = []
        self.gradients: list[BadGradient] = []

    def begin(self) -> None:
        """A step begins: forget the one before."""
        named = list(self._named())
        self._parameters = dict(reversed(named))  # the parameter itself, and not what stands for it
        self._names = {id(parameter): name for name, parameter in named}
        self._told.clear()
        self.calls.clear()
        self.gradients.clear()

    def jobs(self, jobs: Sequence[Job]) -> list[Job]:
        """The same microbatches, watched, but for those that weigh nothing: they may be without numbers."""
        return [replace(job, works=self._watched(job)) if job.weight else job for job in jobs]

    def _watched(self, job: Job) -> dict[int, Work]:
        return {stage: self._work(job, stage, work) for stage, work in job.works.items()}

    def _work(self, job: Job, stage: int, work: Work) -> Work:
        key = job.recording, stage, job.number
        if key not in self._works:
            tell = partial(self._tell, job.number, stage, job.cut.graph)
            self._works[key] = work.watched(tell, inside=self._looking_inside)
        return self._works[key]

    # -- forward

    def _tell(self, microbatch: int, stage: int, graph: Graph, node: Node, values: Mapping[int, Any]) -> None:
        inside, self._inside = self._inside, None
        if (microbatch, stage, node.index) in self._told:
            return
        self._told.add((microbatch, stage, node.index))
        place = Place(microbatch, node.index, stage, self._rank_of(stage))
        made = {v: values[v] for v in node.makes if isinstance(values.get(v), torch.Tensor)}
        with torch.no_grad():
            bad = {v: Count.of([tensor]) for v, tensor in made.items() if not is_finite(tensor)}
            if bad:
                changed = {old for old, _ in node.rebinds}  # it has other numbers by now
                took = [v for v in node.inputs if v in values and v not in changed]
                count = Count.of(values[v] for v in took if isinstance(values[v], torch.Tensor))
                leaves = tuple(self._bad_leaves(graph, node, values))
                self.calls.append(BadCall(place, bad, count, leaves, inside))
        if torch.is_grad_enabled():
            self._hook(place, [tensor.grad_fn for tensor in made.values()])

    def _bad_leaves(
        self, graph: Graph, node: Node, values: Mapping[int, Any]
    ) -> Iterator[tuple[Source, Count]]:
        found: list[tuple[Source, torch.Tensor]] = [
            (ParameterSource(name), self._parameters[name])
            for name in node.parameters
            if name in self._parameters
        ]
        for name in node.buffers:
            held = graph.constants.get(name)
            there = buffers_at(self._model, [name]) if held is None else [held]
            found += [(BufferSource(name), each) for each in there if isinstance(each, torch.Tensor)]
        for value in node.inputs:
            source = graph.values[value].source
            if isinstance(source, BatchLeaf) and isinstance(values.get(value), torch.Tensor):
                found.append((source, values[value]))
        for source, tensor in found:
            if not is_finite(tensor):
                yield source, Count.of([tensor])

    def _looking_inside(self) -> AbstractContextManager[object]:
        self._inside = None
        return _Inside(self._note_inside)

    def _note_inside(self, name: str) -> None:
        if self._inside is None:
            self._inside = name

    # -- backward

    def _hook(self, place: Place, roots: Iterable[Any]) -> None:
        """See what goes through autograd's functions that lead from `roots` to those of earlier nodes."""
        waiting = [function for function in roots if function is not None]
        while waiting:
            function = waiting.pop()
            if _MARK in function.metadata or is_leaf(function):
                continue
            function.metadata[_MARK] = True
            nexts = [each for each, _ in function.next_functions]
            names = [self._name_of(each) for each in nexts]
            function.register_hook(partial(self._passed, place, function.name(), names))
            waiting += [each for each in nexts if each is not None]

    def _name_of(self, function: Any) -> str | None:  # one of autograd's functions
        """The parameter that gradients of this function become, perhaps transposed or cast on the way."""
        for _ in range(_MOST_STEPS):
            if function is None:
                return None
            if is_leaf(function):
                return self._names.get(id(function.variable))
            nexts = [each for each, _ in function.next_functions]
            function = nexts[0] if len(nexts) == 1 else None
        return None

    def _passed(self, place: Place, function: str, names: Sequence[str | None], made: Any, came: Any) -> None:
        """A hook of one of autograd's functions: `made` and `came` are gradients, or None."""
        gradients = [each if isinstance(each, torch.Tensor) else None for each in made]
        bad = [at for at, each in enumerate(gradients) if each is not None and not is_finite(each)]
        given = [each for each in came if isinstance(each, torch.Tensor)]
        if not bad or not all(is_finite(each) for each in given):
            return
        count = Count.of(each for at in bad if (each := gradients[at]) is not None)
        named = [names[at] for at in bad if at < len(names)]
        parameter = named[0] if named else None
        self.gradients.append(BadGradient(place, function, count, Count.of(given), parameter))


class _Inside(TorchFunctionMode):
    """Notes the first of torch's functions that makes bad numbers of others."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = pytree.tree_leaves((args, kwargs or {}))
        given = _bad_of(leaves)  # before the call, which may change them
        result = func(*args, **(kwargs or {}))
        made = _bad_of(pytree.tree_leaves(result))
        if not leaves_unset(func) and begins(made, given, infinite=any(map(is_infinite, leaves))):
            self._note(getattr(func, "__name__", repr(func)))
        return result


def _bad_of(leaves: Iterable[object]) -> Count:
    """The count of those tensors that hold bad numbers."""
    return Count.of(each for each in leaves if isinstance(each, torch.Tensor) and not is_finite(each))


def begins(made: Count, took: Count, *, infinite: bool) -> bool:
    """Whether bad numbers begin where `made` comes from `took`; `infinite`: an infinity was asked for.

    >>> nan, inf, good = Count(1, num_nan=1), Count(1, num_inf=1), Count(1)
    >>> begins(nan, good, infinite=False), begins(nan, inf, infinite=False), begins(nan, nan, infinite=False)
    (True, True, False)
    >>> begins(inf, good, infinite=False), begins(inf, good, infinite=True), begins(inf, inf, infinite=False)
    (True, False, False)
    """
    if made.num_nan:
        return not took.num_nan
    return bool(made.num_inf) and not took.num_bad and not infinite


def leaves_unset(function: Callable[..., Any]) -> bool:
    """Whether what a function returns is memory that nobody has written yet: any numbers may be in it.

    >>> leaves_unset(torch.empty_like), leaves_unset(torch.Tensor.new_empty), leaves_unset(torch.zeros)
    (True, True, False)
    """
    return getattr(function, "__name__", "") in _UNSET


def is_infinite(leaf: object) -> bool:
    """Whether an argument is an infinity: what masks are filled with."""
    return isinstance(leaf, float) and leaf in (float("inf"), float("-inf"))
