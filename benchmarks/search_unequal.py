"""How good the search is on unequal ranks: 200 random instances against the catalog and the lower bound.

Up to 8 ranks, 32 microbatches and 3 stages a rank; costs of each rank are lognormal, transfers and caps
random. Ends with 1 if the search is worse than a schedule of the catalog that fits. Run: `make bench-search`.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Iterator

from evenflow.errors import EvenflowError, ScheduleError
from evenflow.ir import Costs, Flow, Placement, Schedule
from evenflow.ir.timeline import Objective
from evenflow.lower import lower
from evenflow.memory import memory_faults
from evenflow.schedules import catalog
from evenflow.schedules.auto import best
from evenflow.simulate import simulate
from evenflow.validate import prove

ROUNDING = 1e-9


class Instance:
    """Random sizes and costs; the same number gives the same instance."""

    def __init__(self, number: int) -> None:
        dice = random.Random(number)
        self.num_ranks = dice.randint(2, 8)
        self.stages_per_rank = dice.choice((1, 2, 2, 3))
        self.num_microbatches = dice.randint(1, 32)
        objectives: tuple[Objective, ...] = ("span", "makespan")
        self.objective = dice.choice(objectives)
        spread = dice.uniform(0.05, 0.6)
        self.seconds = [
            tuple(dice.lognormvariate(0, spread) for _ in range(self.num_ranks)) for _ in range(3)
        ]
        self.latency = dice.choice((0.0, dice.uniform(0, 0.5)))
        self.kept = tuple(dice.uniform(0.2, 1) for _ in range(self.num_ranks))
        self.caps = tuple(dice.uniform(1.0, 1.5 * self.num_ranks) for _ in range(self.num_ranks))

    def costs_on(self, placement: Placement) -> Costs:
        return Costs.of_ranks(
            placement,
            *self.seconds,
            latency_seconds=self.latency,
            activation_bytes=(1.0,) * self.num_ranks,
            weight_grad_bytes=self.kept,
            memory_caps=self.caps,
        )

    def seconds_of(self, schedule: Schedule) -> float:
        timeline = simulate(
            schedule, Flow.chain(schedule.placement.num_stages), self.costs_on(schedule.placement)
        )
        return timeline.span_seconds if self.objective == "span" else timeline.makespan_seconds

    def catalog(self) -> Iterator[Schedule]:
        for name in catalog.SCHEDULES:
            try:
                made = catalog.make(
                    name,
                    num_ranks=self.num_ranks,
                    stages_per_rank=self.stages_per_rank,
                    num_microbatches=self.num_microbatches,
                    costs_on=self.costs_on,
                )
            except EvenflowError:
                continue
            if made.trains and not memory_faults(made, self.costs_on(made.placement)):
                yield made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=200)
    parser.add_argument("--budget", type=float, default=2.0, help="seconds for each")
    asked = parser.parse_args()
    gaps, gains, worse, none_fits = [], [], 0, 0
    start = time.perf_counter()
    for number in range(asked.instances):
        instance = Instance(number)
        known = min((instance.seconds_of(made) for made in instance.catalog()), default=None)
        try:
            found = best(
                instance.num_ranks,
                instance.stages_per_rank,
                instance.num_microbatches,
                instance.costs_on,
                objective=instance.objective,
                time_budget_seconds=asked.budget,
            )
        except ScheduleError:
            none_fits += 1
            worse += known is not None
            continue
        made = found.schedule
        prove(lower(made, Flow.chain(made.placement.num_stages)), instance.costs_on(made.placement))
        gaps.append(found.gap)
        if known is not None:
            gains.append(1 - found.seconds / known)
            worse += found.seconds > known * (1 + ROUNDING)
    took = time.perf_counter() - start
    print(f"{asked.instances} instances, {asked.budget:g} s of search each, {took:.0f} s in all")
    mean, median, optimal = statistics.mean(gaps), statistics.median(gaps), sum(gap < 1e-9 for gap in gaps)
    print(f"gap to the bound: mean {100 * mean:.2f} %, median {100 * median:.2f} %")
    print(f"  largest {100 * max(gaps):.1f} %, proven optimal {optimal} of {len(gaps)}")
    print(
        f"shorter than the best that fits of the catalog by {100 * statistics.mean(gains):.2f} % on average"
    )
    print(f"  largest {100 * max(gains):.1f} %, over {len(gains)} instances where one fits; worse: {worse}")
    print(f"no schedule was found within the caps: {none_fits}")
    return min(worse, 1)


if __name__ == "__main__":
    sys.exit(main())
