"""What saving every ten steps costs: blocks of ten steps with a save and without, in turns.

Run: `python benchmarks/saving.py`.
"""

import statistics
import tempfile
import time
from pathlib import Path

import workloads

from evenflow.checkpoint.load import open_checkpoint
from evenflow.launcher import launch
from evenflow.pipe.given.places import world_of

RANKS, MICROBATCHES, EVERY, PAIRS = 4, 16, 10, 12
_MIB = 2**20


def _blocks(folder: Path) -> list[tuple[float, float, float, float]]:
    """For each pair: a block without, one with a save, and of that the call and the wait at its end."""
    world_of("cpu")
    pipe, batch = workloads.gpt_pipeline("1f1b", MICROBATCHES)

    def steps() -> None:
        for _ in range(EVERY):
            pipe.step(batch)

    steps()
    pipe.save(folder / "first")
    found = []
    for pair in range(PAIRS):
        start = time.perf_counter()
        steps()
        middle = time.perf_counter()
        pipe.save(folder / str(pair % 2), wait=False)
        called = time.perf_counter()
        steps()
        stepped = time.perf_counter()
        pipe.saved()
        end = time.perf_counter()
        found.append((middle - start, end - middle, called - middle, end - stepped))
    return found


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as place:
        ranks = launch(_blocks, Path(place), nproc=RANKS)
        size = open_checkpoint(Path(place) / "first").manifest.num_bytes
    # All agree on a batch when a step begins, so the slowest rank's time is everybody's.
    pairs = [[max(each) for each in zip(*pair, strict=True)] for pair in zip(*ranks, strict=True)]
    without, beside, call, wait = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = sorted(saving / alone for alone, saving, _, _ in pairs)
    print(f"\nSaving {size / _MIB:.0f} MiB every {EVERY} steps, {RANKS} ranks, medians of {PAIRS} pairs\n")
    print("| ten steps | with a save | cost (range) | the call | wait at the end |")
    print("| --- | --- | --- | --- | --- |")
    cost = f"{statistics.median(ratios) - 1:+.1%} ({ratios[0] - 1:+.1%} to {ratios[-1] - 1:+.1%})"
    print(f"| {without:.2f} s | {beside:.2f} s | {cost} | {call * 1e3:.0f} ms | {wait * 1e3:.0f} ms |")


if __name__ == "__main__":
    main()
