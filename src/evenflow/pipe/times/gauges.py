"""Gauges: how idle the ranks are and how much memory they hold, cheap enough to be read while they train.

A process knows its own from what it noted of its last step. Those of all take one exchange of four whole
numbers, without their clocks: ranks' idle shares count against the longest of their steps, each from its
first op to its last. (The first rank of most schedules begins first and ends last, so that this is the
makespan; `Pipeline.timelines` lays all ranks on one clock, and costs more.)
"""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch

from evenflow.pipe.step.parts import Parts
from evenflow.pipe.times.devices import fullness, gpus_of, num_replicas, of_each_rank, own_cap_bytes
from evenflow.pipe.times.times import Times
from evenflow.runtime.notes.host_memory import resident_bytes

_UNKNOWN = -1  # among the whole numbers that ranks exchange


class _Gauge(NamedTuple):
    """What one process says; None is not known."""

    busy_ns: int
    step_ns: int
    peak_bytes: int | None
    cap_bytes: int | None

    def row(self) -> list[int]:
        """As whole numbers, for `of_row`."""
        return [_UNKNOWN if number is None else number for number in self]

    @classmethod
    def of_row(cls, row: Sequence[int]) -> "_Gauge":
        """What a process said."""
        busy_ns, step_ns, *memory = row
        return cls(busy_ns, step_ns, *(None if number == _UNKNOWN else number for number in memory))


class Gauges:
    """Those of a pipeline, by the names that `Pipeline.log_to` tells of."""

    def __init__(self, parts: Parts, times: Times) -> None:
        self._parts, self._times = parts, times
        self._kept_bytes: dict[torch.device, int] = {}  # peaks that GPUs no longer know

    def own(self) -> dict[str, float]:
        """What this process, the main one, knows without asking: of rank 0, or of all in a single process."""
        if self._parts.mesh.world.size == 1:
            return _of_all([[self._read()]])
        mine = self._read()
        return _of_rank(0, [mine], mine.step_ns)

    def of_all(self) -> dict[str, float]:
        """What all processes know, by the pipeline's ranks; a collective call."""
        world = self._parts.mesh.world
        rows = world.gather_numbers(self._read().row(), doing="exchanging gauges with all ranks")
        return _of_all(of_each_rank([_Gauge.of_row(row) for row in rows], num_replicas(self._parts)))

    def keep_peaks(self) -> None:
        """Remember the peaks so far: those of GPUs are about to be counted anew."""
        self._kept_bytes = {gpu: self._peak_of(gpu) for gpu in gpus_of(self._parts)}

    def _read(self) -> _Gauge:
        computed = self._times.computed()
        busy = sum(end - start for start, end in computed)
        step = max(end for _, end in computed) - min(start for start, _ in computed)
        gpus, cap = gpus_of(self._parts), own_cap_bytes(self._parts)
        peak = sum(map(self._peak_of, gpus)) if gpus else resident_bytes("most")
        return _Gauge(round(1e9 * busy), round(1e9 * step), peak, None if cap is None else round(cap))

    def _peak_of(self, gpu: torch.device) -> int:
        return max(self._kept_bytes.get(gpu, 0), torch.cuda.max_memory_allocated(gpu))


def _of_all(ranks: Sequence[Sequence[_Gauge]]) -> dict[str, float]:
    gauges = [gauge for replicas in ranks for gauge in replicas]
    longest = max(gauge.step_ns for gauge in gauges)
    numbers = {"bubble": _idle(gauges, longest)}
    for rank, replicas in enumerate(ranks):
        numbers |= _of_rank(rank, replicas, longest)
    return numbers


def _of_rank(rank: int, replicas: Sequence[_Gauge], longest_ns: int) -> dict[str, float]:
    """Of the processes that hold the same stages: their mean idle share, and the memory of the fullest."""
    fullest = max(replicas, key=lambda gauge: fullness(gauge.peak_bytes, gauge.cap_bytes))
    memory = {
        f"peak_bytes/rank{rank}": fullest.peak_bytes,
        f"cap_bytes/rank{rank}": fullest.cap_bytes,
    }
    known = {name: number for name, number in memory.items() if number is not None}
    return {f"bubble/rank{rank}": _idle(replicas, longest_ns), **known}


def _idle(gauges: Sequence[_Gauge], longest_ns: int) -> float:
    busy = statistics.fmean(gauge.busy_ns for gauge in gauges)
    return max(0.0, 1 - busy / longest_ns)  # seconds were rounded
