"""A small mixture-of-experts transformer: a router sends each token to one of four experts.

    python examples/mixture_of_experts.py                              # one process, both stages
    torchrun --nproc-per-node 2 examples/mixture_of_experts.py         # one process per stage

The routers' balance loss (Fedus et al., "Switch Transformers", 2021) goes through the stages beside the
activations and is added to the last one's loss. It is a product of two means over tokens: the share that each
expert got, and the share that was wished for it. Each microbatch makes its own, and the mean of such products
is not the product of the means: as in any accumulation of gradients, every microbatch is asked to be balanced
in itself, and the loss is a little larger than the whole batch's. Larger microbatches bring the two together.
The first lines printed compare them.
"""

import torch
from torch import Tensor, nn

import evenflow

NUM_SYMBOLS = 16
LENGTH = 16
NUM_STEPS = 80
BALANCE_WEIGHT = 0.05


class Experts(nn.Module):
    """Perceptrons, of which each token passes through the one that the router likes best."""

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, num_experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(num_experts)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the experts make of (batch, length, width), and the balance loss: 1 where all get alike."""
        tokens = x.flatten(0, 1)
        probabilities = self.router(tokens).softmax(-1)
        gate, chosen = probabilities.max(-1)
        mixed = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            mine = torch.where(chosen == number)[0]  # so many as there are: another number in each step
            mixed = mixed.index_add(0, mine, gate[mine, None] * expert(tokens[mine]))
        num_experts = len(self.experts)
        got = nn.functional.one_hot(chosen, num_experts).float().mean(0)
        balance = num_experts * (got * probabilities.mean(0)).sum()
        return mixed.view_as(x), balance


class Block(nn.Module):
    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, num_heads=4, batch_first=True)
        self.experts = Experts(width, num_experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        mixed, balance = self.experts(self.norm2(x))
        return x + mixed, balance


class Sorter(nn.Module):
    def __init__(self, width: int = 32, num_layers: int = 2, num_experts: int = 4) -> None:
        super().__init__()
        self.symbols = nn.Embedding(NUM_SYMBOLS, width)
        self.positions = nn.Embedding(LENGTH, width)
        self.layers = nn.ModuleList(Block(width, num_experts) for _ in range(num_layers))
        self.output = nn.Linear(width, NUM_SYMBOLS)

    def forward(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the mean of the layers' balance losses."""
        x = self.symbols(row) + self.positions(torch.arange(LENGTH, device=row.device))
        balances = []
        for layer in self.layers:
            x, balance = layer(x)
            balances.append(balance)
        return self.output(x), torch.stack(balances).mean()


def loss(model: nn.Module, microbatch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The model is to sort a row of symbols; both parts of the loss come back as metrics."""
    logits, balance = model(microbatch["row"])
    target = microbatch["row"].sort(1).values
    wrong = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
    return wrong + BALANCE_WEIGHT * balance, {"cross entropy": wrong.detach(), "balance": balance.detach()}


def main() -> None:
    torch.manual_seed(0)
    loader = [{"row": torch.randint(NUM_SYMBOLS, (64, LENGTH))} for _ in range(NUM_STEPS)]
    model = Sorter()
    whole = float(loss(model, loader[0])[1]["balance"])
    pipe = evenflow.pipeline(
        model,
        loss=loss,
        example=loader[0],
        optimizer=lambda named_parameters: torch.optim.AdamW(named_parameters, lr=5e-3),
        stages=2,
        num_microbatches=8,
        device="cuda" if torch.cuda.device_count() >= 2 else "cpu",
    )
    for number, batch in enumerate(pipe.feed(loader), start=1):
        metrics = pipe.step(batch).metrics
        if pipe.is_main:
            if number == 1:
                print(f"balance loss of the whole batch {whole:.4f}")
                print(f"mean of its 8 microbatches'     {float(metrics['balance']):.4f}")
            if number == 1 or number % 20 == 0:
                told = ", ".join(f"{name} {float(metric):.3f}" for name, metric in metrics.items())
                print(f"step {number}: {told}")


if __name__ == "__main__":
    main()
