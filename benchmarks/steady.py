"""What a run holds: peaks of 1F1B beside GPipe's and what theory says, and the memory of 500 steps.

Run: `python benchmarks/steady.py`.
"""

import os
import statistics
from pathlib import Path

import workloads

from evenflow.launcher import launch
from evenflow.pipe.given.places import world_of

RANKS, FEW, MANY = 4, 8, 16  # microbatches
STEPS, WARM_UPS, EVERY, FEWEST = 500, 100, 10, 2
_MIB = 2**20


def _peak(schedule: str, num_microbatches: int) -> int:
    """This rank's peak in a step, of which the gradients are there from the beginning."""
    world_of("cpu")
    pipe, batch = workloads.gpt_pipeline(schedule, num_microbatches)
    for _ in range(2):
        pipe.step(batch, update=False)
    return pipe.meter.peak_bytes(lambda: pipe.step(batch, update=False))[1]


def _resident(schedule: str) -> tuple[list[float], list[float]]:
    """The steps at which it was looked, and the MiB that this process then had."""
    world_of("cpu")
    pipe, batch = workloads.gpt_pipeline(schedule, FEWEST)
    steps, sizes = [], []
    for step in range(STEPS):
        float(pipe.step(batch).loss)
        if step >= WARM_UPS and step % EVERY == 0:
            steps.append(float(step))
            pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
            sizes.append(pages * os.sysconf("SC_PAGE_SIZE") / _MIB)
    return steps, sizes


def _peaks() -> None:
    few, many, lean = (
        launch(_peak, *given, nproc=RANKS) for given in (("gpipe", FEW), ("gpipe", MANY), ("1f1b", MANY))
    )
    print(f"\nPeaks of a GPT on {RANKS} ranks, {MANY} microbatches, MiB\n")
    print("| rank | gpipe | 1f1b | a microbatch holds | 1f1b by theory | off |")
    print("| --- | --- | --- | --- | --- | --- |")
    for rank in range(RANKS):
        each = (many[rank] - few[rank]) / (MANY - FEW)
        theory = many[rank] - each * (MANY - (RANKS - rank))
        row = (many[rank], lean[rank], each, theory)
        told = " | ".join(f"{number / _MIB:.1f}" for number in row)
        print(f"| {rank} | {told} | {lean[rank] / theory - 1:+.1%} |", flush=True)


def _growth() -> None:
    print(f"\nResident memory over {STEPS} steps of {FEWEST} microbatches, from step {WARM_UPS} on\n")
    print("| schedule | rank | MiB | growth, KiB a step | of the second half |")
    print("| --- | --- | --- | --- | --- |")
    for schedule in ("1f1b", "zb-h1"):
        for rank, (steps, sizes) in enumerate(launch(_resident, schedule, nproc=2)):
            half = len(steps) // 2
            pairs = (steps, sizes), (steps[half:], sizes[half:])
            told = " | ".join(f"{statistics.linear_regression(*each).slope * 1024:+.2f}" for each in pairs)
            print(f"| {schedule} | {rank} | {sizes[-1]:.0f} | {told} |", flush=True)


if __name__ == "__main__":
    _peaks()
    _growth()
