"""The executor: one rank's share of a proven program, op by op.

It is one `match` over ops with one span around each. It knows the order and nothing else: stages compute,
links carry, `InFlight` holds what is between.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, assert_never

import torch
from torch.utils import _pytree as pytree

from evenflow.errors import EvenflowError, RecordError
from evenflow.graph.cut import Cut
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
    WeightGrad,
    parts,
)
from evenflow.ir.timeline import Span
from evenflow.runtime.inflight import InFlight, Parcel
from evenflow.runtime.links.link import Link, Manifest
from evenflow.runtime.stage import Stage
from evenflow.runtime.work import Work
from evenflow.validate import ProvenProgram


@dataclass(frozen=True, slots=True)
class Job:
    """One microbatch of a step.

    `batch` holds the tensor leaves that this rank needs, by place; `works` those of this rank's stages;
    `weight` is the gradient of the step's loss with respect to this microbatch's.
    """

    batch: Mapping[int, torch.Tensor]
    recording: int
    cut: Cut
    works: Mapping[int, Work]
    weight: float


@dataclass(frozen=True, slots=True)
class Result:
    """What the program returned for one microbatch, on the last stage; the loss without its graph."""

    loss: torch.Tensor | None
    rest: Any  # metrics, or what `predict` computes: any tree


# Splits what the program returned into (loss or None, the rest).
Reading = Callable[[Any], tuple[torch.Tensor | None, Any]]


class _Ends(TypedDict):
    """Where a backward starts on the last stage: the loss, and the gradient of the step's loss to it."""

    loss: torch.Tensor | None
    weight: float


