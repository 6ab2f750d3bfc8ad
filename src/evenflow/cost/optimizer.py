"""What the optimizer that is really used keeps and takes: its step on parameters of its own is measured."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from evenflow.cost.clock import timed
from evenflow.cost.storages import Made
from evenflow.plan.rank_memory import TrainingState
from evenflow.runtime.recorded.together import as_one

OptimizerFactory = Callable[
    [list[tuple[str, torch.nn.Parameter]]], torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
]

_MOST_BYTES = 2**26  # of parameters that are made for it
_REPEATS = 5


@dataclass(frozen=True, slots=True)
class OptimizerCost:
    """What training keeps for each trained parameter, and the seconds of a step for each of their bytes."""

    state: TrainingState
    seconds_per_byte: float


def optimizer_cost(
    factory: OptimizerFactory | None,
    parameters: Mapping[str, torch.nn.Parameter],
    device: torch.device,
) -> OptimizerCost:
    """Measure the optimizer that `factory` makes, on parameters like the first of these, of up to 64 MiB.

    They have the names, shapes and types of the model's own, which may have no memory and are not touched.

    >>> weights = {"w": torch.nn.Parameter(torch.ones(64, 64))}
    >>> adam = lambda named: torch.optim.Adam([parameter for _, parameter in named])
    >>> optimizer_cost(adam, weights, torch.device("cpu")).state.optimizer_bytes
    8.0
    """
    chosen = dict(_up_to(_MOST_BYTES, parameters.items()))
    if factory is None or not chosen:
        return OptimizerCost(TrainingState(optimizer_bytes=0.0, update_bytes=0.0), 0.0)
    own = [
        (name, torch.nn.Parameter(torch.full_like(each, 0.01, device=device, requires_grad=False)))
        for name, each in chosen.items()
    ]
    optimizer = as_one(factory(own))
    for _, parameter in own:
        parameter.grad = torch.full_like(parameter, 0.01)
    optimizer.step()  # makes the states
    kept = sum(_held_bytes(state) for state in optimizer.state.values())
    with Made(device) as made:
        optimizer.step()
    took = [timed(optimizer.step, device)[0] for _ in range(_REPEATS)]
    num_bytes = sum(parameter.nbytes for _, parameter in own)
    num_elements = sum(parameter.numel() for _, parameter in own)
    return OptimizerCost(
        TrainingState(optimizer_bytes=kept / num_elements, update_bytes=made.peak_bytes / num_elements),
        statistics.median(took) / num_bytes,
    )


def _up_to(
    most_bytes: int, named: Iterable[tuple[str, torch.nn.Parameter]]
) -> Iterable[tuple[str, torch.nn.Parameter]]:
    """The first of them that train, and at least one."""
    total = 0
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        size = math.prod(parameter.shape) * parameter.element_size()
        if total and total + size > most_bytes:
            continue
        total += size
        yield name, parameter


def _held_bytes(state: Mapping[str, object]) -> int:
    """Bytes of the states that grow with the parameter."""
    tensors = (each for each in state.values() if isinstance(each, torch.Tensor) and each.dim() > 0)
    return sum(tensor.nbytes for tensor in tensors)
