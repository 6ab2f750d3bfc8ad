"""How long partitioning takes, and how much better it is than what others do on chains with a heavy head.

The rivals are written from their published descriptions. All get the same chain of whole layers; those that
can use times get the true ones. Run: `python benchmarks/partition.py`.
"""

import itertools
import random
import statistics
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evenflow.ir import Costs, Flow, Placement
from evenflow.plan.chain import Held
from evenflow.plan.cuts.partition import balanced_cuts, partition
from evenflow.plan.cuts.problem import DoesNotFitError, Kind, PartitionProblem
from evenflow.schedules.one_f_one_b import one_f_one_b
from evenflow.simulate import simulate

REPEATS = 5
Rival = Callable[["Layers", int], Sequence[int]]


@dataclass(frozen=True)
class Layers:
    name: str
    seconds: tuple[float, ...]  # forward and backward
    parameters: tuple[float, ...]


def language_model(num_blocks: int) -> Layers:
    """An embedding of little time and a head of four blocks' time; each has the parameters of four."""
    return Layers(
        f"{num_blocks} equal blocks",
        (0.05, *[1.0] * num_blocks, 4.0),
        (4.0, *[1.0] * num_blocks, 4.0),
    )


def uneven_model(num_blocks: int) -> Layers:
    """The same with uneven blocks: every third has experts, of many parameters and little work."""
    chance = random.Random(0)
    seconds = [chance.uniform(0.7, 1.3) * (1.4 if block % 3 == 2 else 1.0) for block in range(num_blocks)]
    parameters = [6.0 if block % 3 == 2 else 1.0 for block in range(num_blocks)]
    return Layers(f"{num_blocks} uneven blocks", (0.05, *seconds, 4.0), (4.0, *parameters, 4.0))


def equal_counts(layers: Layers, num_stages: int) -> list[int]:
    """As many layers in each stage, the first stages one more: DeepSpeed's `uniform`."""
    share, more = divmod(len(layers.seconds), num_stages)
    return [stage * share + min(stage, more) for stage in range(1, num_stages)]


def greedy_balance(weights: Sequence[float], num_stages: int) -> list[int]:
    """DeepSpeed's `partition_balanced`: bisection over the bottleneck; a probe fills stages from the left."""
    sums = [0.0, *itertools.accumulate(weights)]

    def probe(bottleneck: float) -> list[int]:
        cuts = [0]
        for stage in range(1, num_stages):
            reach = bisect_right(sums, sums[cuts[-1]] + bottleneck) - 1
            cuts.append(min(max(reach, cuts[-1] + 1), len(weights) - (num_stages - stage)))
        return cuts[1:]

    low, high = 0.0, sums[-1]
    for _ in range(60):
        middle = (low + high) / 2
        loads = stage_sums(weights, probe(middle))
        low, high = (low, middle) if max(loads) <= middle * (1 + 1e-12) else (middle, high)
    return probe(high)


def by_parameters(layers: Layers, num_stages: int) -> list[int]:
    return greedy_balance(layers.parameters, num_stages)


def greedy_by_time(layers: Layers, num_stages: int) -> list[int]:
    return greedy_balance(layers.seconds, num_stages)


