"""What the runtime is measured on: models as chains of units, which any pipeline can cut."""

import itertools
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import emulated
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import evenflow

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
VOCABULARY, WIDTH, LENGTH, BLOCKS = 8192, 256, 128, 8


@dataclass(frozen=True)
class Workload:
    """A chain of units, a batch (inputs and targets, a microbatch a row), and the loss of a microbatch.

    `cuts` are the units before which a pipeline of so many stages is cut.
    """

    chain: nn.Sequential
    inputs: torch.Tensor
    targets: torch.Tensor
    loss: Loss
    cuts: Callable[[int], tuple[int, ...]]

    def stages(self, number: int) -> list[nn.Sequential]:
        """The chain, cut."""
        edges = (0, *self.cuts(number), len(self.chain))
        units = list(self.chain.named_children())
        return [nn.Sequential(OrderedDict(units[start:end])) for start, end in itertools.pairwise(edges)]


def gradients_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what there is of a module's gradients, by name."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


class _Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[rows, length] of tokens to [rows, length, width]."""
        return self.tokens(tokens) + self.places.weight  # type: ignore[no-any-return]  # torch types no calls


class _Block(nn.Module):
    """A pre-norm transformer block with 4 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.grow, self.shrink = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, length, width] to the same."""
        rows, length, width = x.shape
        heads = self.attention(self.norm1(x)).view(rows, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind()
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + self.shrink(F.gelu(self.grow(self.norm2(x))))  # type: ignore[no-any-return]  # as above


class _Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, length, width] to [rows, length, vocabulary]."""
        return self.out(self.norm(x))  # type: ignore[no-any-return]  # as above


def gpt(num_microbatches: int) -> Workload:
    """Workload A: a small GPT, cut where measured costs balance."""
    torch.manual_seed(0)
    chain = nn.Sequential(_Embedding(), *(_Block() for _ in range(BLOCKS)), _Head())
    tokens = torch.randint(0, VOCABULARY, (num_microbatches, LENGTH + 1))

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    costs = _unit_costs(chain, tokens[:1, :-1], tokens[:1, 1:], loss)
    return Workload(chain, tokens[:, :-1], tokens[:, 1:], loss, lambda number: balanced(costs, number))


def gpt_pipeline(schedule: str, num_microbatches: int) -> tuple[evenflow.Pipeline, dict[str, torch.Tensor]]:
    """Workload A on this run's ranks, a thread and a stage each, with AdamW; and its batch."""
    torch.set_num_threads(1)
    work = gpt(num_microbatches)
    batch = {"x": work.inputs, "y": work.targets}
    pipe = evenflow.pipeline(
        work.chain,
        loss=lambda model, b: work.loss(model(b["x"]), b["y"]),
        example=batch,
        optimizer=lambda named: torch.optim.AdamW([p for _, p in named], lr=1e-4),
        stages=dist.get_world_size(),
        schedule=schedule,
        num_microbatches=num_microbatches,
    )
    return pipe, batch


def asleep(num_stages: int, num_microbatches: int, *, width: int = 4, seconds: float) -> Workload:
    """Workloads B and C: emulated devices, that hand each other rows of `width` numbers."""
    chain = emulated.model(num_stages, (seconds, seconds, seconds))
    return Workload(
        chain,
        torch.zeros(num_microbatches, width),
        torch.zeros(num_microbatches, 1),
        lambda output, _: output.mean(),  # the devices' work is their sleep
        lambda number: tuple(range(1, number)),
    )


def tiny(num_stages: int, num_microbatches: int) -> Workload:
    """Workload D: stages of one tiny layer, which cost nothing."""
    torch.manual_seed(0)
    return Workload(
        nn.Sequential(*(nn.Linear(4, 4) for _ in range(num_stages))),
        torch.zeros(num_microbatches, 4),
        torch.zeros(num_microbatches, 4),
        F.mse_loss,
        lambda number: tuple(range(1, number)),
    )


def _unit_costs(chain: nn.Sequential, inputs: torch.Tensor, targets: torch.Tensor, loss: Loss) -> list[float]:
    """Seconds of each unit's forward and backward; the loss counts with the last."""
    took: list[list[float]] = [[] for _ in chain]
    for _ in range(12):
        ends, starts, x = [], [], inputs
        for number, unit in enumerate(chain):
            given = x.detach().requires_grad_(x.is_floating_point())
            start = time.perf_counter()
            x = unit(given)
            if number == len(chain) - 1:
                x = loss(x, targets)
            starts.append(time.perf_counter() - start)
            ends.append(x)
        for number, x in enumerate(ends):
            start = time.perf_counter()
            x.backward(torch.ones_like(x))
            took[number].append(starts[number] + time.perf_counter() - start)
    chain.zero_grad()
    return [statistics.median(each) for each in took]


def balanced(costs: Sequence[float], number: int) -> tuple[int, ...]:
    """The cuts into 1 or 2 stages of which the longest is shortest."""
    if number == 1:
        return ()
    assert number == 2, "a benchmark of two ranks"
    return (min(range(1, len(costs)), key=lambda cut: max(sum(costs[:cut]), sum(costs[cut:]))),)
