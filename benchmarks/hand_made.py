"""The planner's plan against thirty that people would make, on two ranks of one thread each.

The thirty are schedules, sizes of a microbatch and cuts that one would try: equal layers, equal estimated
work, and one node to either side. All run for a few steps on a quiet machine (`quiet.py`); then the planner's
and the best few take turns, and their medians count.
Run: `python benchmarks/hand_made.py [MODEL …]`.
"""

import itertools
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from five_models import MODELS, build
from predict import RANKS, adamw, one_step
from quiet import Quiet

import evenflow
from evenflow.errors import EvenflowError
from evenflow.launcher import launch
from evenflow.pipe.building.measured import Run, measured_request
from evenflow.pipe.given.places import world_of
from evenflow.pipe.pipeline import Pipeline
from evenflow.plan.chain import Chain
from evenflow.plan.choice import describe
from evenflow.plan.cuts.partition import balanced_cuts
from evenflow.plan.plan import Plan, PlannedStage, node_labels
from evenflow.plan.planner import plan
from evenflow.plan.request import Levers
from evenflow.schedules import catalog

LOOKS, FINALISTS, ROUNDS = 2, 3, 21
SIZES = (1, 2, 4)
# (schedule, stages a rank, cuts)
TRIED = (
    ("1f1b", 1, ("equal layers", "equal work", "a node earlier", "a node later")),
    ("gpipe", 1, ("equal layers", "equal work")),
    ("zb-h1", 1, ("equal work",)),
    ("interleaved-1f1b", 2, ("equal layers", "equal work")),
    ("eager-1f1b", 1, ("equal work",)),
)


@dataclass(frozen=True)
class HandMade:
    """A plan that a person would make, and its name."""

    name: str
    plan: Plan


def blocks(names: Sequence[str]) -> list[int]:
    """Where each block of a chain begins: a member of a list of modules, with what follows it.

    >>> blocks(["embed", "layers.0.a", "layers.0.b", "layers.1.a", "head"])
    [1, 3]
    """
    begins: dict[str, int] = {}
    for at, name in enumerate(names):
        block = re.match(r"(?:[^.]*[^.\d][^.]*\.)+\d+", name)
        if block:
            begins.setdefault(block[0], at)
    return sorted(begins.values())


