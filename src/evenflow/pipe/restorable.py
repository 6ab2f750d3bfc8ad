"""The half of a pipeline that gives its numbers out and takes others in: averages, a run's state."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from evenflow.errors import ConfigError
from evenflow.pipe.accumulated import Accumulated
from evenflow.pipe.logs import Logs
from evenflow.pipe.parts import Parts
from evenflow.pipe.state import put_back, state_of
from evenflow.pipe.swapped import swapped


class Restorable(ABC):
    """What `Pipeline` can do with its numbers beside training them. The attributes are `Pipeline`'s."""

    _parts: Parts
    _accumulated: Accumulated
    _logs: Logs
    _updated: bool
    _is_swapped: bool
    _step: int
    _num_updates: int

    @abstractmethod
    def _own_tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and persistent buffers that this process answers for, by the model's names."""

    @contextmanager
    def swapped(self, numbers: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Inside, parameters have other numbers, by name: averaged ones, say; afterwards their own again.

        Each process takes those of its own parameters (`named_parameters`); what it is not given stays as it
        is. A collective call. Evaluate, predict, save or export inside; `step` is refused. Raises
        `ConfigError` for a name or a shape that the model does not have.

        >>> from evenflow.pipe.build import pipeline
        >>> batch, model = torch.ones(8, 4), torch.nn.Linear(4, 1)
        >>> pipe = pipeline(model, loss=lambda model, b: model(b).mean(), example=batch, stages=1)
        >>> with pipe.swapped({name: torch.zeros_like(p) for name, p in pipe.named_parameters()}):
        ...     float(pipe.evaluate(batch).loss)
        0.0
        """
        names = frozenset(name for name, _ in self._parts.model.named_parameters(remove_duplicate=False))
        was, self._is_swapped = self._is_swapped, True
        try:
            with swapped(self._parts.updater, self._parts.mesh.world, names, numbers):
                yield
        finally:
            self._is_swapped = was

    def state_dict(self) -> dict[str, Any]:
        """What this process knows of the run: its parameters, buffers, optimizers, schedulers and the step.

        All by the model's own names, so that `evenflow.pipe.state.merged` of all processes' states suits any
        cut. Tensors are the pipeline's own. Raises `ConfigError` between a `step(update=False)` and the
        update, for gradients are no part of it.
        """
        if self._accumulated.is_begun and not self._updated:
            raise ConfigError(
                "state_dict() was called while gradients accumulate, which it does not hold: call it after "
                "the update"
            )
        return state_of(
            self._parts.updater, self._own_tensors(), step=self._step, num_updates=self._num_updates
        )

    def load_state_dict(self, state: Mapping[str, Any], *, optimizer: bool = True) -> None:
        """Go on where `state` was taken; with `optimizer=False` take parameters and buffers alone.

        `state` is what `state_dict` returned here, or those of all processes, merged. The next steps are then
        those that the run would have made. A collective call. Raises `ConfigError` for a state that lacks a
        parameter.
        """
        buffers = dict(self._parts.model.named_buffers())
        put_back(self._parts.updater, self._parts.mesh.world, buffers, state, optimizer=optimizer)
        self._parts.updater.clear()
        self._accumulated.clear()
        self._logs.drop()
        if optimizer:
            self._step, self._num_updates = state["step"], state["num_updates"]
