"""How good the search is on equal ranks: each row's best known bubble, what is found, and the lower bound.

F, I and W take 1 second a rank, a transfer `latency`. Each row is searched for a minute at most (p = 16:
30 s, p = 32: two minutes). Ends with 1 if a row misses its goal. Run: `make bench-search`.
"""

import argparse
import sys
import time
from dataclasses import dataclass

from evenflow.bounds import Bound
from evenflow.ir import Costs, Placement
from evenflow.ir.timeline import Objective
from evenflow.memory import peak_bytes
from evenflow.schedules.auto import best_on

LIMIT_SECONDS = {8: 60.0, 16: 30.0, 32: 120.0}
# Below the limit, because the machine may be slower than the one on which a second of budget is a second.
BUDGET_SHARE = 0.75
PRINTED = 5.1e-5  # the goals have four decimals


@dataclass(frozen=True)
class Row:
    shape: str  # linear, V, or looped
    num_ranks: int
    stages_per_rank: int
    num_microbatches: int
    cap: float
    latency: float
    objective: Objective
    goal: float

    @property
    def placement(self) -> Placement:
        if self.shape == "V":
            return Placement.v_shape(self.num_ranks)
        return Placement.looped(self.num_ranks, self.stages_per_rank)

    def __str__(self) -> str:
        name = f"{self.shape} v={self.stages_per_rank}" if self.shape == "looped" else self.shape
        return f"{name}, p={self.num_ranks}, m={self.num_microbatches}, cap {self.cap:g}, c={self.latency:g}"


ROWS = (
    Row("linear", 8, 1, 32, 8, 0.1, "span", 0.0926),
    Row("linear", 8, 1, 32, 12, 0.1, "span", 0.0438),
    Row("linear", 8, 1, 32, 15, 0.1, "span", 0.0144),
    Row("V", 8, 2, 32, 8, 0.1, "span", 0.0381),
    Row("V", 8, 2, 32, 8, 0.1, "makespan", 0.0551),
    Row("V", 8, 2, 32, 5, 0.1, "span", 0.1185),
    Row("V", 8, 2, 32, 4, 0.1, "span", 0.1802),
    Row("V", 8, 2, 32, 7, 0.0, "span", 0.0352),
    Row("V", 8, 2, 32, 6, 0.0, "span", 0.0542),
    Row("V", 8, 2, 32, 5, 0.0, "span", 0.0813),
    Row("V", 8, 2, 32, 4, 0.0, "span", 0.1070),
    Row("looped", 8, 4, 32, 9.75, 0.1, "makespan", 0.0481),
    Row("looped", 8, 4, 32, 10, 0.1, "makespan", 0.0410),
    Row("looped", 8, 2, 32, 11.5, 0.1, "makespan", 0.0457),
    Row("V", 16, 2, 64, 16, 0.1, "makespan", 0.0639),
    Row("V", 32, 2, 256, 32, 0.1, "makespan", 0.0349),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--row", type=int, nargs="*", help="numbers of rows, from 0; default: all")
    asked = parser.parse_args()
    best_on(
        Placement.linear(2), 4, Costs.uniform(2, latency_seconds=0.3), time_budget_seconds=0.1
    )  # compiles
    print("| placement | measure | goal | found | lower bound | peak | seconds | schedule |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    missed = 0
    for row in [ROWS[number] for number in asked.row] if asked.row else ROWS:
        each = (1.0,) * row.num_ranks
        caps = tuple(row.cap for _ in each)
        costs = Costs.of_ranks(row.placement, each, each, each, latency_seconds=row.latency, memory_caps=caps)
        limit = LIMIT_SECONDS[row.num_ranks]
        start = time.perf_counter()
        found = best_on(
            row.placement,
            row.num_microbatches,
            costs,
            objective=row.objective,
            time_budget_seconds=limit * BUDGET_SHARE,
            seed=asked.seed,
        )
        took = time.perf_counter() - start
        bubble = bubble_of(found.seconds, row)
        reached = bubble <= row.goal + PRINTED and took <= limit
        missed += not reached
        print(
            f"| {row} | {row.objective} | {row.goal:.4f} | {bubble:.4f}{'' if reached else ' MISSED'} "
            f"| {least(found.bound, row):.4f} | {max(peak_bytes(found.schedule, costs)):g} | {took:.0f} "
            f"| {found.schedule.name} |",
            flush=True,
        )
    return min(missed, 1)


def bubble_of(seconds: float, row: Row) -> float:
    return 1 - 3 * row.num_microbatches / seconds


def least(bound: Bound, row: Row) -> float:
    return bubble_of(bound.seconds, row)


if __name__ == "__main__":
    sys.exit(main())
