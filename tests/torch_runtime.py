"""Schedules of ours in torch's own runtime: its stages, its transfers over Gloo, its gradients."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

WIDTH, CLASSES, ROWS = 16, 11, 3  # rows of a microbatch


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.up = torch.nn.Linear(WIDTH, 2 * WIDTH)
        self.down = torch.nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def layers(num_stages: int) -> list[torch.nn.Module]:
    """The model, a layer for each stage but the first and the last, which hold one more; always the same."""
    torch.manual_seed(0)
    blocks = [torch.nn.Sequential(Block()) for _ in range(num_stages)]
    blocks[0].insert(0, torch.nn.Embedding(CLASSES, WIDTH))
    blocks[-1].append(torch.nn.Linear(WIDTH, CLASSES))
    return blocks


def batch(num_microbatches: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and what follows them."""
    torch.manual_seed(1)
    shape = (num_microbatches * ROWS, 5)
    return torch.randint(CLASSES, shape), torch.randint(CLASSES, shape)


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


def unsplit_gradients(num_stages: int, num_microbatches: int) -> dict[str, torch.Tensor]:
    """The mean over microbatches, each through the whole model; names begin with the stage."""
    stages = layers(num_stages)
    model = torch.nn.Sequential(*stages)
    tokens, targets = batch(num_microbatches)
    for each, target in zip(tokens.split(ROWS), targets.split(ROWS), strict=True):
        loss_of(model(each), target).backward()
    return {name: tensor.grad / num_microbatches for name, tensor in model.named_parameters()}


def run_in_torch(rank: int, folder: Path, cases: list[tuple[str, tuple[int, ...], int]]) -> None:
    """One rank: each case's schedule file, and gradients to its name and `{rank}.pt`.

    A case is its name, the rank of each stage and the number of microbatches.
    """
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo")
    try:
        for name, rank_of, number in cases:
            found = _gradients(rank, folder / f"{name}.csv", rank_of, number)
            torch.save(found, folder / f"{name}{rank}.pt")
            dist.barrier()  # nobody closes what a peer still reads
    finally:
        dist.destroy_process_group()


def _gradients(
    rank: int, file: Path, rank_of: tuple[int, ...], number: int
) -> dict[str, torch.Tensor | None]:
    """Those of the second of two steps by a schedule file."""
    num_stages = len(rank_of)
    mine = {stage: module for stage, module in enumerate(layers(num_stages)) if rank_of[stage] == rank}
    stages = [PipelineStage(mine[stage], stage, num_stages, torch.device("cpu")) for stage in mine]
    schedule = _PipelineScheduleRuntime(stages, number, loss_fn=loss_of)
    schedule._load_csv(str(file), format="compute_only")
    tokens, targets = batch(number)
    for _ in range(2):
        for module in mine.values():
            module.zero_grad()
        given = (tokens,) if 0 in mine else ()
        schedule.step(*given, target=targets if num_stages - 1 in mine else None)
    return {
        f"{stage}.{name}": tensor.grad
        for stage, module in mine.items()
        for name, tensor in module.named_parameters()
    }
