"""Meter: what a pipeline's steps took, in seconds and in bytes, over all its processes."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from evenflow.cost.storages import Made
from evenflow.pipe.step.parts import Parts
from evenflow.pipe.step.runs import Runs
from evenflow.pipe.times.devices import gpus_of, num_replicas
from evenflow.pipe.times.logs import Logs
from evenflow.pipe.times.times import Measured, Times

T = TypeVar("T")


class Meter:
    """See the module; `Pipeline.meter` makes one. All but `peak_bytes` are collective calls.

    >>> from evenflow.pipe.build import pipeline
    >>> batch, model = torch.randn(8, 4), torch.nn.Linear(4, 1)
    >>> pipe = pipeline(model, loss=lambda model, b: model(b).mean(), example=batch, stages=1)
    >>> _, peak_bytes = pipe.meter.peak_bytes(lambda: pipe.step(batch))
    >>> peak_bytes > 0, len(pipe.meter.times(5).timelines)
    (True, 1)
    """

    def __init__(self, parts: Parts, times: Times, runs: Runs, logs: Logs) -> None:
        self._parts, self._times, self._runs, self._logs = parts, times, runs, logs

    def gather(self, thing: Any) -> list[Any]:
        """Every process's thing (whatever pickle takes), in the order of ranks, on every rank."""
        return self._parts.mesh.world.gather(thing)

    @property
    def num_replicas(self) -> int:
        """How many processes hold the same stages: data and tensor ranks."""
        return num_replicas(self._parts)

    def times(self, num_steps: int) -> Measured:
        """What the last steps took, at most so many, of those that are still known.

        Raises `ConfigError` before the first step.
        """
        return self._times.measured(self._parts.world, num_steps)

    def peak_bytes(self, act: Callable[[], T]) -> tuple[T, int]:
        """Do something, such as a step; return what it returned, and this process's peak of memory meanwhile.

        The peak is the most bytes of tensors that were there at once, the pipeline's own that were there
        before included. On CUDA the allocator tells it, of all that the process holds on its devices. On the
        CPU every kernel is watched, which makes the step slower, and the same to the last bit. What is there
        after each op of a step is noted, for `Pipeline.last_step`. To the hooks of `Pipeline.log_to` such a
        step is told without its times.
        """
        with self._logs.watched():
            return self._watched(act)

    def _watched(self, act: Callable[[], T]) -> tuple[T, int]:
        gpus = gpus_of(self._parts)
        if gpus:
            for gpu in gpus:
                torch.cuda.synchronize(gpu)
                torch.cuda.reset_peak_memory_stats(gpu)
            with self._gauged(lambda: sum(map(torch.cuda.memory_allocated, gpus))):
                result = act()
            for gpu in gpus:
                torch.cuda.synchronize(gpu)
            return result, sum(map(torch.cuda.max_memory_allocated, gpus))
        with Made(torch.device("cpu")) as made, self._gauged(made.held_bytes):
            made.include(tensor for tensor in self._held() if not tensor.is_meta)
            result = act()
        return result, made.peak_bytes

    @contextlib.contextmanager
    def _gauged(self, gauge: Callable[[], int]) -> Iterator[None]:
        before, self._runs.gauge = self._runs.gauge, gauge
        try:
            yield
        finally:
            self._runs.gauge = before

    def _held(self) -> Iterator[torch.Tensor]:
        """What this process holds between steps: parameters, gradients, buffers, optimizers' states."""
        parts = self._parts
        own = list(parts.model.parameters())
        own += [parameter for _, parameter in parts.updater.parameters]
        own += parts.updater.accumulators.copies()
        for parameter in own:
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
        yield from parts.model.buffers()
        for optimizer in parts.updater.optimizers.values():
            for leaf in pytree.tree_leaves(list(optimizer.state.values())):
                if isinstance(leaf, torch.Tensor):
                    yield leaf
