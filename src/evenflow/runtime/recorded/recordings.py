"""Recordings: one per kind of microbatch, found again by key and guards, each cut for the same owners.

A recording holds for one key: the tree, shapes, strides and types of the microbatch, its plain values, each
module's training flag, whether gradients are computed, autocast. Where the program looked at numbers of the
batch (`if mask.all():`), a *guard* is computed from each microbatch, and another answer means another
recording.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from evenflow.errors import ConfigError
from evenflow.graph.cutting.cut import Cut, cut
from evenflow.graph.cutting.positions import positions_for_owners
from evenflow.graph.cutting.recomputable import Again
from evenflow.graph.kernels.fakes import storage_of
from evenflow.graph.nouns.graph import Graph, Guard
from evenflow.graph.nouns.template import is_plain
from evenflow.graph.python.outside import Snapshot, frozen
from evenflow.runtime.program.call import ParameterOf
from evenflow.runtime.program.compiled import Compiling
from evenflow.runtime.program.glue import Glue
from evenflow.runtime.program.vocabulary_loss import Vocabulary
from evenflow.runtime.program.work import Work
from evenflow.runtime.recorded.microbatch import tensors
from evenflow.runtime.recorded.parameters import Accumulators, stages_of_parameters
from evenflow.runtime.recorded.tracing import Tracing
from evenflow.runtime.stages.stage import Stage


@dataclass(frozen=True, slots=True)
class Recording:
    """A graph, its cut, what its stages recompute, and the works of this process's stages.

    It holds where Python tells the program what it `told` then, and its `guards`, which stand in program
    order, find what they found.
    """

    graph: Graph
    cut: Cut
    again: Again
    works: Mapping[int, Work]
    told: Snapshot
    guards: Sequence[tuple[Guard, Glue]]


class Recordings:
    """All recordings of one model in one process. Learning happens in the same order on every rank."""

    def __init__(
        self,
        tracing: Tracing,
        *,
        accumulators: Accumulators,
        compiling: Compiling | None = None,
        vocabulary: Vocabulary | None = None,
        recompute: Callable[..., Again] | None = None,  # of (cut, first=): what its stages recompute
    ) -> None:
        self.entries: list[Recording] = []
        self.stage_of_parameter: dict[str, int] = {}
        self.tracing, self.model = tracing, tracing.model
        self._accumulators, self._compiling, self._vocabulary = accumulators, compiling, vocabulary
        self._recompute = recompute
        self._by_key: dict[Any, list[int]] = {}
        # A snapshot, and by recording whether it was told the same; as far as that was asked.
        self._compared: tuple[Snapshot, dict[int, bool]] = ({}, {})
        # Of a microbatch, and what it says: mostly all are alike.
        self._last_spec: tuple[Any, str] = (None, "")
        self._places: dict[str, list[tuple[torch.nn.Module, str]]] = {}
        for module, key, fake in tracing.fakes.slots:
            self._places.setdefault(tracing.fakes.names[id(fake)], []).append((module, key))

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

    def find(self, microbatch: Any, key: Any = None) -> int | None:
        """The recording of the program that was looked at last which fits this microbatch, if one does.

        With its `key`, where that is known.
        """
        for index in self._by_key.get(key or self.key(microbatch), ()):
            if self._tells_the_same(index) and self._guards_hold(index, tensors(microbatch)):
                return index
        return None

    def _tells_the_same(self, index: int) -> bool:
        """Whether Python tells the program what it told when this was recorded."""
        seen = self.tracing.seen
        if self._compared[0] is not seen:
            self._compared = seen, {}
        found = self._compared[1]
        if index not in found:
            found[index] = self.entries[index].told == seen
        return found[index]

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

    def add(self, microbatch: Any, made: Cut, stages: Mapping[int, Stage]) -> int:
        """Keep a recording that was just traced and cut, with its works for these stages; its number."""
        serving = self._accumulators.learn(made)
        again = Again(frozenset())
        if self._recompute is not None:
            again = self._recompute(made, first=not self.entries)
        works = {
            stage.index: self._work(made, stage, partial(self._accumulators.parameter_of, serving), again)
            for stage in stages.values()
        }
        guards = [
            (guard, Glue(made.graph, self.model, guard.args, self.tracing.device))
            for guard in made.graph.guards
        ]
        number = len(self.entries)
        self._by_key.setdefault(self.key(microbatch), []).append(number)
        self.entries.append(Recording(made.graph, made, again, works, self.tracing.seen, guards))
        return number

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
        return self.tracing.leaves.exact

    @property
    def first_names(self) -> Mapping[str, str]:
        """Every name of a parameter, and the first of its names."""
        return self.tracing.fakes.tied

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

    def _guards_hold(self, index: int, batch: Sequence[torch.Tensor]) -> bool:
        """Whether the program would look and find the same.

        One guard after the other: what a later one computes may make sense only where the earlier ones hold.
        """
        for guard, glue in self.entries[index].guards:
            try:
                with torch.no_grad():
                    args, kwargs = glue.filled(batch)
                    if guard.function(*args, **kwargs) != guard.result:
                        return False
            except Exception:  # noqa: BLE001 (this batch does not even get there: recording it will tell)
                return False
        return True


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
