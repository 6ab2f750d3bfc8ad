"""The executor: one rank's share of a proven program, op by op.

It is one `match` over ops with one span around each. It knows the order and nothing else: stages compute,
links carry, `InFlight` holds what is between.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

import torch
from torch.utils import _pytree as pytree

from evenflow.errors import ConfigError, EvenflowError
from evenflow.graph.cut import Cut
from evenflow.ir.op import (
    Backward,
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
    WeightGrad,
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


class Executor:
    """Runs one rank's ops. `results` fills up with the microbatches' outputs where the last stage runs."""

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
        self.ops = proven.program.ranks[rank]
        self.trains = proven.program.schedule.trains
        self.rank, self.step = rank, step
        self.stages, self.devices, self.jobs = stages, devices, jobs
        self.link, self.reading = link, reading
        self.results: dict[int, Result] = {}
        self.spans: list[Span] = []
        self._flights: dict[tuple[int, int], InFlight] = {}
        self._ops_left = Counter(key for op in self.ops for key in _flights_of(op))
        self._losses: dict[int, torch.Tensor | None] = {}  # by microbatch
        self._posted: dict[tuple[int, int, Payload], list[Recv]] = {}
        link.start([(op, self._manifest(op)) for op in self.ops if isinstance(op, Recv)])

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
            if isinstance(op, Forward | Backward):
                payload = Payload.ACTIVATION if isinstance(op, Forward) else Payload.GRADIENT
                self._take(op.stage, op.microbatch, payload)
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
            case Forward(stage, microbatch):
                self._forward(stage, microbatch)
            case Backward(stage, microbatch):
                self._backward(stage, microbatch)
            case Send():
                self.link.send(op, self._outgoing(op), self._manifest(op))
            case Recv(_, target, microbatch, payload):
                self.link.post(op)
                self._posted.setdefault((target, microbatch, payload), []).append(op)
            case Handoff():
                self._arrive(op, self._outgoing(op))
            case InputGrad() | WeightGrad() | Overlap() | Exchange() | ReduceGrads():
                raise _not_run_yet(op)
            case _:
                assert_never(op)

    def _forward(self, stage: int, microbatch: int) -> None:
        job, flight = self.jobs[microbatch], self._flight(stage, microbatch)
        self.stages[stage].run_forward(
            flight, job.batch, step=self.step, microbatch=microbatch, train=self.trains
        )
        if flight.work.section.needs_output:
            loss, rest = self.reading(flight.output)
            self.results[microbatch] = Result(None if loss is None else loss.detach(), without_graph(rest))
            self._losses[microbatch] = loss
            flight.output = None

    def _backward(self, stage: int, microbatch: int) -> None:
        flight = self._flight(stage, microbatch)
        loss = self._losses.pop(microbatch, None) if flight.work.section.needs_output else None
        self.stages[stage].run_backward(flight, loss=loss, weight=self.jobs[microbatch].weight)

    def _flight(self, stage: int, microbatch: int) -> InFlight:
        key = (stage, microbatch)
        if key not in self._flights:
            self._flights[key] = InFlight(self.jobs[microbatch].works[stage])
        return self._flights[key]

    def _take(self, stage: int, microbatch: int, payload: Payload) -> None:
        for op in self._posted.pop((stage, microbatch, payload), ()):
            self._arrive(op, self.link.take(op))

    def _arrive(self, op: Recv | Handoff, parcel: Parcel) -> None:
        flight = self._flight(op.target, op.microbatch)
        (flight.activations if op.payload is Payload.ACTIVATION else flight.gradients)[op.source] = parcel

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


def without_graph(tree: Any) -> Any:
    """A tree with its tensors detached: what a metric was computed from must not outlive the step."""
    return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, tree)


def _flights_of(op: Op) -> Iterator[tuple[int, int]]:
    """The (stage, microbatch) pairs of this rank that an op touches."""
    match op:
        case Forward(stage, microbatch) | Backward(stage, microbatch):
            yield stage, microbatch
        case Send():
            yield op.source, op.microbatch
        case Recv():
            yield op.target, op.microbatch
        case Handoff():
            yield op.source, op.microbatch
            yield op.target, op.microbatch
        case InputGrad() | WeightGrad() | Overlap() | Exchange() | ReduceGrads():
            raise _not_run_yet(op)
        case _:
            assert_never(op)


def _not_run_yet(op: Op) -> ConfigError:
    return ConfigError(f"{op}: only whole backwards and single transfers are run so far; use schedule='1f1b'")