class Executor:
    """Runs one rank's ops. `results` fills up with the microbatches' outputs where the last stage runs.

    `spans` holds one span for each op; `parts` one for each simple op that computed, those of an overlap too.
    """

    def __init__(
        self,
        proven: ProvenProgram,
        rank: int,
        *,
        stages: Mapping[int, Stage],
        devices: Sequence[torch.device],
        jobs: Sequence[Job],
        link: Link,
        step: int,
        reading: Reading,
    ) -> None:
        self.proven = proven
        self.ops = proven.program.ranks[rank]
        self.trains = proven.program.schedule.trains
        self.rank, self.step = rank, step
        self.stages, self.devices, self.jobs = stages, devices, jobs
        self.link, self.reading = link, reading
        self.results: dict[int, Result] = {}
        self.spans: list[Span] = []
        self.parts: list[Span] = []
        self._flights: dict[tuple[int, int], InFlight] = {}
        self._ops_left = Counter(key for op in self.ops for key in _flights_of(op))
        self._splits = {(op.stage, op.microbatch) for op in _simple(self.ops) if isinstance(op, InputGrad)}
        self._losses: dict[int, torch.Tensor | None] = {}  # by microbatch
        self._posted: dict[tuple[int, int, Payload], list[Recv]] = {}
        receives = (one for op in self.ops for one in _singles(op) if isinstance(one, Recv))
        link.start([(op, self._manifest(op)) for op in receives])

    def run(self) -> None:
        """Run the rank's whole program."""
        for op in self.ops:
            self.execute(op)
        self.finish()

    def finish(self) -> None:
        """Wait until everything sent has left; by then nothing is in flight."""
        self.link.finish()
        assert not self._flights, f"still in flight after the step: {sorted(self._flights)}"

    def execute(self, op: Op) -> None:
        """Run one op and note its span."""
        start = time.perf_counter()
        try:
            if isinstance(op, ComputeOp):
                for part in parts(op):
                    self._take_for(part)
                start = time.perf_counter()  # waiting for what it needs is no part of a computation
            self._dispatch(op)
        except EvenflowError:
            raise
        except Exception as error:
            error.add_note(f"evenflow: rank {self.rank} failed in {op}, step {self.step}")
            raise
        self.spans.append(Span(self.rank, op, start, time.perf_counter()))
        for key in _flights_of(op):
            self._ops_left[key] -= 1
            if not self._ops_left[key]:
                self._flights.pop(key, None)

    def _dispatch(self, op: Op) -> None:
        match op:
            case Forward() | Backward() | InputGrad() | WeightGrad():
                start = time.perf_counter()
                self._compute(op)
                self.parts.append(Span(self.rank, op, start, time.perf_counter()))
            case Overlap(first, second):  # one after the other; `lower` keeps their transfers outside
                self._dispatch(first)
                self._dispatch(second)
            case Exchange(transfers):
                sends = [(one, *self._packed(one)) for one in transfers if isinstance(one, Send)]
                receives = [one for one in transfers if isinstance(one, Recv)]
                self.link.exchange(sends, receives)
                for one in receives:
                    self._note_posted(one)
            case Send():
                self.link.send(op, *self._packed(op))
            case Recv():
                self.link.post(op)
                self._note_posted(op)
            case Handoff():
                self._arrive(op, self._outgoing(op))
            case ReduceGrads():
                raise AssertionError(f"{op}: there is one replica, so that no program is lowered with it")
            case _:
                assert_never(op)

    def _compute(self, op: SimpleOp) -> None:
        match op:
            case Forward(stage, microbatch):
                self._forward(stage, microbatch)
            case Backward(stage, microbatch):
                flight = self._flight(stage, microbatch)
                self.stages[stage].run_backward(flight, **self._ends(flight, microbatch))
            case InputGrad(stage, microbatch):
                flight = self._flight(stage, microbatch)
                self.stages[stage].run_input_grad(flight, **self._ends(flight, microbatch))
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
                microbatch=microbatch,
                splits=(stage, microbatch) in self._splits,
            )
        except (EvenflowError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if job.cut.graph.catches:
                raise _not_caught(error, stage, microbatch) from error
            raise
        if flight.work.section.needs_output:
            loss, rest = self.reading(flight.output)
            self.results[microbatch] = Result(None if loss is None else loss.detach(), without_graph(rest))
            self._losses[microbatch] = loss
            flight.output = None

    def _ends(self, flight: InFlight, microbatch: int) -> _Ends:
        loss = self._losses.pop(microbatch, None) if flight.work.section.needs_output else None
        return {"loss": loss, "weight": self.jobs[microbatch].weight}

    def _flight(self, stage: int, microbatch: int) -> InFlight:
        key = (stage, microbatch)
        if key not in self._flights:
            self._flights[key] = InFlight(self.jobs[microbatch].works[stage])
        return self._flights[key]

    def _note_posted(self, op: Recv) -> None:
        self._posted.setdefault((op.target, op.microbatch, op.payload), []).append(op)

    def _take_for(self, op: SimpleOp) -> None:
        """Wait for what an op needs from other ranks."""
        payload = Payload.ACTIVATION if isinstance(op, Forward) else Payload.GRADIENT
        for posted in self._posted.pop((op.stage, op.microbatch, payload), ()):
            self._arrive(posted, self.link.take(posted))

    def _arrive(self, op: Recv | Handoff, parcel: Parcel) -> None:
        flight = self._flight(op.target, op.microbatch)
        (flight.activations if op.payload is Payload.ACTIVATION else flight.gradients)[op.source] = parcel

    def _packed(self, op: Send) -> tuple[Parcel, Manifest]:
        return self._outgoing(op), self._manifest(op)

    def _outgoing(self, op: Send | Handoff) -> Parcel:
        parcel = self.stages[op.source].outgoing(
            self._flights[op.source, op.microbatch], op.target, op.payload
        )
        if isinstance(op, Handoff):
            return tuple(None if tensor is None else tensor.to(self.devices[op.target]) for tensor in parcel)
        return parcel

    def _manifest(self, op: Send | Recv) -> Manifest:
        job = self.jobs[op.microbatch]
        section = job.cut.sections[op.source]
        values = (section.sends if op.payload is Payload.ACTIVATION else section.gradient_sends).get(
            op.target, ()
        )
        infos = tuple(job.cut.graph.values[value].info for value in values)
        return Manifest((job.recording, op.source, op.target, op.payload), infos, self.devices[op.target])


def _not_caught(error: Exception, stage: int, microbatch: int) -> RecordError:
    """An error that the program, whose code catches some, would perhaps have caught; a split does not."""
    return RecordError(
        f"microbatch {microbatch} raised {type(error).__name__} on stage {stage} ({error}), which none did "
        "when this program was recorded. Its code catches errors (except): if it would catch this one, ask "
        "before for what may go wrong (if), or keep the code that catches it inside one module (atomic=[…]); "
        "otherwise the error is the program's own"
    )


def _simple(ops: Sequence[Op]) -> Iterator[SimpleOp]:
    for op in ops:
        if isinstance(op, ComputeOp):
            yield from parts(op)


def _singles(op: Op) -> tuple[Op, ...]:
    return op.transfers if isinstance(op, Exchange) else (op,)


def without_graph(tree: Any) -> Any:
    """A tree with its tensors detached: what a metric was computed from must not outlive the step."""
    return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, tree)


def _flights_of(op: Op) -> Iterator[tuple[int, int]]:
    """The (stage, microbatch) pairs of this rank that an op touches."""
    match op:
        case Forward() | Backward() | InputGrad() | WeightGrad() | Overlap():
            for part in parts(op):
                yield part.stage, part.microbatch
        case Exchange(transfers):
            for transfer in transfers:
                yield from _flights_of(transfer)
        case ReduceGrads():
            return
        case Send():
            yield op.source, op.microbatch
        case Recv():
            yield op.target, op.microbatch
        case Handoff():
            yield op.source, op.microbatch
            yield op.target, op.microbatch
        case _:
            assert_never(op)
