"""How near a plan's promise comes to the run: five models, two ranks of one thread each.

Each round measures nodes, links and optimizer anew, plans, builds the pipeline of that plan and runs it, so
that prediction and fact meet the same machine, which is quiet meanwhile (`quiet.py`). A round counts if the
machine was as fast when the plan ran as when it was made: if a reference took as long.
Run: `python benchmarks/predict.py [MODEL …]`.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from five_models import MODELS, build
from quiet import Quiet

import evenflow
from evenflow.launcher import launch
from evenflow.pipe.building.measured import Run, measured_request
from evenflow.pipe.given.places import world_of
from evenflow.pipe.pipeline import Pipeline
from evenflow.plan.choice import describe
from evenflow.plan.planner import plan
from evenflow.plan.request import Levers
from evenflow.runtime.ranks.world import World

ROUNDS, WARM_UPS, STEPS = 3, 2, 5
MOST_ROUNDS, SAME_PACE = 8, 1.06
RANKS = 2
_MIB = 2.0**20


@dataclass(frozen=True)
class Found:
    """One round: seconds of a step and peak bytes of each rank, promised and measured."""

    described: str
    promised_seconds: float
    measured_seconds: float
    promised_bytes: tuple[float, ...]
    measured_bytes: tuple[float, ...]
    pace: float  # of the longest reference before, between and after, to the shortest: 1 if all are the same


def adamw(named: list[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter for _, parameter in named], lr=1e-4)


def on_rank(name: str, levers: Levers, rounds: int) -> list[Found]:
    """What each rank does: so many rounds at one pace, or those that come nearest to it."""
    world = world_of("cpu")
    quiet = Quiet(world)
    found: list[Found] = []
    while len(found) < MOST_ROUNDS and sum(each.pace <= SAME_PACE for each in found) < rounds:
        found.append(_round(name, levers, world, quiet))
    return sorted(found, key=lambda each: each.pace)[:rounds]


def _round(name: str, levers: Levers, world: World, quiet: Quiet) -> Found:
    model, loss, batch = build(name)
    run = Run(model, loss, batch, adamw, levers=levers)
    paces = [quiet.pace()]
    request = quiet.during(lambda often: measured_request(run, world, torch.device("cpu"), progress=often))
    paces.append(quiet.pace())
    made = world.share(plan(request), 0)
    pipe = evenflow.pipeline(model, loss=loss, example=batch, optimizer=adamw, plan=made, device="cpu")
    paces.append(quiet.pace())
    seconds = _step_seconds(pipe, batch, world, quiet)
    paces.append(quiet.pace())
    _, peak = pipe.meter.peak_bytes(lambda: pipe.step(batch))
    pipe.close()
    cut = "+".join(str(stage.num_nodes) for stage in made.stages)
    found = Found(
        f"{describe(made.choice)}, {cut} nodes",
        made.prediction.step_seconds,
        seconds,
        tuple(rank.memory.allocated for rank in made.ranks),
        tuple(world.gather(peak)),
        max(paces) / min(paces),
    )
    if world.rank == 0:
        told = f"{found.promised_seconds:.3f} s promised, {seconds:.3f} s measured"
        print(f"  {found.described}: {told} (pace {found.pace:.2f})", flush=True)
    return found


def _step_seconds(pipe: Pipeline, batch: Any, world: World, quiet: Quiet) -> float:
    """The median of some steps; of those on a quiet machine, if it was quiet for any."""
    seconds = partial(one_step, pipe, batch, world)
    for _ in range(WARM_UPS):
        seconds()
    return statistics.median(quiet.measured(seconds, STEPS))


def one_step(pipe: Pipeline, batch: Any, world: World) -> float:
    """Seconds of one step, the same on every rank."""
    world.gather_numbers([0])
    start = time.perf_counter()
    pipe.step(batch)
    world.gather_numbers([0])
    return float(world.share(time.perf_counter() - start, 0))


def main() -> None:
    torch.set_num_threads(1)
    levers = Levers(pipeline=RANKS).pipeline_only()
    off, off_bytes = [], []
    print("| model | plan | promised | measured | off | range | peak bytes off, by rank |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in sys.argv[1:] or MODELS:
        found = launch(on_rank, name, levers, ROUNDS, nproc=RANKS)[0]
        ratios = [each.promised_seconds / each.measured_seconds - 1 for each in found]
        first = found[0]
        memory = [p / m - 1 for p, m in zip(first.promised_bytes, first.measured_bytes, strict=True)]
        off.append(statistics.median(ratios))
        off_bytes += memory
        print(
            f"| {name} | {found[-1].described} "
            f"| {statistics.median(each.promised_seconds for each in found):.3f} s "
            f"| {statistics.median(each.measured_seconds for each in found):.3f} s "
            f"| {off[-1]:+.1%} | {min(ratios):+.1%} to {max(ratios):+.1%} "
            f"| {', '.join(f'{each:+.1%}' for each in memory)} "
            f"({', '.join(f'{each / _MIB:.0f}' for each in first.measured_bytes)} MiB) |",
            flush=True,
        )
    print(f"step time: median {statistics.median(map(abs, off)):.1%}, worst {max(map(abs, off)):.1%}")
    print(f"peak bytes: worst {max(map(abs, off_bytes)):.1%}")


if __name__ == "__main__":
    main()
