"""One step whole: the user's model and loss function in a plain loop, and a recording on one stage."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.checkpoint
from torch.utils import _pytree as pytree

from evenflow.errors import ConfigError
from evenflow.pipe.given.reading import read_loss
from evenflow.runtime.program.rng import Streams
from evenflow.runtime.program.work import Work
from evenflow.runtime.recorded.tracing import Program
from evenflow.runtime.stages.executor import Job, Result, without_graph
from evenflow.runtime.stages.inflight import InFlight
from evenflow.runtime.stages.stage import Stage, on


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one step made: a result for each microbatch, gradients by first name (or none), buffers."""

    results: Sequence[Result]
    gradients: Mapping[str, torch.Tensor | None]
    buffers: Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class PlainLoop:
    """Calls the loss function on the model itself. `streams` key its draws, if it draws."""

    program: Program
    model: torch.nn.Module
    device: torch.device
    streams: Streams | None
    step: int

    def forward(self, microbatch: Any, number: int) -> Any:
        """What the loss function returns for a microbatch."""
        with self.keyed(number):
            return self.program(self.model, pytree.tree_map(self._entered, microbatch))

    @contextlib.contextmanager
    def keyed(self, number: int) -> Iterator[None]:
        """With gradients, on the device, and with the draws of a microbatch."""
        if self.streams is not None:
            self.streams.begin(self.step, number)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(on(self.device))
            if self.streams is not None:
                stack.enter_context(self.streams.untouched(self.model))
                stack.enter_context(_nothing_recomputed())
            yield

    def run(self, items: Sequence[Any], weights: Sequence[float]) -> list[Result]:
        """Run every microbatch forward and backward; gradients add up in the parameters."""
        results = []
        for number, (item, weight) in enumerate(zip(items, weights, strict=True)):
            loss, rest = read_loss(self.forward(item, number))
            if not isinstance(loss, torch.Tensor):
                raise ConfigError(
                    f"the loss function returned a {type(loss).__name__} for microbatch {number}, where it "
                    "returned a tensor when it was recorded: no two of its calls may differ"
                )
            if loss.requires_grad:
                loss.backward(torch.full_like(loss, weight))
            results.append(Result(loss.detach(), pytree.tree_map(_copied, without_graph(rest)), number))
        return results

    def _entered(self, leaf: Any) -> Any:
        """A leaf of the batch with the strides that it has (a clone might not), apart from its gradient."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return leaf.detach().to(self.device).requires_grad_(leaf.requires_grad)


@contextlib.contextmanager
def _nothing_recomputed() -> Iterator[None]:
    """Let gradient checkpoints keep what they would compute again: the same numbers, for more memory.

    A recomputation draws outside of the forward, where nothing is keyed.
    """
    inner = "_checkpoint_without_reentrant_generator"  # what goes on around the checkpointed function
    own = getattr(torch.utils.checkpoint, inner)

    def around(*_: Any, **__: Any) -> Iterator[None]:
        yield

    setattr(torch.utils.checkpoint, inner, around)
    try:
        yield
    finally:
        setattr(torch.utils.checkpoint, inner, own)


def run_on_one_stage(stage: Stage, jobs: Sequence[Job], work_of: Callable[[int], Work], step: int) -> None:
    """Replay the recordings of `jobs`, uncut, on a stage of its own; gradients add up in the parameters."""
    for number, job in enumerate(jobs):
        flight = InFlight(work_of(job.recording), job.weight)
        stage.run_forward(flight, job.batch, step=step, microbatch=number)
        flight.loss, _ = read_loss(flight.output)
        stage.run_backward(flight)


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf
