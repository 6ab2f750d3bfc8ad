"""What replaying a recording costs over calling the model: host time of a stack of tiny GPT blocks.

The kernels are tiny, so that what is measured is Python's work and torch's dispatch. Direct and replayed
runs alternate, forward and backward apart; the ratio of medians is what counts, for the machine is shared.
The goal is a forward that costs at most 3 % more than the model's own.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from example_gpt import gpt

import evenflow
from evenflow.runtime.recorded.microbatch import tensors
from evenflow.runtime.stages.inflight import InFlight

SHARES = {"default leaves": None, "everything apart": 0.0}
SIZES = {"vocabulary_size": 64, "max_length": 16, "num_layers": 8, "width": 32, "num_heads": 2}


def loss_of(model: Any, batch: Any) -> Any:
    """The model's own loss."""
    return model(**batch).loss


def timed(run: Callable[[], torch.Tensor]) -> tuple[float, float]:
    """Seconds of a forward and of the backward from its loss."""
    start = time.perf_counter()
    loss = run()
    middle = time.perf_counter()
    loss.backward()
    return middle - start, time.perf_counter() - middle


def measure(share: float | None, rounds: int) -> None:
    """Print one row: medians of both ways, their ratio and its range over ten parts of the rounds."""
    model = gpt(**SIZES)
    ids = torch.randint(0, 64, (1, 8))
    batch = {"input_ids": ids, "labels": ids}
    pipe = evenflow.pipeline(
        model, loss=loss_of, example=batch, stages=1, num_microbatches=1, max_leaf_share=share
    )
    stage = pipe._parts.stages[0]  # noqa: SLF001 (below the public face lies what is measured)
    entry = pipe._parts.recordings.entries[0]  # noqa: SLF001
    leaves = dict(enumerate(tensors(batch)))

    def replayed() -> torch.Tensor:
        flight = InFlight(entry.works[0])
        stage.run_forward(flight, leaves, step=0, microbatch=0)
        found: torch.Tensor = flight.output
        return found

    def direct() -> torch.Tensor:
        found: torch.Tensor = loss_of(model, batch)
        return found

    assert torch.equal(direct(), replayed())
    times: dict[str, list[tuple[float, float]]] = {"direct": [], "replayed": []}
    for at in range(rounds + 20):
        for name, run in (("direct", direct), ("replayed", replayed)):
            found = timed(run)
            if at >= 20:
                times[name].append(found)
    pipe.close()
    for at, part in enumerate(("forward", "backward")):
        mine, own = ([t[at] for t in times[name]] for name in ("replayed", "direct"))
        size = rounds // 10
        ratios = [
            statistics.median(mine[i : i + size]) / statistics.median(own[i : i + size])
            for i in range(0, size * 10, size)
        ]
        medians = statistics.median(own) * 1e6, statistics.median(mine) * 1e6
        print(
            f"{len(entry.graph.chain):4d} nodes  {part:8}  direct {medians[0]:7.0f} us  replayed "
            f"{medians[1]:7.0f} us  "
            f"ratio {medians[1] / medians[0]:.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )


def main() -> None:
    """Measure both choices of leaves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=400)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    for name, share in SHARES.items():
        print(name)
        measure(share, rounds)


if __name__ == "__main__":
    main()
