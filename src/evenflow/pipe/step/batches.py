"""Batches: what a pipeline is given, agreed on by all ranks, its microbatches recorded where they are new.

All ranks work on the first rank's batch, whoever passed one. A rank that passes none (see `Pipeline.feed`) is
sent the tensors that its own stages need; one small message tells it which recordings they fit.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from evenflow.errors import ConfigError, EvenflowError, PeerError, RecordError
from evenflow.graph.nouns.graph import Graph
from evenflow.pipe.given.reading import check_loss, check_metrics, check_trainable
from evenflow.pipe.parameters.fixed import refuse_shared_hooks
from evenflow.pipe.step.agree import Agreed, Known, Own, compare, fingerprint
from evenflow.pipe.step.parts import Parts
from evenflow.pipe.step.sharing import overlaps, refuse_changes_between
from evenflow.runtime.notes.whereabouts import patiently
from evenflow.runtime.ranks.world import World
from evenflow.runtime.recorded.microbatch import tensors
from evenflow.runtime.recorded.tracing import Program
from evenflow.runtime.recorded.weights import Shares, Weight, shares_of

_FED = object()  # what `fed` yields where the batch is on the first rank
# Recording one kind of microbatch may show that another one must be asked again; each shows less.
_MOST_ROUNDS = 8


class Batches:
    """See the module; all calls are collective."""

    def __init__(self, parts: Parts) -> None:
        self._parts, self._world = parts, parts.mesh.world

    def agree(self, program: Program, batch: Any, *, training: bool) -> Agreed:
        """The batch of this step on this rank, for a program.

        Raises `ConfigError` where the batches differ between ranks, or cannot work, and `PeerError` where
        another rank refused its own.
        """
        parts = self._parts
        with parts.precision.recording(parts.device.type):
            mine, error = self._own(program, batch)
            absent = compare(parts.mesh, mine, error)
            known = self._world.share(None if mine is None else mine.known.copied(), 0) if absent else None
            if known is None:
                assert mine is not None, "every rank has a batch"
                known = mine.known
            items = () if mine is None else mine.items
            numbers, shares = self._complete(program, known, () if absent else items, training=training)
            agreed = Agreed(_tensors_of(items, len(numbers)), numbers, shares, items)
            if absent:
                self._hand_over(agreed, absent)
        num, num_data = len(numbers), parts.mesh.data.size
        if training and num < num_data:
            raise ConfigError(
                f"the batch makes {num} microbatches, and each of {num_data} data ranks needs one: pass more "
                "rows, or make microbatches smaller (a loader's last batch: drop_last=True)"
            )
        if shares.differs is not None and self._world.is_first:
            warnings.warn(f"{shares.differs}; reduction= says how to weigh them", stacklevel=4)
        return agreed

    def graph(self, agreed: Agreed) -> Graph:
        """The recording of the batch's first microbatch, the same on every rank."""
        return self._parts.recordings.entries[agreed.recordings[0]].graph

    def _own(self, program: Program, batch: Any) -> tuple[Own | None, EvenflowError | None]:
        """The rank's own batch, if it has one; or why it cannot work, for all to hear."""
        parts, recordings = self._parts, self._parts.recordings
        try:
            parts.fixed.check()
            parts.updater.accumulators.refresh()
            if batch is _FED or batch is None:
                return None, None
            prepared = parts.splitter(batch)
            items = prepared.items
            recordings.tracing.look(program)
            first_of_each = {form: at for at, form in reversed(list(enumerate(prepared.forms)))}
            keys = {form: recordings.key(items[at]) for form, at in first_of_each.items()}
            pairs = zip(items, prepared.forms, strict=True)
            found = [recordings.find(item, keys[form]) for item, form in pairs]
            weights = [
                None if number is None else self._weigh(program, number, item)
                for number, item in zip(found, items, strict=True)
            ]
            compared = fingerprint(prepared, found) if self._world.size > 1 else (0, 0, 0)
        except EvenflowError as error:
            return None, error
        entries = recordings.entries
        may_change = any(number is None or entries[number].graph.changed_leaves for number in found)
        new = {at: items[at] for at, number in enumerate(found) if number is None}
        return Own(items, Known(found, new, weights, overlaps(items) if may_change else ()), compared), None

    def _complete(
        self, program: Program, known: Known, items: Sequence[Any], *, training: bool
    ) -> tuple[tuple[int, ...], Shares]:
        """Record and weigh the new microbatches, of which several may be of one kind.

        `items` are all microbatches, where every rank has them.
        """
        recordings = self._parts.recordings
        numbers, weights = list(known.recordings), list(known.weights)
        waiting, rounds = dict(known.new), 0
        if waiting and not items:  # a rank that was handed them has not looked yet: it had no batch
            recordings.tracing.look(program)
        while waiting:
            if rounds == _MOST_ROUNDS:
                raise RecordError(
                    f"the program does something else each time that microbatch {min(waiting)} is recorded, "
                    "after others were: what it does must follow from the batch, not from earlier calls"
                )
            for at, item in waiting.items():
                number = recordings.find(item)
                number = self._learn(program, item, training=training) if number is None else number
                numbers[at], weights[at] = number, self._weigh(program, number, item)
            # One that was known may have to be asked again, for what a new one does.
            waiting = {at: each for at, each in enumerate(items) if recordings.find(each) is None}
            rounds += 1
        complete = tuple(number for number in numbers if number is not None)
        refuse_changes_between(known.overlaps, [recordings.entries[number].graph for number in complete])
        return complete, shares_of([weight for weight in weights if weight is not None])

    def _weigh(self, program: Program, number: int, item: Any) -> Weight:
        """What a microbatch of that recording counts for in the step's loss."""
        weigher = self._parts.weigher
        return weigher.of_loss(number, item) if program is self._parts.loss else weigher.of_rows(number, item)

    def _learn(self, program: Program, microbatch: Any, *, training: bool) -> int:
        """Record a microbatch of a new kind and cut it for the owners that are."""
        recordings = self._parts.recordings
        with patiently(self._world.whereabouts, "recording a new kind of microbatch"):
            graph = recordings.tracing.trace(program, microbatch)
        if program is self._parts.loss:
            check_loss(graph)
            check_metrics(graph, self._parts.joining)
            if training:
                check_trainable(graph)
                self._parts.precision.check(graph, ())
        number = recordings.add(microbatch, recordings.cut_again(graph), self._parts.stages)
        accumulators = self._parts.updater.accumulators
        refuse_shared_hooks(accumulators.uses, accumulators.parameter)
        return number

    def _hand_over(self, agreed: Agreed, absent: Sequence[int]) -> None:
        """Send each of the ranks that passed none the tensors that its stages use, from the first rank."""
        parts, world, device = self._parts, self._world, self._parts.device
        for at, number in enumerate(agreed.recordings):
            entry, batch = parts.recordings.entries[number], agreed.batches[at]
            for rank in (rank for rank in absent if at in parts.mesh.share(len(agreed.recordings), rank)):
                stages = parts.mesh.stages_of(rank, parts.programs.placement)
                needed = {leaf: value for stage in stages for leaf, value in entry.cut.sections[stage].batch}
                for leaf, value in needed.items():
                    if world.rank == 0:
                        world.send(batch[leaf].to(device), rank)
                    elif world.rank == rank:
                        info = entry.graph.values[value].info
                        like = torch.empty_strided(info.shape, info.stride, dtype=info.dtype, device=device)
                        batch[leaf] = like.copy_(world.receive(like, 0))


def _tensors_of(items: Sequence[Any], num: int) -> tuple[dict[int, torch.Tensor], ...]:
    """The tensors of each microbatch by place; of a rank that passed none nothing yet."""
    return tuple(dict(enumerate(tensors(item))) for item in items) or tuple({} for _ in range(num))


def fed(
    world: World, loader: Iterable[Any], begin: Callable[[Iterable[Any]], Iterator[Any]]
) -> Iterator[Any]:
    """Yield the batches that `begin` makes of the loader on the first rank, elsewhere what stands for them.

    A collective call, for `step`, which sends the other ranks their share. Raises what the loader does, and
    `PeerError` on the other ranks.
    """
    if world.size == 1:
        yield from begin(loader)
        return
    iterator: Iterator[Any] | None = None
    while True:
        batch, state = _FED, "batch"
        if world.is_first:
            try:
                iterator = begin(loader) if iterator is None else iterator
                batch = next(iterator)
            except StopIteration:
                state = "end"
            except Exception as error:
                world.share(f"{type(error).__name__}: {error}", source=0)
                raise
        state = world.share(state, source=0)
        if state == "end":
            return
        if state != "batch":
            raise PeerError(f"rank 0's loader failed: {state}")
        yield batch
