"""Bad numbers: a step whose loss, or the norm of its gradients, is NaN or infinite updates nothing.

All ranks know both numbers, so that all decide alike. Such a step is run again from where it began, with the
same draws, and watched, to say where its bad numbers came from; with `find_nan` each step is watched as it
runs. In either way a step runs to its end: a rank that stopped in the middle would leave others waiting, and
no pipeline could go on.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from evenflow.errors import BadNumbersError
from evenflow.graph.nouns.graph import Graph
from evenflow.graph.nouns.tree import BatchLeaf
from evenflow.pipe.faults.bad_report import BadStep
from evenflow.pipe.faults.first_bad import BadSum, FromLeaf, Noted, Origin, first_bad
from evenflow.pipe.faults.snapshot import Snapshot
from evenflow.pipe.given.reading import read_loss
from evenflow.pipe.step.agree import Agreed
from evenflow.pipe.step.parts import Parts
from evenflow.pipe.step.result import StepResult
from evenflow.pipe.step.runs import Runs
from evenflow.runtime.program.kept import buffers_at
from evenflow.runtime.stages.finite import Count
from evenflow.runtime.stages.nan_watch import NanWatch

_LOG = logging.getLogger("evenflow")
MOST_SKIPS = 10  # in a row: then it is no single batch that is to blame


class Guard:
    """Looks at a pipeline's steps; see the module. All calls are collective."""

    def __init__(self, parts: Parts, runs: Runs) -> None:
        self._parts, self._runs = parts, runs
        self._asked = parts.updater.rules.on_bad_numbers
        self._watch = NanWatch(parts.model, self._rank_of, parts.updater.accumulators.named)
        self._num_skips = 0  # in a row
        self._changes: dict[int, _Changes] = {}  # by recording

    def _rank_of(self, stage: int) -> int:
        world = self._parts.mesh.world
        return world.rank if world.size > 1 else self._parts.programs.placement.rank_of[stage]

    def over(self, agreed: Agreed, *, share: float, step: int) -> "Guarded":
        """A step that is about to run."""
        if self._asked.watches:
            self._watch.begin()
        before = None if self._asked.policy is None else self._before(set(agreed.recordings))
        return Guarded(self._parts, self._runs, self._watch, agreed, share, step, before)

    def _before(self, recordings: set[int]) -> "_Before":
        for number in recordings - self._changes.keys():
            self._changes[number] = _Changes.of(self._parts, number)
        return _Before(self._parts.model, [self._changes[number] for number in sorted(recordings)])

    def updated(self) -> None:
        """A step went well, and updated the parameters."""
        self._num_skips = 0

    def dealt_with(self, step: "Guarded", result: StepResult, num_batches: int) -> str:
        """What is wrong with a step that was refused, in words; buffers are as they were before it.

        Raises `BadNumbersError` where that is asked for, and after too many steps in a row. `num_batches`
        have gradients since the last update.
        """
        told = step.told(result, num_batches)
        if self._asked.policy == "stop":
            raise BadNumbersError(f'{told}. Nothing was updated (bad_numbers="skip" leaves such steps out)')
        self._num_skips += 1
        if self._num_skips == MOST_SKIPS:
            self._num_skips = 0
            raise BadNumbersError(
                f"{MOST_SKIPS} steps in a row had bad numbers and were left out; the last one: {told}"
            )
        if self._parts.mesh.world.is_first:
            _LOG.warning("left out: %s", told)
        return told