def block_partition(layers: Layers, num_stages: int) -> list[int]:
    """What torchgpipe's `balance_by_time` does: Bárány & Grinberg, "Block Partitions of Sequences", 2015.

    From equal counts on, the lightest block takes a layer from the neighbour that lies towards the heaviest,
    until the two differ by no more than the largest layer, all being scaled to lie between 0 and 1.
    """
    smallest, largest = min(layers.seconds), max(layers.seconds)
    sizes = [(seconds - smallest) / (largest - smallest) for seconds in layers.seconds]
    ends = [len(sizes) // num_stages * stage for stage in range(1, num_stages)]
    loads = stage_sums(sizes, ends)
    heaviest = loads.index(max(loads))
    while True:
        if loads[heaviest] <= min(loads) + 1:
            return ends
        lightest = min(range(num_stages), key=lambda stage: (loads[stage], abs(stage - heaviest)))
        towards = 1 if lightest < heaviest else -1
        ends[min(lightest, lightest + towards)] += towards
        loads = stage_sums(sizes, ends)
        if lightest + towards == heaviest:
            heaviest = loads.index(max(loads))


def ours(layers: Layers, num_stages: int) -> Sequence[int]:
    size = len(layers.seconds)
    return balanced_cuts(layers.seconds, cut_bytes=[1.0] * size, legal=[True] * size, num_stages=num_stages)


RIVALS: dict[str, Rival] = {
    "Evenflow": ours,
    "equal counts (DeepSpeed `uniform`)": equal_counts,
    "by parameters (DeepSpeed `parameters`)": by_parameters,
    "DeepSpeed's balanced partition, given the times": greedy_by_time,
    "torchgpipe's block partition, given the times": block_partition,
}


def stage_sums(weights: Sequence[float], cuts: Sequence[int]) -> list[float]:
    return [sum(weights[a:b]) for a, b in itertools.pairwise((0, *cuts, len(weights)))]


def step_seconds(layers: Layers, cuts: Sequence[int]) -> float:
    """A simulated step of 1F1B with four microbatches a rank; a backward takes twice a forward."""
    thirds = tuple(load / 3 for load in stage_sums(layers.seconds, cuts))
    num_ranks = len(thirds)
    schedule = one_f_one_b(num_ranks, 1, 4 * num_ranks)
    return simulate(schedule, Flow.chain(num_ranks), Costs(thirds, thirds, thirds)).makespan_seconds


def compare() -> None:
    print("| chain | ranks | partition | bottleneck over the optimum | step over Evenflow's |")
    print("| --- | --- | --- | --- | --- |")
    for layers, num_ranks in (
        (language_model(32), 8),
        (language_model(80), 16),
        (uneven_model(32), 8),
        (uneven_model(80), 16),
    ):
        best = ours(layers, num_ranks)
        for name, rival in RIVALS.items():
            cuts = rival(layers, num_ranks)
            most = max(stage_sums(layers.seconds, cuts)) / max(stage_sums(layers.seconds, best)) - 1
            step = step_seconds(layers, cuts) / step_seconds(layers, best) - 1
            print(f"| {layers.name} | {num_ranks} | {name} | {most:+.1%} | {step:+.1%} |")


def random_problem(
    placement: Placement, num_nodes: int, *, room: float, head: float = 0.0
) -> PartitionProblem:
    """Nodes of uneven, often no seconds; `room` times the mean that a rank must hold; a head worth `head`."""
    chance = random.Random(0)
    seconds = [chance.choice([0.0, 0.0, 1.0, 2.0, 5.0, 10 * chance.random()]) for _ in range(num_nodes)]
    seconds[-1] = max(seconds[-1], head * sum(seconds))
    alone = [Held(chance.randint(1, 100), (node,)) for node in range(num_nodes)]
    pairs = [Held(chance.randint(1, 50), (node - 3, node)) for node in range(3, num_nodes)]
    static = sum(group.num_bytes for group in (*alone, *pairs))
    kind = Kind("device", tuple(seconds), cap_bytes=room * static / placement.num_ranks)
    return PartitionProblem(
        placement,
        (kind,) * placement.num_ranks,
        tuple(chance.random() < 0.9 for _ in range(num_nodes)),
        tuple(float(chance.randint(1, 50)) for _ in range(num_nodes)),
        tuple(0.1 * chance.random() for _ in range(num_nodes)),
        static=(*alone, *pairs),
        held=tuple(alone),
        in_flight=tuple(4.0 / len(placement.stages_on(rank)) for rank in placement.rank_of),
    )


def time_it() -> None:
    print("\n| nodes | placement | room | seconds | gap |\n| --- | --- | --- | --- | --- |")
    linear, v_shape, looped = Placement.linear(64), Placement.v_shape(16), Placement.looped(8, 4)
    for name, placement, num_nodes, room, head in (
        ("linear, 64", linear, 2000, 1000.0, 0.0),
        ("linear, 64", linear, 2000, 6.0, 0.0),
        ("linear, 64, head of 5 %", linear, 2000, 1000.0, 0.05),
        ("linear, 64", linear, 2000, 2.0, 0.0),
        ("V, 16", v_shape, 500, 1000.0, 0.0),
        ("V, 16", v_shape, 500, 6.0, 0.0),
        ("V, 16", v_shape, 500, 2.0, 0.0),
        ("looped, 8, 4 stages each", looped, 400, 1000.0, 0.0),
        ("looped, 8, 4 stages each", looped, 400, 6.0, 0.0),
    ):
        problem = random_problem(placement, num_nodes, room=room, head=head)
        took, told = [], ""
        for _ in range(REPEATS):
            start = time.perf_counter()
            try:
                told = f"{partition(problem).gap:.2%}"
            except DoesNotFitError as error:
                told = f"lacks {error.needed_bytes / error.cap_bytes - 1:.0%}"
            took.append(time.perf_counter() - start)
        print(
            f"| {num_nodes:,} | {name} | {room:g} | {statistics.median(took):.2f} "
            f"({min(took):.2f} to {max(took):.2f}) | {told} |"
        )


if __name__ == "__main__":
    compare()
    time_it()
