"""What data ranks cost: a pipeline of two ranks alone, and two such pipelines that sum their gradients.

Devices sleep (see `emulated`); gradients are real, and travel over Gloo. A pipeline has as many microbatches
with data ranks as without. `at the end` sums nothing before the program has ended.
Run: `python benchmarks/mesh.py [ROUNDS]`.
"""

import contextlib
import statistics
import sys
import time
from typing import Any
from unittest import mock

import emulated
import torch
from torch import nn

import evenflow
from evenflow.runtime.ranks.data_ranks import Replicated

SECONDS, MICROBATCHES, WEIGHTS = 10e-3, 8, 2**21  # of a stage: each pass, and 8 MiB of gradients
STEPS, WARM_UPS, ROUNDS = 8, 3, 3
SCHEDULES = ("1f1b", "zb-h1")
WAYS = {"alone": 1, "data ranks": 2, "at the end": 2}


class _Given(torch.autograd.Function):
    """Hands on what it is given; its weights get a gradient once in a step, which takes no time."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        ctx.like = weights
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return grads[0], torch.ones_like(ctx.like) if ctx.like.grad is None else None


class Loaded(nn.Module):
    """A device that sleeps, with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.work = emulated.Stage((SECONDS, SECONDS, SECONDS))
        self.weights = nn.Parameter(torch.zeros(WEIGHTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape to the same."""
        return self.work(_Given.apply(x, self.weights))  # type: ignore[no-untyped-call, no-any-return]  # torch types neither


def seconds_of(schedule: str, way: str) -> list[float]:
    """What steps took, on one of the ranks."""
    num_data = WAYS[way]
    batch = torch.zeros(MICROBATCHES * num_data, 4)
    pipe = evenflow.pipeline(
        nn.Sequential(Loaded(), Loaded()),
        loss=lambda model, rows: model(rows).mean(),
        example=batch,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        split=["1"],
        schedule=schedule,
        microbatch_size=1,
        mesh={"pp": 2, "dp": num_data},
        device="cpu",
    )
    emulated.DEVICE.is_on = True
    found = []
    for step in range(WARM_UPS + STEPS):
        start = time.perf_counter()
        pipe.step(batch)
        pipe.meter.gather(None)
        if step >= WARM_UPS:
            found.append(time.perf_counter() - start)
    emulated.DEVICE.is_on = False
    pipe.close()
    return found


def rank(way: str) -> dict[str, list[float]]:
    """All schedules."""
    late = mock.patch.object(Replicated, "reduce", return_value=None)
    with late if way == "at the end" else contextlib.nullcontext():
        return {schedule: seconds_of(schedule, way) for schedule in SCHEDULES}


def main() -> None:
    """Take turns, and print medians."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    took: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for way, num_data in WAYS.items():
            for schedule, found in evenflow.launch(rank, way, nproc=2 * num_data)[0].items():
                took.setdefault((schedule, way), []).extend(found)
    for schedule in SCHEDULES:
        alone = statistics.median(took[schedule, "alone"])
        for way in WAYS:
            times = took[schedule, way]
            print(
                f"{schedule:6} {way:10} {statistics.median(times) * 1e3:6.1f} ms "
                f"({min(times) * 1e3:.1f} to {max(times) * 1e3:.1f}), "
                f"{statistics.median(times) / alone:.3f} of a pipeline alone"
            )


if __name__ == "__main__":
    main()
