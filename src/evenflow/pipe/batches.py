"""Batches: what a pipeline is given, agreed on by all ranks, its microbatches recorded where they are new."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from evenflow.errors import ConfigError
from evenflow.graph.graph import Graph
from evenflow.pipe.agree import FED, Agreed, Prepared, agree
from evenflow.pipe.fixed import refuse_shared_hooks
from evenflow.pipe.parts import Parts
from evenflow.pipe.reading import check_loss, check_metrics, check_trainable
from evenflow.runtime.tracing import Program
from evenflow.runtime.whereabouts import patiently


class Batches:
    """See the module; all calls are collective."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def agree(self, program: Program, batch: Any, *, training: bool) -> Agreed:
        """Agree on a batch for a program; raises `ConfigError` and `PeerError` as `agree` does."""
        return self.agree_on(program, lambda: self.prepared(batch), training=training)

    def agree_on(self, program: Program, prepare: Callable[[], Prepared | None], *, training: bool) -> Agreed:
        """As `agree`, of a batch that is prepared in another way."""
        parts = self._parts
        weigher = parts.weigher
        with parts.precision.recording(self._parts.device.type):
            agreed = agree(
                parts.mesh,
                parts.recordings,
                program,
                prepare=prepare,
                learn=partial(self._learn, program, training),
                weigh=weigher.of_loss if program is parts.loss else weigher.of_rows,
                device=self._parts.device,
                placement=parts.programs.placement,
            )
        num, num_data = len(agreed.recordings), parts.mesh.data.size
        if training and num < num_data:
            raise ConfigError(
                f"the batch makes {num} microbatches, and each of {num_data} data ranks needs one: pass more "
                "rows, or make microbatches smaller (a loader's last batch: drop_last=True)"
            )
        if agreed.shares.differs is not None and parts.mesh.world.is_first:
            warnings.warn(f"{agreed.shares.differs}; reduction= says how to weigh them", stacklevel=5)
        return agreed

    def prepared(self, batch: Any) -> Prepared | None:
        """This rank's own batch in microbatches; None where it has none."""
        self._parts.fixed.check()
        self._parts.updater.accumulators.refresh()
        return None if batch is FED or batch is None else self._parts.splitter(batch)

    def graph(self, agreed: Agreed) -> Graph:
        """The recording of the batch's first microbatch, the same on every rank."""
        return self._parts.recordings.entries[agreed.recordings[0]].graph

    def _learn(self, program: Program, training: bool, microbatch: Any) -> int:
        """Record a microbatch of a new kind and cut it for the owners that are."""
        recordings = self._parts.recordings
        with patiently(self._parts.mesh.world.whereabouts, "recording a new kind of microbatch"):
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
