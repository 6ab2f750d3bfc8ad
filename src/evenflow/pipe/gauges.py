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

from evenflow.cost.local_device import memory_bytes_of
from evenflow.pipe.parts import Parts
from evenflow.pipe.times import Times
from evenflow.runtime.resident import resident_bytes


class _Gauge(NamedTuple):
    """What one process says: whole numbers, as ranks exchange them. `cap_bytes` is 0 where there is none."""

    busy_ns: int
    step_ns: int
    peak_bytes: int
    cap_bytes: int


class Gauges:
    """Those of a pipeline, by the names that `Pipeline.log_to` tells of."""

    def __init__(self, parts: Parts, times: Times) -> None:
        self._parts, self._times = parts, times

    def own(self) -> dict[str, float]:
        """What this process, the main one, knows without asking: of rank 0, or of all in a single process."""
        if self._parts.mesh.world.size == 1:
            return _of_all([[self._read()]])
        mine = self._read()
        return _of_rank(0, [mine], mine.step_ns)

    def of_all(self) -> dict[str, float]:
        """What all processes know, by the pipeline's ranks; a collective call."""
        mesh = self._parts.mesh
        rows = [_Gauge(*row) for row in mesh.world.gather_numbers(list(self._read()))]
        num = mesh.data.size * mesh.tensor.size
        return _of_all([rows[at : at + num] for at in range(0, len(rows), num)])

    def _read(self) -> _Gauge:
        devices = {stage.device for stage in self._parts.stages.values()}
        on_gpus = all(device.type == "cuda" for device in devices)
        computed = self._times.computed(is_behind=on_gpus)
        busy = sum(end - start for start, end in computed)
        step = max(end for _, end in computed) - min(start for start, _ in computed)
        if on_gpus:
            peak = sum(map(torch.cuda.max_memory_allocated, devices))
            cap = sum(map(memory_bytes_of, devices))
        else:
            peak, cap = resident_bytes("most"), 0.0
        if self._parts.plan is not None and self._parts.world.size > 1:
            cap = self._parts.plan.ranks[self._parts.world.rank].cap_bytes
        return _Gauge(round(1e9 * busy), round(1e9 * step), peak, round(cap))


def _of_all(ranks: Sequence[Sequence[_Gauge]]) -> dict[str, float]:
    gauges = [gauge for replicas in ranks for gauge in replicas]
    longest = max(gauge.step_ns for gauge in gauges)
    numbers = {"bubble": _idle(gauges, longest)}
    for rank, replicas in enumerate(ranks):
        numbers |= _of_rank(rank, replicas, longest)
    return numbers


def _of_rank(rank: int, replicas: Sequence[_Gauge], longest_ns: int) -> dict[str, float]:
    """Of the processes that hold the same stages: their mean idle share, and the memory of the fullest."""
    fullest = max(replicas, key=lambda gauge: gauge.peak_bytes / (gauge.cap_bytes or 1))
    numbers = {
        f"bubble/rank{rank}": _idle(replicas, longest_ns),
        f"peak_bytes/rank{rank}": fullest.peak_bytes,
    }
    return numbers | ({f"cap_bytes/rank{rank}": fullest.cap_bytes} if fullest.cap_bytes else {})


def _idle(gauges: Sequence[_Gauge], longest_ns: int) -> float:
    busy = statistics.fmean(gauge.busy_ns for gauge in gauges)
    return max(0.0, 1 - busy / longest_ns)  # seconds were rounded
