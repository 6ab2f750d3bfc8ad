"""Recordings: one per kind of microbatch, found again by key and guards, each cut for the same owners.

A recording holds for one key: the tree, shapes, strides and types of the microbatch, its plain values, each
module's training flag, whether gradients are computed, autocast. Where the program looked at numbers of the
batch (`if mask.all():`), a *guard* is computed from each microbatch, and another answer means another
recording.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from evenflow.errors import ConfigError, RecordError
from evenflow.graph.cut import Cut, cut, glue_section, positions_for_owners
from evenflow.graph.fakes import FakeParameters
from evenflow.graph.graph import Graph, Guard
from evenflow.graph.leaves import flatten
from evenflow.graph.outside import around_function, around_modules
from evenflow.graph.record import record
from evenflow.graph.template import is_plain
from evenflow.runtime.parameters import Accumulators, stages_of_parameters
from evenflow.runtime.rng import Streams
from evenflow.runtime.stage import Stage
from evenflow.runtime.work import Work

Program = Callable[[Any, Any], Any]  # (model, microbatch) -> what the user's function returns


@dataclass(frozen=True, slots=True)
class Recording:
    """A graph, its cut, and the works of this process's stages."""

    graph: Graph
    cut: Cut
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
    ) -> None:
        self.entries: list[Recording] = []
        self.stage_of_parameter: dict[str, int] = {}
        self.model = model
        self._fakes, self._device, self._leaves = fakes, device, leaves
        self._accumulators = accumulators
        self._by_key: dict[Any, list[int]] = {}
        self._states: list[Any] = []  # by recording: what the modules that were taken apart were made of
        self._guards: list[list[tuple[Guard, Work]]] = []  # by recording, in program order
        self._places: dict[str, list[tuple[torch.nn.Module, str]]] = {}
        for module, key, fake in fakes.slots:
            self._places.setdefault(fakes.names[id(fake)], []).append((module, key))

    def key(self, program: Program, microbatch: Any) -> Any:
        """What a recording depends on, apart from the numbers in tensors."""
        leaves, spec = pytree.tree_flatten(microbatch)
        first: dict[int, int] = {}  # one tensor given twice is another program than two tensors
        described = [(first.setdefault(id(leaf), at), describe(leaf)) for at, leaf in enumerate(leaves)]
        training = tuple(module.training for module in self.model.modules())
        kinds = tuple(
            torch.get_autocast_dtype(k) if torch.is_autocast_enabled(k) else None for k in ("cpu", "cuda")
        )
        grad = torch.is_grad_enabled()  # evaluation leaves no graph to train with
        return around_function(program), repr(spec), tuple(described), training, grad, kinds

    def find(self, program: Program, microbatch: Any) -> int | None:
        """The recording that fits this microbatch."""
        for index in self._by_key.get(self.key(program, microbatch), ()):
            unchanged = self._states[index] == self._state(self.entries[index].graph)
            if unchanged and self._guards_hold(index, tensors(microbatch)):
                return index
        return None

    def trace(self, program: Program, microbatch: Any) -> Graph:
        """Record the program on one microbatch.

        Raises `RecordError` where the run changes what the recording depends on: the next would differ.
        """
        before, host = around_function(program), (random.getstate(), np.random.get_state())
        tree = record(program, self.model, microbatch, device=self._device, fakes=self._fakes)
        if around_function(program) != before:
            raise RecordError(
                "the loss function changes Python values that it also reads (a counter, a list), "
                "so that no two calls are the same; count outside of it, or pass the number in the batch"
            )
        if random.getstate() != host[0] or repr(np.random.get_state()) != repr(host[1]):
            random.setstate(host[0])
            np.random.set_state(host[1])
            raise RecordError(
                "the program draws from Python's or numpy's random module, which cannot be keyed; draw with "
                "torch, or pass the number in the batch"
            )
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
        return cut(graph, positions_for_owners(graph, self.stage_of_parameter, len(model.cut.sections)))

    def add(self, program: Program, microbatch: Any, made: Cut, stages: Mapping[int, Stage]) -> int:
        """Keep a cut recording and make its works for these stages; returns its number."""
        serving = self._accumulators.learn(made)
        works = {
            stage.index: Work(
                made.sections[stage.index],
                made.graph,
                self.model,
                device=stage.device,
                streams=stage.streams,
                parameter_of=partial(self._accumulators.parameter_of, serving),
                places_of=self._places.__getitem__,
            )
            for stage in stages.values()
        }
        self._states.append(self._state(made.graph))
        self._by_key.setdefault(self.key(program, microbatch), []).append(len(self.entries))
        self._guards.append(
            [
                (guard, self.glue_work(made.graph, guard.args.refs, self._device))
                for guard in made.graph.guards
            ]
        )
        self.entries.append(Recording(made.graph, made, works))
        return len(self.entries) - 1

    def _state(self, graph: Graph) -> Any:
        return around_modules(self.model.get_submodule(path) for path in graph.apart)

    def glue_work(self, graph: Graph, values: Sequence[int], device: torch.device) -> Work:
        """What computes these values, which depend on the batch alone."""
        return Work(
            glue_section(graph, values),
            graph,
            self.model,
            device=device,
            streams=Streams(0, device),
            parameter_of=partial(self._accumulators.parameter_of, {}),
            places_of=lambda _: [],
            keep=values,
        )

    def _guards_hold(self, index: int, batch: Sequence[torch.Tensor]) -> bool:
        """Whether the program would look and find the same.

        One guard after the other: what a later one computes may make sense only where the earlier ones hold.
        """
        for guard, work in self._guards[index]:
            values = glue_values(work, batch, self._device)
            with torch.no_grad():
                args, kwargs = guard.args.fill(values, {})
                if guard.function(*args, **kwargs) != guard.result:
                    return False
        return True


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
        return tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype, leaf.requires_grad
    if is_plain(leaf) and not isinstance(leaf, torch.nn.Module):
        return type(leaf).__name__, repr(leaf)
    raise ConfigError(
        f"the batch holds a {type(leaf).__name__}; a batch is a tree of tensors, numbers, strings and None "
        "(torch.as_tensor makes a tensor of an array)"
    )
