"""The executor: one rank's share of a proven program, op by op.

It is one `match` over ops with one span around each. It knows the order and nothing else: stages compute,
links carry, `InFlight` holds what is between.

    Recv      link -> in flight
    Forward   in flight -> stage -> in flight, and on the last stage the loss
    Send      in flight -> link
    Backward  in flight -> stage -> in flight; or its parts, InputGrad and WeightGrad
    Handoff   in flight -> in flight, of two stages that this rank has
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

import torch
from torch.utils import _pytree as pytree

from evenflow.errors import EvenflowError, RecordError
from evenflow.graph.cutting.cut import Cut
from evenflow.graph.nouns.tree import TensorInfo
from evenflow.ir.op import (
    Backward,
    ComputeOp,
    Exchange,
    Forward,
    Handoff,
    InputGrad,
    Op,
    Overlap,
    Payload,
    Recv,
    ReduceGrads,
    Send,
    SimpleOp,
    Unshard,
    WeightGrad,
    parts,
)
from evenflow.runtime.links.link import Link, Manifest, Parcel
from evenflow.runtime.notes.clocks import HostClock, clock_of
from evenflow.runtime.notes.log import Log
from evenflow.runtime.notes.no_memory import is_out_of_memory
from evenflow.runtime.notes.script import Key, Line, Script
from evenflow.runtime.program.work import Work
from evenflow.runtime.ranks.data_ranks import DataRanks
from evenflow.runtime.stages.inflight import InFlight
from evenflow.runtime.stages.narrowing import Narrowing
from evenflow.runtime.stages.stage import Stage
from evenflow.validate import ProvenProgram


@dataclass(frozen=True, slots=True)
class Job:
    """One microbatch of a step. `number` is its place in the whole batch, of all data ranks: it names draws.

    `batch` holds the tensor leaves that this rank needs, by place; `works` those of this rank's stages;
    `weight` is the gradient of the step's loss with respect to this microbatch's.
    """

    batch: Mapping[int, torch.Tensor]
    recording: int
    cut: Cut
    works: Mapping[int, Work]
    weight: float
    number: int


@dataclass(frozen=True, slots=True)
class Result:
    """What the program returned for one microbatch, on the last stage; the loss without its graph.

    `number` is the microbatch's place in the whole batch, of all data ranks.
    """

    loss: torch.Tensor | None
    rest: Any  # metrics, or what `predict` computes: any tree
    number: int


# Splits what the program returned into (loss or None, the rest).
Reading = Callable[[Any], tuple[torch.Tensor | None, Any]]


class Executor:
    """Runs one rank's ops. `results` fills up with the microbatches' outputs where the last stage runs.

    `script` is that of the rank's ops, in the program or in the proof's order; `manifests` holds those of
    earlier steps; `data` is what the replicas of its stages do together.
    """

    def __init__(
        self,
        proven: ProvenProgram,
        rank: int,
        *,
        script: Script,
        stages: Mapping[int, Stage],
        devices: Sequence[torch.device],
        jobs: Sequence[Job],
        link: Link,
        step: int,
        reading: Reading,
        manifests: dict[tuple[Any, ...], Manifest],
        narrowing: Narrowing,
        data: DataRanks,
    ) -> None:
        self.proven, self.script = proven, script
        self.rank, self.step = rank, step
        self.stages, self.devices, self.jobs = stages, devices, jobs
        self.link, self.reading = link, reading
        self.results: dict[int, Result] = {}
        own = next(iter(stages), None)
        clock = HostClock() if own is None else clock_of(devices[own])
        self._mark = clock.mark
        self.log = Log(rank, script.lines, clock)
        self._lines = iter(script.lines)
        self._flights: dict[Key, InFlight] = {}
        self._manifests, self._narrowing, self._data = manifests, narrowing, data
        self._fetches = any(stage.offload is not None for stage in stages.values())
        link.start([(op, self._manifest(op)) for op in script.receives])

    def run(self) -> None:
        """Run the rank's whole program."""
        for line in self._lines:
            self._execute(line)
        self.log.position[0] = len(self.log.marks)
        self.finish()

    def run_next(self) -> None:
        """Run the next op."""
        self._execute(next(self._lines))

    def finish(self) -> None:
        """Wait until everything sent has left; by then nothing is in flight."""
        self.link.finish()
        assert not self._flights, f"still in flight after the step: {sorted(self._flights)}"

    @property
    def in_flight(self) -> Collection[Key]:
        """The (stage, microbatch) pairs that are between their first arrival and their last departure."""
        return self._flights.keys()

    def parcels(self) -> Iterator[torch.Tensor | None]:
        """What has arrived and is not used, or made and not sent."""
        for flight in self._flights.values():
            for group in (flight.activations, flight.gradients, flight.made):
                for parcel in group.values():
                    yield from parcel
            yield from flight.owed.values()

    def drop(self) -> None:
        """Let go of all that is in flight: the step is given up."""
        self._flights.clear()
        self.results.clear()

    def _execute(self, line: Line) -> None:
        """Run one op and note when."""
        try:
            log = self.log
            log.position[0] = len(log.marks)
            start = began = self._mark()
            if self._fetches:
                self._fetch(line.op)
            for arrival in line.takes:  # waiting for what it needs is no part of a computation
                log.awaited = arrival
                parcel = self.link.take(arrival)
                log.awaited = None
                self._arrive(arrival, parcel)
                start = self._mark()
            self._dispatch(line.op)
            log.marks.append((began, start, self._mark()))
        except EvenflowError:
            raise
        except Exception as error:
            error.add_note(f"evenflow: rank {self.rank} failed in {line.op}, step {self.step}")
            raise
        for key in line.ends:
            self._flights.pop(key, None)
        if log.gauge is not None:
            log.held_bytes.append(log.gauge())

    def _fetch(self, op: Op) -> None:
        """Bring back what a backward takes, while it waits for its gradients."""
        for part in parts(op) if isinstance(op, ComputeOp) else ():
            flight = self._flights.get((part.stage, part.microbatch))
            gives = flight is not None and flight.work.gives
            if flight is not None and (isinstance(part, Backward) or (isinstance(part, InputGrad) and gives)):
                self.stages[part.stage].fetch(flight)

    def _dispatch(self, op: Op) -> None:
        match op:
            case Forward() | Backward() | InputGrad() | WeightGrad():
                self._compute(op)
            case Overlap():  # one after the other; `lower` keeps their transfers outside
                for part in parts(op):
                    start = self._mark()
                    self._compute(part)
                    self.log.inside.append((part, start, self._mark()))
            case Exchange(transfers):
                sends = [(one, *self._packed(one)) for one in transfers if isinstance(one, Send)]
                self.link.exchange(sends, [one for one in transfers if isinstance(one, Recv)])
            case Send():
                self.link.send(op, *self._packed(op))
            case Recv():
                self.link.post(op)
            case Handoff():
                self._arrive(op, self._outgoing(op))
            case ReduceGrads(stage):
                self._data.reduce(stage)
            case Unshard(stage):
                self._data.gather(stage)
            case _:
                assert_never(op)

    def _compute(self, op: SimpleOp) -> None:
        match op:
            case Forward(stage, microbatch):
                self._forward(stage, microbatch)
            case Backward(stage, microbatch):
                self.stages[stage].run_backward(self._flight(stage, microbatch))
            case InputGrad(stage, microbatch):
                self.stages[stage].run_input_grad(self._flight(stage, microbatch))
            case WeightGrad(stage, microbatch):
                self.stages[stage].run_weight_grad(self._flight(stage, microbatch))
            case _:
                assert_never(op)

    def _forward(self, stage: int, microbatch: int) -> None:
        job, flight = self.jobs[microbatch], self._flight(stage, microbatch)
        try:
            self.stages[stage].run_forward(
                flight,
                job.batch,
                step=self.step,
                microbatch=job.number,
                splits=(stage, microbatch) in self.script.split,
            )
        except EvenflowError:
            raise
        except Exception as error:
            if job.cut.graph.catches and not is_out_of_memory(error):
                raise _not_caught(error, stage, microbatch) from error
            raise
        if flight.work.section.needs_output:
            loss, rest = self.reading(flight.output)
            detached = None if loss is None else loss.detach()
            self.results[microbatch] = Result(detached, without_graph(rest), job.number)
            flight.loss, flight.output = loss, None

    def _flight(self, stage: int, microbatch: int) -> InFlight:
        key = (stage, microbatch)
        flight = self._flights.get(key)
        if flight is None:
            job = self.jobs[microbatch]
            flight = self._flights[key] = InFlight(job.works[stage], job.weight)
        return flight

    def _arrive(self, op: Recv | Handoff, parcel: Parcel) -> None:
        if self._narrowing.dtype is not None:
            parcel = self._narrowing.widen(parcel, self._infos(op))
        flight = self._flight(op.target, op.microbatch)
        (flight.activations if op.payload is Payload.ACTIVATION else flight.gradients)[op.source] = parcel

    def _packed(self, op: Send) -> tuple[Parcel, Manifest]:
        return self._outgoing(op), self._manifest(op)

    def _outgoing(self, op: Send | Handoff) -> Parcel:
        parcel = self.stages[op.source].outgoing(
            self._flights[op.source, op.microbatch], op.target, op.payload
        )
        if self._narrowing.dtype is not None:
            parcel = self._narrowing.narrow(parcel, self._infos(op))
        if isinstance(op, Handoff):
            return tuple(None if tensor is None else tensor.to(self.devices[op.target]) for tensor in parcel)
        return parcel

    def _manifest(self, op: Send | Recv) -> Manifest:
        job = self.jobs[op.microbatch]
        key = (job.recording, op.source, op.target, op.payload)
        if key not in self._manifests:
            infos = tuple(map(self._narrowing.info, self._infos(op)))
            self._manifests[key] = Manifest(key, infos, self.devices[op.target])
        return self._manifests[key]

    def _infos(self, op: Send | Recv | Handoff) -> tuple[TensorInfo, ...]:
        """What is recorded of the values that a transfer carries."""
        cut = self.jobs[op.microbatch].cut
        section = cut.sections[op.source]
        sends = section.sends if op.payload is Payload.ACTIVATION else section.gradient_sends
        return tuple(cut.graph.values[value].info for value in sends.get(op.target, ()))


def _not_caught(error: Exception, stage: int, microbatch: int) -> RecordError:
    """An error that the program, whose code catches some, would perhaps have caught; a split does not."""
    return RecordError(
        f"microbatch {microbatch} raised {type(error).__name__} on stage {stage} ({error}), which none did "
        "when this program was recorded. Its code catches errors (except): if it would catch this one, ask "
        "before for what may go wrong (if), or keep the code that catches it inside one module (atomic=[…]); "
        "otherwise the error is the program's own"
    )


def without_graph(tree: Any) -> Any:
    """A tree with its tensors detached: what a metric was computed from must not outlive the step."""
    if tree is None:
        return None
    return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, tree)