@dataclass(frozen=True, slots=True)
class Guarded:
    """One step, and all that is needed to run it once more; `before` is None where nobody asks."""

    _parts: Parts
    _runs: Runs
    _watch: NanWatch
    _agreed: Agreed
    _share: float
    _step: int
    _before: "_Before | None"

    @property
    def watch(self) -> NanWatch | None:
        """What watches the step as it runs, where that is asked for."""
        return self._watch if self._parts.updater.rules.on_bad_numbers.watches else None

    def refuses(self, result: StepResult) -> bool:
        """Whether the step, or what its watch saw, is bad: the same on all ranks.

        In float16 gradients may overflow, and the loss's scale answers to that.
        """
        if self._before is None:
            return False
        return not _is_finite(result.loss, self._norm(result)) or (
            self.watch is not None and self._origin(result, self._noted(())) is not None
        )

    def told(self, result: StepResult, num_batches: int) -> str:
        """Where the step's bad numbers came from, in words; drops all gradients, puts buffers back.

        An error of the run that looks for them is told where it leaves no other process waiting.
        """
        assert self._before is not None, "somebody asked"
        norm, updater = self._norm(result), self._parts.updater
        sums = () if norm is None or math.isfinite(norm) else tuple(self._worst())
        world, watched = self._parts.mesh.world, self.watch is not None
        step = BadStep(self._step, float(result.loss), norm, num_batches, watched=watched)
        try:
            updater.clear()
            if not watched:
                self._run_again()
        except Exception as error:
            if world.size > 1:
                error.add_note(f"evenflow: rank {world.rank} looked for the bad numbers of step {self._step}")
                raise
            return step.not_found(error)
        finally:
            updater.clear()
            self._before.put_back()
        origin = self._origin(result, self._noted(sums))
        leaves: Sequence[str] = ()
        if isinstance(origin, FromLeaf) and isinstance(origin.source, BatchLeaf):  # as all ranks find
            leaves = world.share(_leaf_names(self._agreed.items) if world.rank == 0 else (), source=0)
        return step.told(origin, self._graph, leaves)

    def _run_again(self) -> None:
        """Run the step as it was, and watch it."""
        assert self._before is not None, "somebody asked"
        self._before.put_back()
        self._watch.begin()
        training = self._parts.programs.training
        self._runs.run(
            *(self._agreed, training, read_loss), step=self._step, share=self._share, watch=self._watch
        )

    def _norm(self, result: StepResult) -> float | None:
        if result.grad_norm is None or self._parts.updater.rules.loss_scale is not None:
            return None
        return float(result.grad_norm)

    def _noted(self, sums: Sequence[BadSum]) -> list[Noted]:
        """What the watches of all processes have noted."""
        world, overflows = self._parts.mesh.world, self._parts.updater.rules.loss_scale is not None
        gradients = () if overflows else tuple(self._watch.gradients)
        mine = Noted(tuple(self._watch.calls), gradients, sums)
        if not any(row[0] for row in world.gather_numbers([bool(mine.calls or gradients or sums)])):
            return []
        return world.gather(mine)

    def _origin(self, result: StepResult, noted: Sequence[Noted]) -> Origin | None:
        bad_loss = not _is_finite(result.loss)
        return first_bad(noted, self._graph, loss=bad_loss, anywhere=self.watch is not None)

    def _graph(self, microbatch: int) -> Graph:
        return self._parts.recordings.entries[self._agreed.recordings[microbatch]].graph

    def _worst(self) -> list[BadSum]:
        """Of the gradients that this process answers for the one that is worst."""
        updater = self._parts.updater
        found = [
            BadSum(name, Count.of([parameter.grad]))
            for name, parameter in updater.parameters
            if parameter.grad is not None and updater.answers(name, parameter)
        ]
        return sorted(found, key=lambda each: each.badness)[-1:]


@dataclass(frozen=True, slots=True)
class _Changes:
    """What this process's part of a recording changes: buffers, and whether modules' own state, too."""

    buffers: tuple[str, ...]
    constants: tuple[torch.Tensor, ...]  # tensors of Python's own
    state: bool

    @staticmethod
    def of(parts: Parts, recording: int) -> "_Changes":
        entry = parts.recordings.entries[recording]
        nodes = [node for stage in parts.stages for node in entry.cut.sections[stage].nodes]
        names, constants = {name for node in nodes for name in node.changed_buffers}, entry.graph.constants
        return _Changes(
            tuple(names - constants.keys()),
            tuple(constants[name] for name in names & constants.keys()),
            any(node.stateful for node in nodes),
        )


class _Before:
    """What a step's forwards change on this process, as it was before."""

    def __init__(self, model: torch.nn.Module, changes: Sequence[_Changes]) -> None:
        keeps_state = any(each.state for each in changes)
        self._state = Snapshot(model, (), batch=(), devices=()) if keeps_state else None
        held = [tensor for each in changes for tensor in each.constants]
        held += buffers_at(model, dict.fromkeys(name for each in changes for name in each.buffers))
        self._tensors = [(tensor, tensor.detach().clone()) for tensor in held]

    @torch.no_grad()
    def put_back(self) -> None:
        """Give it its numbers back."""
        if self._state is not None:
            self._state.put_back()
        for tensor, copy in self._tensors:
            if not torch.equal(tensor, copy):
                tensor.detach().copy_(copy)


def _is_finite(*numbers: Any) -> bool:  # tensors of one number, numbers, or None
    return all(math.isfinite(float(each)) for each in numbers if each is not None)


def _leaf_names(items: Sequence[Any]) -> list[str]:
    """What the batch's tensors are called."""
    paths, _ = pytree.tree_flatten_with_path(items[0])
    return [pytree.keystr(path) or "itself" for path, leaf in paths if isinstance(leaf, torch.Tensor)]
