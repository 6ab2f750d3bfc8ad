"""What each lever of a pipeline does to a step's time and memory, measured: docs/levers.md tells of it.

A small GPT trains on two ranks (one process and one thread each), always with the same 16 rows a
step; one lever moves at a time. In each round new processes build all settings and take their steps in turn
(A B C A B C …), so that what else the machine does falls on all alike. Writes a table, and pictures of it:

    python benchmarks/levers.py                     # measures, writes docs/levers/*
    python benchmarks/levers.py --draw-only         # draws the table that is there again
"""

import argparse
import csv
import dataclasses
import itertools
import os
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from levers_pictures import Row, draw
from torch.nn import functional as F

import evenflow
from evenflow.pipe.pipeline import Pipeline

ROOT = Path(__file__).parents[1]
ROWS, LENGTH = 16, 64
NUM_LAYERS = 8
WARM_UP = 2
_MOST_LOAD = 0.3


@dataclass(frozen=True)
class Setting:
    microbatch_size: int = 2
    schedule: str = "1f1b"
    ranks: int = 2
    stages_per_rank: int = 1
    vocabulary: int = 1024
    split: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Sample:
    """What one round saw of a setting, in seconds and bytes; `busy` is each rank's work in a step."""

    steps: tuple[float, ...]
    simulated: float
    busy: tuple[float, ...]
    peak_bytes: tuple[int, ...]


SIZES = (1, 2, 4, 8, 16)
LEVERS: dict[str, dict[str, Setting]] = {
    "microbatch size": {str(size): Setting(size) for size in SIZES},
    "microbatch size, gpipe": {str(size): Setting(size, "gpipe") for size in SIZES},
    "schedule": {
        **{name: Setting(schedule=name) for name in ("sequential", "gpipe", "1f1b", "zb-h1", "zb-h2")},
        **{name: Setting(schedule=name, stages_per_rank=2) for name in ("interleaved-1f1b", "zb-v")},
    },
    "stages": {
        "1 rank, 1 stage": Setting(16, "sequential", ranks=1),
        "2 ranks, 2 stages": Setting(),
        "2 ranks, 4 stages": Setting(schedule="interleaved-1f1b", stages_per_rank=2),
        "2 ranks, 8 stages": Setting(schedule="interleaved-1f1b", stages_per_rank=4),
    },
    "cut": {
        "equal layers": Setting(vocabulary=16384, split=(f"layers.{NUM_LAYERS // 2}",)),
        "balanced": Setting(vocabulary=16384),
    },
}


def build(setting: Setting) -> tuple[Pipeline, dict[str, torch.Tensor]]:
    sys.path.append(str(ROOT / "examples"))
    from gpt import GPT, GPTConfig

    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            vocabulary_size=setting.vocabulary,
            max_length=LENGTH,
            num_layers=NUM_LAYERS,
            width=192,
            num_heads=6,
        )
    )
    tokens = torch.randint(0, setting.vocabulary, (ROWS, LENGTH + 1))

    def loss(model: Any, batch: Any) -> torch.Tensor:
        logits = model(batch["tokens"][:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1), batch["tokens"][:, 1:].flatten())

    batch = {"tokens": tokens}
    pipe = evenflow.pipeline(
        model,
        loss=loss,
        example=batch,
        optimizer=lambda named_parameters: torch.optim.SGD(named_parameters, lr=1e-3),
        stages=None if setting.split else setting.ranks * setting.stages_per_rank,
        stages_per_rank=setting.stages_per_rank,
        schedule=setting.schedule,
        microbatch_size=setting.microbatch_size,
        split=setting.split,
        device="cpu",
    )
    return pipe, batch


def measure(settings: tuple[Setting, ...], num_steps: int) -> list[Sample]:
    """On each rank: all settings, their steps in turn."""
    built = [build(setting) for setting in settings]
    for _, (pipe, batch) in itertools.product(range(WARM_UP), built):
        pipe.step(batch)
    peaks = [pipe.meter.peak_bytes(partial(pipe.step, batch))[1] for pipe, batch in built]
    seconds: list[list[float]] = [[] for _ in built]
    for _, (each, (pipe, batch)) in itertools.product(range(num_steps), zip(seconds, built, strict=True)):
        pipe.meter.gather(None)  # all ranks begin together
        start = time.perf_counter()
        pipe.step(batch)
        each.append(time.perf_counter() - start)
    return [sample(pipe, took, peak) for (pipe, _), took, peak in zip(built, seconds, peaks, strict=True)]


def sample(pipe: Pipeline, took: list[float], peak: int) -> Sample:
    measured = pipe.meter.times(len(took))
    ranks = pipe.meter.gather((took, peak))
    return Sample(
        steps=tuple(max(each) for each in zip(*(seconds for seconds, _ in ranks), strict=True)),
        simulated=measured.simulated.makespan_seconds,
        busy=tuple(
            statistics.median(timeline.busy_seconds(rank) for timeline in measured.timelines)
            for rank in range(len(ranks))
        ),
        peak_bytes=tuple(peak for _, peak in ranks),
    )


def rounds(num_rounds: int, num_steps: int) -> dict[Setting, list[Sample]]:
    """What each round saw of every setting; one that stands under several levers is measured once."""
    every = dict.fromkeys(setting for settings in LEVERS.values() for setting in settings.values())
    seen: dict[Setting, list[Sample]] = {setting: [] for setting in every}
    for number in range(num_rounds):
        for ranks in (2, 1):
            own = tuple(setting for setting in every if setting.ranks == ranks)
            found = evenflow.launch(measure, own, num_steps, nproc=ranks)[0]
            for setting, each in zip(own, found, strict=True):
                seen[setting].append(each)
        print(f"round {number + 1} of {num_rounds} done", flush=True)
    return seen


def row(lever: str, name: str, setting: Setting, samples: list[Sample]) -> Row:
    steps = [1000 * step for each in samples for step in each.steps]
    low, _, high = statistics.quantiles(steps, n=4)
    busy = [1000 * statistics.median(ranks) for ranks in zip(*(each.busy for each in samples), strict=True)]
    return Row(
        lever=lever,
        setting=name,
        ranks=setting.ranks,
        stages=setting.ranks * setting.stages_per_rank,
        schedule=setting.schedule,
        microbatch_size=setting.microbatch_size,
        step_ms=statistics.median(steps),
        least_ms=min(steps),
        low_ms=low,
        high_ms=high,
        most_ms=max(steps),
        simulated_ms=1000 * statistics.median(each.simulated for each in samples),
        first_rank_busy_ms=busy[0],
        last_rank_busy_ms=busy[-1],
        peak_mib=max(peak for each in samples for peak in each.peak_bytes) / 2**20,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "levers")
    parser.add_argument("--draw-only", action="store_true")
    given = parser.parse_args()
    table = given.out / "measured.csv"
    if not given.draw_only:
        if (load := os.getloadavg()[0]) > _MOST_LOAD:
            print(
                f"other work runs here (load {load:.1f}): both cores must be free for figures that mean much"
            )
        seen = rounds(given.rounds, given.steps)
        rows = [
            row(lever, name, setting, seen[setting])
            for lever, settings in LEVERS.items()
            for name, setting in settings.items()
        ]
        given.out.mkdir(parents=True, exist_ok=True)
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
            writer.writeheader()
            for each in rows:
                writer.writerow(
                    {
                        key: f"{v:.2f}" if isinstance(v, float) else v
                        for key, v in dataclasses.asdict(each).items()
                    }
                )
        print(table.read_text())
    draw(table, given.out)


if __name__ == "__main__":
    main()
