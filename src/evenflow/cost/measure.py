"""Measuring one node: how long it takes and what it keeps.

Times are medians of repetitions, until `budget_seconds` are spent: of the forward, of a backward in one piece
and of the first part of another. A node that is repeated by itself would find its weights in the caches,
which in a step other nodes and other ranks have filled since; so other memory is touched in between, as much
as a large cache holds that cores share. Then the runtime's own path is run once, which a step keeps warm.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch

from evenflow.cost.bench import Bench
from evenflow.cost.clock import timed
from evenflow.cost.measured import NOTHING_KEPT, Kept, Measured
from evenflow.cost.storages import Made, Memory
from evenflow.graph.kernels.fakes import storage_of
from evenflow.graph.leaves.snapshots import copy_of
from evenflow.runtime.stages.inflight import InFlight

_WARM_UPS = 2
_FEWEST, _MOST = 3, 100  # repetitions
_TOUCHED_BYTES = {"cpu": 2**25, "cuda": 2**26}

Values = Mapping[int, torch.Tensor]


def measure(
    bench: Bench,
    idle: Bench,
    inputs: Callable[[], Values],
    device: torch.device,
    *,
    budget_seconds: float,
) -> Measured:
    """Measure a node on its bench; `idle` is the same bench without it, `inputs` makes new inputs."""
    clock = _Clock(device)
    forward, backward, input_grad, entry = clock.seconds(bench, idle, inputs(), budget_seconds)
    saved, kept, result_bytes, forward_peak = _held(bench, inputs, device)
    return Measured(
        forward_seconds=forward,
        backward_seconds=backward,
        input_grad_seconds=min(input_grad, backward),
        entry_seconds=entry,
        saved=saved,
        kept=kept,
        result_bytes=result_bytes,
        forward_peak_bytes=forward_peak,
        backward_peak_bytes=_backward_peak(bench, inputs(), device),
    )


# -- time


class _Clock:
    """Times runs as they are in a step: inputs have just been made, weights were last used a while ago."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._others = torch.zeros(_TOUCHED_BYTES[device.type], dtype=torch.uint8, device=device)

    def seconds(
        self, bench: Bench, idle: Bench, given: Values, budget_seconds: float
    ) -> tuple[float, float, float, float]:
        """Medians for `_once`, without what a bench takes by itself; and that, forward and backward."""

        def others_run() -> None:
            """Leave the caches as other nodes do: full of their memory, and of the runtime's."""
            self._others.add_(1)
            flight = idle.forward(given)
            if idle.walks:
                idle.arrive(flight)
                idle.backward(flight)

        def nobody_runs() -> None:
            pass

        for _ in range(_WARM_UPS):
            for each in (bench, idle):
                self._once(each, given, nobody_runs)
        own: list[tuple[float, ...]] = []
        bare: list[tuple[float, ...]] = []
        end = time.perf_counter() + budget_seconds
        while len(own) < _FEWEST or (len(own) < _MOST and time.perf_counter() < end):
            own.append(self._once(bench, given, others_run))
            bare.append(self._once(idle, given, nobody_runs))
        entry = _medians(bare)
        pairs = zip(_medians(own), entry, strict=True)
        forward, backward, input_grad = (max(0.0, took - without) for took, without in pairs)
        return forward, backward, input_grad, entry[0] + entry[1]

    def _once(self, bench: Bench, given: Values, before: Callable[[], None]) -> tuple[float, float, float]:
        """Seconds of a forward, of a backward in one piece, and of the first part of another's."""
        forward, flight = self._forward(bench, given, before)
        if not bench.walks:
            return forward, 0.0, 0.0
        before()
        bench.arrive(flight)
        backward, _ = timed(lambda: bench.backward(flight), self._device)
        flight = self._forward(bench, given, before, splits=True)[1]
        before()
        bench.arrive(flight)
        input_grad, _ = timed(lambda: bench.input_grad(flight), self._device)
        if not bench.gives:
            input_grad = 0.0
        elif not flight.put_off:  # that was all of it
            input_grad = backward
        bench.weight_grad(flight)
        return forward, backward, input_grad

    def _forward(
        self, bench: Bench, given: Values, before: Callable[[], None], *, splits: bool = False
    ) -> tuple[float, InFlight]:
        before()
        new = {value: copy_of(tensor) for value, tensor in given.items()}
        return timed(lambda: bench.forward(new, splits=splits), self._device)


def _medians(rows: Iterable[tuple[float, ...]]) -> list[float]:
    return [statistics.median(column) for column in zip(*rows, strict=True)]


# -- memory


def _held(
    bench: Bench, inputs: Callable[[], Values], device: torch.device
) -> tuple[Kept, Kept, tuple[int, ...], int]:
    """What is held until the backward, and until the weight gradient; bytes of results; the forward's peak.

    All tensors outside of autograd's graph are let go of, so that what is still there is what it holds.
    """
    node, given = bench.node, dict(inputs())
    entered = {value: Memory(tensor) for value, tensor in given.items()}
    with Made(device) as made:
        flight = bench.forward(given, splits=True)
    peak, new = made.peak_bytes, {memory.number: memory for memory in made.alive()}
    made_values = bench.results(flight)
    results = [made_values.get(value) for value in node.makes]
    memories = [None if t is None else new.get(storage_of(t)) for t in results]
    result_bytes = tuple(0 if memory is None else memory.num_bytes for memory in memories)
    del results, made_values
    given.clear()
    flight.made = {}
    in_results = {memory.number for memory in memories if memory is not None}
    private = [memory for memory in new.values() if memory.number not in in_results]

    def still_there() -> Kept:
        return Kept(
            tuple(at for at, v in enumerate(node.inputs) if v in entered and entered[v].alive),
            tuple(at for at, memory in enumerate(memories) if memory is not None and memory.alive),
            sum(memory.num_bytes for memory in private if memory.alive),
        )

    saved, kept = still_there(), NOTHING_KEPT
    if bench.walks:
        with Made(device) as later:  # (the parameters have gradients by now)
            bench.arrive(flight)
            bench.input_grad(flight)
        flight.owed.clear()
        kept = still_there()
        gradient_bytes = sum(memory.num_bytes for memory in later.alive())
        kept = replace(kept, private_bytes=kept.private_bytes + gradient_bytes)
        bench.weight_grad(flight)
    return saved, kept, result_bytes, peak


def _backward_peak(bench: Bench, given: Values, device: torch.device) -> int:
    if not bench.walks:
        return 0
    flight = bench.forward(given)
    bench.arrive(flight)
    with Made(device) as made:
        bench.backward(flight)
    return made.peak_bytes
