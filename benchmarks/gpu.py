"""What Evenflow costs on a GPU: one, two and four stages of a GPT there, beside a plain training loop.

A GPT of 110 million parameters trains with AdamW, 32 rows of 1,024 tokens a step in 4 microbatches, under
autocast to bfloat16. All take turns, some steps each; the ratios of medians count. One stage should cost at
most 2 % more than the loop, and losses must be those of one stage, with deterministic algorithms.

Run: `python benchmarks/gpu.py` (with `--device cpu --small` it can be tried anywhere).
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from example_gpt import gpt

import evenflow

MICROBATCHES, ROUNDS, STEPS = 4, 7, 5
Batch = dict[str, torch.Tensor]
Sizes = dict[str, int]
LARGE = {"vocabulary_size": 32_768, "max_length": 1024, "num_layers": 12, "width": 768, "num_heads": 12}
SMALL = {"vocabulary_size": 64, "max_length": 16, "num_layers": 4, "width": 32, "num_heads": 2}


def loss_of(model: Any, batch: Any) -> Any:
    """The model's own loss, under autocast."""
    with torch.autocast(batch["input_ids"].device.type, dtype=torch.bfloat16):
        return model(**batch).loss


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """For tensors, or for names and tensors."""
    return torch.optim.AdamW(parameters, lr=1e-4)


def plain(batch: Batch, device: torch.device, sizes: Sizes) -> Callable[[], torch.Tensor]:
    """A step of a loop as people write it; returns the step's loss."""
    model = gpt(**sizes).to(device)
    optimizer = adamw(model.parameters())

    def step() -> torch.Tensor:
        total = torch.zeros((), device=device)
        rows = len(batch["input_ids"]) // MICROBATCHES
        for at in range(0, len(batch["input_ids"]), rows):
            loss = loss_of(model, {name: each[at : at + rows] for name, each in batch.items()}) / MICROBATCHES
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def staged(stages: int, batch: Batch, device: torch.device, sizes: Sizes) -> Callable[[], torch.Tensor]:
    """A step of a pipeline in this process; returns the step's loss."""
    pipe = evenflow.pipeline(
        gpt(**sizes),
        loss=loss_of,
        example=batch,
        optimizer=adamw,
        stages=stages,
        num_microbatches=MICROBATCHES,
        device=device.type,
    )
    return lambda: pipe.step(batch).loss


def seconds_of(step: Callable[[], torch.Tensor], device: torch.device) -> tuple[float, list[float]]:
    """Seconds of a step, over some, and the losses."""
    _wait(device)
    start = time.perf_counter()
    losses = [step() for _ in range(STEPS)]
    _wait(device)
    return (time.perf_counter() - start) / STEPS, [float(loss) for loss in losses]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu.py needs a CUDA device; there is none")
    device = torch.device(asked.device)
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before the first product
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    rows, sizes = (8, SMALL) if asked.small else (32, LARGE)
    ids = torch.randint(0, sizes["vocabulary_size"], (rows, sizes["max_length"]), device=device)
    batch = {"input_ids": ids, "labels": ids}
    makers = {"a plain loop": plain(batch, device, sizes)}
    for stages in (1, 2, 4):
        makers[f"{stages} stages"] = staged(stages, batch, device, sizes)
    took: dict[str, list[float]] = {name: [] for name in makers}
    losses: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(ROUNDS):
        for name, step in makers.items():
            seconds, found = seconds_of(step, device)
            took[name].append(seconds)
            losses[name] += found
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"\n{name}, torch {torch.__version__}\n")
    print("| | ms a step (range) | / the loop | losses |\n| --- | --- | --- | --- |")
    first = statistics.median(took["a plain loop"][1:])
    for each, every in took.items():
        middle, low, high = (of(every[1:]) * 1e3 for of in (statistics.median, min, max))
        same = "those of one stage" if losses[each] == losses["1 stages"] else "others"
        print(f"| {each} | {middle:.1f} ({low:.1f} to {high:.1f}) | {middle / first / 1e3:.3f} | {same} |")


if __name__ == "__main__":
    main()