def equal_layers(chain: Chain, num_stages: int) -> tuple[int, ...]:
    """As many blocks in each stage; the first has what is before them, the last what is behind."""
    begins = [at for at in blocks(chain.names) if chain.legal[at] or at == 0]
    return tuple(begins[len(begins) * stage // num_stages] for stage in range(1, num_stages))


def equal_work(chain: Chain, num_stages: int) -> tuple[int, ...]:
    """As many estimated operations in each stage."""
    return balanced_cuts(chain.flops, cut_bytes=chain.cut_bytes, legal=chain.legal, num_stages=num_stages)


def moved(chain: Chain, positions: Sequence[int], by: int) -> tuple[int, ...]:
    """The cuts one legal place to the left or the right."""
    legal = [at for at, may in enumerate(chain.legal) if may and at]
    return tuple(legal[max(0, min(len(legal) - 1, legal.index(at) + by))] for at in positions)


def hand_made(chain: Chain, like: Plan, rows: int) -> Iterator[HandMade]:
    """The plans, in the form of another."""
    labels = node_labels(chain.names)
    for (schedule, per_rank, cuts), size in itertools.product(TRIED, SIZES):
        num_stages = RANKS * per_rank
        for cut in cuts:
            positions = (
                equal_layers(chain, num_stages) if cut == "equal layers" else equal_work(chain, num_stages)
            )
            shift = {"a node earlier": -1, "a node later": 1}.get(cut)
            positions = positions if shift is None else moved(chain, positions, shift)
            bounds = (0, *positions, chain.num_nodes)
            rank_of = catalog.get(schedule)(RANKS, per_rank, rows // size).placement.rank_of
            stages = tuple(
                PlannedStage(rank, labels[start], end - start, (), 0.0, 0.0, 0.0, 0.0)
                for rank, (start, end) in zip(rank_of, itertools.pairwise(bounds), strict=True)
            )
            made = replace(
                like,
                schedule=schedule,
                stages_per_rank=per_rank,
                microbatch_size=size,
                num_microbatches=rows // size,
                stages=stages,
                order=(),
            )
            yield HandMade(f"{schedule}, microbatches of {size}, {cut}", made)


def on_rank(name: str) -> tuple[int, list[tuple[str, float]], list[tuple[str, list[float]]]]:
    """How many were tried, what each took, and what the best took when they took turns; the first is ours."""
    world = world_of("cpu")
    model, loss, batch = build(name)
    levers = Levers(pipeline=RANKS).pipeline_only()
    run, quiet = Run(model, loss, batch, adamw, levers=levers), Quiet(world)
    request = quiet.during(lambda often: measured_request(run, world, torch.device("cpu"), progress=often))
    ours = HandMade("ours", world.share(plan(request), 0))
    if world.rank == 0:
        told = describe(ours.plan.choice), [stage.num_nodes for stage in ours.plan.stages]
        print(f"  ours: {told}, {ours.plan.prediction.step_seconds:.3f} s promised", flush=True)
    chain = request.chain_of(SIZES[0])
    tried = []
    for each in hand_made(chain, ours.plan, request.batch_rows):
        try:
            pipe = _pipeline(name, each.plan)
        except EvenflowError as error:  # a cut that may not stand, or stages without a node
            if world.rank == 0:
                print(f"  {each.name}: {error}", flush=True)
            continue
        one_step(pipe, batch, world)
        took = quiet.measured(partial(one_step, pipe, batch, world), LOOKS)
        tried.append((statistics.median(took), each))
        if world.rank == 0:
            print(f"  {each.name}: {tried[-1][0]:.3f} s", flush=True)
        pipe.close()
    best = [each for _, each in sorted(tried, key=lambda pair: pair[0])[:FINALISTS]]
    equal = [each for _, each in sorted(tried, key=lambda pair: pair[0]) if "equal layers" in each.name][:1]
    finalists = [ours, *best, *(each for each in equal if each not in best)]
    pipes = [_pipeline(name, each.plan) for each in finalists]
    for pipe in pipes:
        for _ in range(2):
            one_step(pipe, batch, world)
    rounds = [[one_step(pipe, batch, world) for pipe in pipes] for _ in range(ROUNDS)]
    took_in_turn = [
        (each.name, list(seconds)) for each, seconds in zip(finalists, zip(*rounds, strict=True), strict=True)
    ]
    return len(tried), [(each.name, seconds) for seconds, each in tried], took_in_turn


def _pipeline(name: str, made: Plan) -> Pipeline:
    model, loss, batch = build(name)
    return evenflow.pipeline(model, loss=loss, example=batch, optimizer=adamw, plan=made, device="cpu")


def main() -> None:
    torch.set_num_threads(1)
    print("| model | tried | ours | best by hand | which | ours / best (range) | best equal layers / ours |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in sys.argv[1:] or MODELS:
        num_tried, _, took = launch(on_rank, name, nproc=RANKS)[0]
        for finalist, seconds in took:
            print(f"  {finalist}: {', '.join(f'{each:.3f}' for each in seconds)}", flush=True)
        (_, ours), *others = took
        best_name, best = min(others, key=lambda pair: statistics.median(pair[1]))
        ratios = [a / b for a, b in zip(ours, best, strict=True)]
        equal = [statistics.median(seconds) for other, seconds in others if "equal layers" in other]
        margin = f"{min(equal) / statistics.median(ours):.2f}" if equal else "-"
        print(
            f"| {name} | {num_tried} | {statistics.median(ours):.3f} s | {statistics.median(best):.3f} s "
            f"| {best_name} | {statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"| {margin} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
