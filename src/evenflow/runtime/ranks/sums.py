"""Gradients and parameters on their way between data ranks: in buckets, several tensors at a time."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from evenflow.graph.nouns.dtensors import local_part, with_local
from evenflow.runtime.ranks.world import Pending, World

BUCKET_BYTES = 25 * 2**20  # as torch's DistributedDataParallel has them

Named = tuple[str, torch.nn.Parameter]


def tell(world: World, named: Iterable[Named], source: Callable[[str], int]) -> None:
    """Give every rank the numbers that parameters have on those that `source` names; collective."""
    alike: dict[tuple[int, torch.dtype], list[torch.nn.Parameter]] = {}
    for name, parameter in named:
        alike.setdefault((source(name), parameter.dtype), []).append(parameter)
    for (rank, _), parameters in alike.items():
        for bucket in buckets_of(parameters):
            parts = [local_part(parameter.data) for parameter in bucket]
            flat = torch.cat([part.reshape(-1) for part in parts])
            world.broadcast(flat, rank).wait()
            for part, numbers in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
                part.copy_(numbers.view_as(part))


@dataclass(slots=True)
class Sum:
    """A bucket on its way. `exist` counts the ranks that have a gradient at all, of each parameter."""

    parameters: Sequence[torch.nn.Parameter]
    flat: torch.Tensor
    exist: torch.Tensor
    misses: bool  # whether this rank has none of some parameter
    works: Sequence[Pending]
    target: int | None

    @staticmethod
    def begun(world: World, parameters: Sequence[torch.nn.Parameter], target: int | None) -> "Sum":
        """Sum the gradients of these parameters, of one type, into one memory."""
        there = [parameter.grad is not None for parameter in parameters]
        rows = [
            local_part(torch.zeros_like(each) if each.grad is None else each.grad).detach().reshape(-1)
            for each in parameters
        ]
        flat = rows[0] if len(rows) == 1 else torch.cat(rows)  # one alone is summed where it is
        exist = torch.tensor(there, dtype=torch.int32).to(flat.device)
        for parameter in parameters:
            parameter.grad = None
        works = [world.add_up(each, target) for each in (flat, exist)]
        return Sum(parameters, flat, exist, not all(there), works, target)

    def finish(self, rank: int) -> None:
        """Wait, and give the parameters their sums, where this rank has them."""
        for work in self.works:
            work.wait()
        if self.target not in (None, rank):
            return
        parts = self.flat.split([local_part(parameter).numel() for parameter in self.parameters])
        exist = self.exist.tolist() if self.misses else [1] * len(parts)
        for parameter, part, number in zip(self.parameters, parts, exist, strict=True):
            summed = with_local(parameter, part.view_as(local_part(parameter)))
            parameter.grad = summed if number else None


def buckets_of(parameters: Sequence[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """In turn, each of as many as fit, at least one."""
    buckets: list[list[torch.nn.Parameter]] = []
    filled = BUCKET_BYTES
    for parameter in parameters:
        if filled + parameter.nbytes > BUCKET_BYTES:
            buckets.append([])
            filled = 0
        buckets[-1].append(parameter)
        filled += parameter.nbytes
    return buckets
