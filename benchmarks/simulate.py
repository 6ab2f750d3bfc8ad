"""How long it takes to simulate 64 ranks, 4 stages a rank and 512 microbatches: 393,216 ops on one core."""

import statistics
import time

from evenflow.ir import Costs, Flow
from evenflow.schedules.catalog import get
from evenflow.simulate import simulate

REPEATS = 5


def main() -> None:
    for name in ("interleaved-1f1b", "interleaved-zb", "looped-bfs"):
        schedule = get(name)(64, 4, 512)
        num_stages = schedule.placement.num_stages
        costs = Costs.uniform(num_stages, latency_seconds=0.1)
        took = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            simulate(schedule, Flow.chain(num_stages), costs)
            took.append(time.perf_counter() - start)
        num_ops = sum(map(len, schedule.ranks))
        print(
            f"{name}: {num_ops:,} ops, median {statistics.median(took):.2f} s "
            f"({min(took):.2f} to {max(took):.2f} of {REPEATS})"
        )


if __name__ == "__main__":
    main()
