"""The log of a training run: what each step took on each rank, put together when the run has ended."""

import math
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

import evenflow
from evenflow.cli.feed import Units
from evenflow.cost.cache import device_name
from evenflow.ir.op import Backward, ComputeOp, Forward, InputGrad, WeightGrad, parts
from evenflow.ir.timeline import Timeline
from evenflow.journal.run import RankRecord, Run, Spread, StageRecord, Step
from evenflow.pipe.times.devices import of_each_rank
from evenflow.pipe.times.times import Measured

# The first step warms caches up; in the second one memory is watched, which takes time of its own.
_WATCHED_STEP = 2


@dataclass(frozen=True, slots=True)
class _Taken:
    """What one rank noted: for each step (wait for the batch, step) in seconds; its peak; its device."""

    seconds: tuple[tuple[float, float], ...]
    peak_bytes: int | None
    device: str


class StepLog:
    """Runs a pipeline's training steps, and notes what they take. Every rank has one."""

    def __init__(self, pipe: "evenflow.Pipeline", *, num_steps: int, device: str) -> None:
        self._pipe, self._num_steps, self._device = pipe, num_steps, device
        self._started = datetime.now(UTC)
        self._num_before = 0  # steps of this run that were made before it went on
        self._seconds: list[tuple[float, float]] = []
        self._waited_seconds = 0.0
        self._peak_bytes: int | None = None
        self._unread: list[torch.Tensor] = []
        self._losses: list[float] = []

    def batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """What the pipeline feeds of these batches; each goes to `step` before the next is asked for."""
        iterator = iter(self._pipe.feed(batches))
        while True:
            start = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited_seconds = time.perf_counter() - start
            yield batch

    def step(self, batch: Any) -> None:
        """Train on one batch."""
        start = time.perf_counter()
        if self._num_here + 1 == _WATCHED_STEP < self._num_steps - self._num_before:
            result, self._peak_bytes = self._pipe.meter.peak_bytes(lambda: self._pipe.step(batch))
        else:
            result = self._pipe.step(batch)
        if self._device == "cuda":
            torch.cuda.synchronize()  # the next step waits for it anyway, to agree on the batch
        self._seconds.append((self._waited_seconds, time.perf_counter() - start))
        is_left_out = result.bad_numbers is not None  # whose loss, finite or not, nothing was trained on
        self._unread.append(torch.tensor(math.nan) if is_left_out else result.loss)

    @property
    def num_steps(self) -> int:
        """How many have been made."""
        return len(self._seconds)

    @property
    def _num_here(self) -> int:
        return len(self._seconds) - self._num_before

    def state(self) -> dict[str, torch.Tensor]:
        """What the steps took on this rank, and their losses: for `go_on`."""
        return {
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "seconds": torch.tensor(self._seconds, dtype=torch.float64).reshape(-1, 2),
        }

    def go_on(self, state: Mapping[str, torch.Tensor]) -> None:
        """Let the steps of `state` be the first of this run."""
        self._losses = state["losses"].tolist()
        self._seconds = [(waited, took) for waited, took in state["seconds"].tolist()]
        self._num_before = len(self._seconds)

    @property
    def losses(self) -> Sequence[float]:
        """The loss of each step so far; reading them waits for the device."""
        self._losses += [float(loss) for loss in self._unread]
        self._unread.clear()
        return self._losses

    def finish(self, name: str, schedule: str, units: Units) -> tuple[Run, tuple[Step, ...]]:
        """What the run was, and its steps, at least one; a collective call, the same on all ranks."""
        num_steps = len(self._seconds)
        num_timed = max(1, self._num_here - _WATCHED_STEP)
        meter = self._pipe.meter
        measured = meter.times(num_timed)
        mine = _Taken(tuple(self._seconds), self._peak_bytes, _told(torch.device(self._device)))
        ranks: list[_Taken] = meter.gather(mine)
        # All agree on a batch when a step begins, so the rank that took longest tells how long it was.
        waited, took = (
            [max(rank.seconds[at][which] for rank in ranks) for at in range(num_steps)] for which in (0, 1)
        )
        run = Run(
            name=name,
            started=self._started.isoformat(timespec="seconds"),
            machine=_machine([rank.device for rank in ranks]),
            evenflow=evenflow.__version__,
            schedule=schedule,
            num_microbatches=_num_microbatches(measured.timelines[-1]),
            item=units.item,
            items_per_batch=units.num_items_per_batch,
            num_steps=num_steps,
            num_timed=num_timed,
            step=_spread(took[-num_timed:]),
            pipeline=_spread([each.makespan_seconds for each in measured.timelines]),
            feed_seconds=statistics.median(waited[-num_timed:]),
            simulated_seconds=measured.simulated.makespan_seconds,
            stages=tuple(_stage(measured, each.stage, each.rank, each.first) for each in self._pipe.cut),
            ranks=tuple(
                RankRecord(_idle(measured.timelines, number), _most(each.peak_bytes for each in replicas))
                for number, replicas in enumerate(of_each_rank(ranks, meter.num_replicas))
            ),
        )
        steps = enumerate(zip(took, waited, self.losses, strict=True), start=1)
        return run, tuple(
            Step(number, seconds, feed, loss if math.isfinite(loss) else None)
            for number, (seconds, feed, loss) in steps
        )


def _most(peaks: Iterable[int | None]) -> int | None:
    return max((peak for peak in peaks if peak is not None), default=None)


def _spread(seconds: Sequence[float]) -> Spread:
    return Spread(statistics.median(seconds), min(seconds), max(seconds))


def _stage(measured: Measured, stage: int, rank: int, first: str) -> StageRecord:
    forward, *backwards = (
        measured.seconds(kind, stage) for kind in (Forward, Backward, InputGrad, WeightGrad)
    )
    assert forward is not None, "a step runs every stage forward"
    return StageRecord(rank, first, forward, *backwards)


def _idle(timelines: Iterable[Timeline], rank: int) -> float:
    shares = (each.idle_seconds(rank) / each.makespan_seconds for each in timelines)
    return max(0.0, statistics.median(shares))  # sums of seconds are not exact


def _num_microbatches(timeline: Timeline) -> int:
    computed = (span.op for span in timeline.compute_on(0) if isinstance(span.op, ComputeOp))
    return len({op.microbatch for each in computed for op in parts(each)})


def _told(device: torch.device) -> str:
    threads = f", {torch.get_num_threads()} of {os.cpu_count()} cores" if device.type == "cpu" else ""
    return f"{device_name(device)}{threads}"


def _machine(devices: Sequence[str]) -> str:
    """The ranks' devices and what runs on them, in words."""
    counted = (f"{number} × {name}" for name, number in Counter(devices).items())
    return f"{'; '.join(counted)}; torch {torch.__version__}, Python {platform.python_version()}"
