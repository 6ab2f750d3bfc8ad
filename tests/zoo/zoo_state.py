"""Buffers and Python state that a forward changes, branches, early exits, loops as long as the batch says."""

from collections import namedtuple
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from zoo_checks import ROWS, WIDTH, Zoo, many, sequences, token_loss, tokens, vectors
from zoo_inplace import Layers
from zoo_unseen import Block, Stack

ZOO = Zoo()
KEPT = "rotaries.0 cannot be taken apart (it changes its own attributes while it runs: length, table)"


# -- state


@ZOO.model()
def batch_norms():
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()) for _ in range(4)),
        nn.Linear(WIDTH, 1),
    )


@ZOO.model()
def batch_norms_without_momentum():
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH, momentum=None)) for _ in range(4)),
        nn.Linear(WIDTH, 1),
    )


@ZOO.model()
def counters():
    class Inner(Block):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))
            self.register_buffer("warmth", torch.zeros(()), persistent=False)

        def forward(self, x):
            self.calls += 1
            self.warmth = 1 - 0.9 ** self.calls.float()
            return x + self.layer(x) * self.warmth

    return Stack(Inner)


@ZOO.model(refused="changes its own attributes while it runs: calls")
class PythonCounter(Layers):
    """A number, counted up in Python, that scales the result."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.head(self.d(self.c(self.b(self.a(x)))) / self.calls)


@ZOO.model()
def python_counter_in_blocks():
    class Inner(Block):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return x + self.layer(x) / self.calls

    return Stack(Inner)


def committed(model, batch):
    out, commitment, notes = model(batch["x"])
    return F.mse_loss(out, batch["y"]) + 0.1 * commitment, notes


@ZOO.model(loss=committed)
class VQVAE(nn.Module):
    """Vectors are replaced by their nearest in a codebook, which moves with running means."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.decoder = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))
        self.register_buffer("codes", torch.randn(5, WIDTH))
        self.register_buffer("sizes", torch.ones(5))
        self.register_buffer("sums", self.codes.clone())

    def forward(self, x):
        h = self.encoder(x)
        nearest = torch.cdist(h, self.codes).argmin(1)
        found = self.codes[nearest]
        if self.training:
            with torch.no_grad():
                onehot = F.one_hot(nearest, 5).to(h.dtype)
                self.sizes.mul_(0.9).add_(onehot.sum(0), alpha=0.1)
                self.sums.mul_(0.9).add_(onehot.t() @ h, alpha=0.1)
                self.codes.copy_(self.sums / (self.sizes + 1e-5)[:, None])
        commitment = F.mse_loss(h, found.detach())
        found = h + (found - h).detach()
        return self.decoder(found), commitment, {"codes": nearest}


def growing(step):
    with torch.random.fork_rng():
        torch.manual_seed(step)
        lengths = (3, 5, 4) if step == 0 else (7, 6, 2)
        return [{"x": torch.randn(ROWS, n, WIDTH), "y": torch.randn(ROWS, 1)} for n in lengths]


class Rotary(nn.Module):
    """A table of rotations that grows with the sequence, kept in a buffer or in an attribute."""

    def __init__(self, in_buffer):
        super().__init__()
        self.in_buffer, self.length = in_buffer, 0
        if in_buffer:
            self.register_buffer("table", torch.zeros(0, WIDTH // 2), persistent=False)
        else:
            self.table = None

    def forward(self, x):
        if x.shape[1] > self.length:
            self.length = x.shape[1]
            speeds = 1.0 / 100 ** (torch.arange(WIDTH // 2) / (WIDTH // 2))
            self.table = torch.outer(torch.arange(self.length), speeds)
        angles = self.table[: x.shape[1]]
        cos, sin = angles.cos(), angles.sin()
        one, other = x.chunk(2, -1)
        return torch.cat([one * cos - other * sin, one * sin + other * cos], -1)


class RotaryStack(nn.Module):
    def __init__(self, rotaries):
        super().__init__()
        self.rotaries = nn.ModuleList(rotaries)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(self.rotaries[i % len(self.rotaries)](x)).tanh()
        return self.head(x.mean(1))


@ZOO.model(items=growing)
def rotary_attribute_of_each_block():
    return RotaryStack([Rotary(False) for _ in range(4)])


@ZOO.model(items=growing, refused=KEPT)
def rotary_attribute_of_all_blocks():
    return RotaryStack([Rotary(False)])


@ZOO.model(items=sequences, refused=KEPT)
def rotary_attribute_of_one_length():
    return RotaryStack([Rotary(False)])


@ZOO.model(items=sequences)
def rotary_buffer_of_one_length():
    class Ready(Rotary):
        def __init__(self):
            super().__init__(True)
            self.length, self.table = 6, torch.randn(6, WIDTH // 2)

    return RotaryStack([Ready()])


@ZOO.model(items=growing)
class CachedMask(nn.Module):
    """Causal masks kept in a dict by length."""

    def __init__(self):
        super().__init__()
        self.masks = {}
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, 1)

    def mask(self, n):
        if n not in self.masks:
            self.masks[n] = torch.full((n, n), float("-inf")).triu(1)
        return self.masks[n]

    def forward(self, x):
        for layer in self.layers:
            h = layer(x)
            x = x + (h @ h.mT + self.mask(x.shape[1])).softmax(-1) @ h
        return self.head(x.mean(1))


@ZOO.model()
class MovingAverageOfAParameter(Layers):
    """Batch statistics and a moving average of a weight (as self-distillation keeps)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", self.a.weight.detach().clone())

    def forward(self, x):
        with torch.no_grad():
            self.mean.lerp_(self.a.weight, 0.1)
        h = self.a(x) + F.linear(x, self.mean)
        return self.head(self.d(self.c(self.b(h))))


@ZOO.model(loss=lambda model, batch: model(batch["x"], batch["y"]))
class MemoryBank(nn.Module):
    """Keys of earlier microbatches, in a ring."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
        self.register_buffer("bank", torch.randn(12, WIDTH))
        self.register_buffer("at", torch.zeros((), dtype=torch.long))

    def forward(self, x, y):
        keys = F.normalize(self.net(x), dim=1)
        scores = keys @ self.bank.clone().t()
        with torch.no_grad():
            places = (self.at + torch.arange(x.shape[0])) % 12
            self.bank[places] = keys.detach()
            self.at += x.shape[0]
        return -scores.log_softmax(1)[:, 0].mean() + (keys[:, :1] - y).square().mean()


# -- branches


@ZOO.model()
class BranchOnTheBatch(Layers):
    def forward(self, x):
        h = self.a(x)
        h = self.b(h) if x.mean() > 0 else self.b(h).tanh() * 2
        h = self.c(h) if bool((x[0] > 0).any()) else h
        return self.head(self.d(h))


def flagged(step):
    items = vectors(step)
    for number, item in enumerate(items):
        item["skip"] = torch.tensor(number % 2 == step)
        item["depth"] = [1, 3, 2][(number + step) % 3]
    return items


@ZOO.model(items=flagged, loss=lambda model, batch: F.mse_loss(model(batch["x"], batch["skip"]), batch["y"]))
class EarlyExit(Layers):
    def forward(self, x, skip):
        h = self.b(self.a(x))
        if skip:
            return self.head(h)
        return self.head(self.d(self.c(h)))


@ZOO.model(items=flagged, loss=lambda model, batch: F.mse_loss(model(batch["x"], batch["depth"]), batch["y"]))
class DepthOfTheBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x, depth):
        for layer in self.layers[: depth + 1]:
            x = layer(x).relu()
        return self.head(x)


def counted(step):
    items = vectors(step)
    for number, item in enumerate(items):
        item["n"] = torch.tensor([2, 4, 3][(number + step) % 3])
    return items


@ZOO.model(
    items=counted,
    shared=True,
    loss=lambda model, batch: F.mse_loss(model(batch["x"], batch["n"]), batch["y"]),
)
class LoopOfTheBatch(Layers):
    """As many rounds of one layer as a number in the batch says."""

    def forward(self, x, n):
        h = self.a(x)
        for _ in range(int(n)):
            h = h + self.b(h).tanh()
        return self.head(self.d(self.c(h)))


@ZOO.model(refused="numbers that depend on the parameters")
class BranchOnAParameter(Layers):
    def forward(self, x):
        h = self.a(x)
        h = self.b(h) if h.mean() > 0 else self.c(h)
        return self.head(self.d(h))


# -- ragged


def ragged(step):
    def make():
        lengths = torch.randint(1, 6, (ROWS,)).sort(descending=True).values
        lengths[0] = 6
        return {"x": torch.randn(ROWS, 6, WIDTH), "lengths": lengths, "y": torch.randn(ROWS, 1)}

    return many(step, make)


def ragged_loss(model, batch):
    return F.mse_loss(model(batch["x"], batch["lengths"]), batch["y"])


@ZOO.model(items=ragged, loss=ragged_loss)
class PackedLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.rnn = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True, bidirectional=True)
        self.leave = nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(self.enter(x), lengths, batch_first=True, enforce_sorted=False)
        out, (h, c) = self.rnn(packed)
        out, _ = pad_packed_sequence(out, batch_first=True)
        return self.head(self.leave(out.sum(1)) + h[-1] + c[0])


@ZOO.model(items=ragged, loss=ragged_loss)
class PaddedMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x, lengths):
        mask = torch.arange(x.shape[1])[None] < lengths[:, None]
        for layer in self.layers:
            x = layer(x).relu() * mask[..., None]
        return self.head(x.sum(1) / lengths[:, None])


@ZOO.model(items=ragged, loss=ragged_loss)
class RowsOfTheirOwnLength(nn.Module):
    """Each row cut to its length: shapes depend on the batch's numbers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x, lengths):
        x = self.c(self.b(self.a(x)).tanh())
        rows = [row[:n].mean(0) for row, n in zip(x, lengths.tolist(), strict=True)]
        return self.head(torch.stack(rows))


@ZOO.model(items=ragged, loss=ragged_loss)
class ValidPositionsOnly(nn.Module):
    """Padding is taken out before the layers by a boolean index from the batch."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x, lengths):
        mask = torch.arange(x.shape[1])[None] < lengths[:, None]
        valid = self.layers(x[mask])
        rows = mask.nonzero()[:, 0]
        summed = torch.zeros(x.shape[0], WIDTH).index_add(0, rows, valid)
        return self.head(summed / lengths[:, None])


@ZOO.model(items=tokens, loss=token_loss)
class IgnoresPadding(nn.Module):
    """The loss is taken where the mask of the batch says, of what depends on the parameters."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, WIDTH)
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, x):
        h = self.layers(self.embed(x))
        keep = x > 3
        return self.head(torch.where(keep[..., None], h, torch.zeros_like(h)))


def masked_loss(model, batch):
    logits = model(batch["x"])
    keep = batch["y"] > 3
    return F.cross_entropy(logits[keep], batch["y"][keep])


@ZOO.model(
    items=tokens,
    loss=masked_loss,
)
def boolean_index_of_results():
    return nn.Sequential(
        nn.Embedding(16, WIDTH), *(nn.Linear(WIDTH, WIDTH) for _ in range(3)), nn.Linear(WIDTH, 16)
    )


# -- results of every kind


@dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]
    loss: torch.Tensor | None = None
    name: str = "output"


def with_the_output(model, batch):
    out = model(batch["x"])
    return F.mse_loss(out.logits, batch["y"]), out


@ZOO.model(loss=with_the_output)
class ReturnsADataclass(Layers):
    def forward(self, x):
        kept = []
        for layer in (self.a, self.b, self.c, self.d):
            x = layer(x).tanh()
            kept.append(x)
        return Output(self.head(x), tuple(kept))


Pair = namedtuple("Pair", ["prediction", "features"])


def with_the_pair(model, batch):
    out = model(batch["x"])
    return F.mse_loss(out.prediction, batch["y"]), {"all": [out, None, "x"]}


@ZOO.model(loss=with_the_pair)
class ReturnsANamedTuple(Layers):
    def forward(self, x):
        h = self.b(self.a(x))
        return Pair(self.head(self.d(self.c(h))), h)


def of_every_type(model, batch):
    out = model(batch["x"])
    loss = F.mse_loss(out["prediction"], batch["y"])
    notes = {
        "correct": (out["prediction"] > 0).sum(),
        "rows": len(batch["x"]),
        "any": (batch["x"] > 2).any(),
        "text": out["kind"],
        "nothing": out["cache"],
        "half": out["prediction"].detach().to(torch.bfloat16),
        "shape": batch["x"].shape,
        "pair": (0.5, True),
        "loss": loss,
        "complex": out["prediction"].detach().to(torch.complex64),
    }
    return loss, notes


@ZOO.model(loss=of_every_type)
class ReturnsADict(Layers):
    def forward(self, x):
        h = self.c(self.b(self.a(x)))
        return {"prediction": self.head(self.d(h)), "cache": None, "kind": "regression"}


@ZOO.model(loss=lambda model, batch: model(batch["x"]))
class ReturnsABuffer(Layers):
    """What comes back beside the loss is a counter that the next microbatch changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.seen += len(x)
        return self.head(self.d(self.c(self.b(self.a(x))))).square().mean(), self.seen


@ZOO.model(loss=lambda model, batch: (model(batch["x"]).square().mean(), model.a.weight.norm()), shared=True)
class ReturnsANormOfAWeight(Layers):
    def forward(self, x):
        return self.head(self.d(self.c(self.b(self.a(x)))))


@ZOO.model(
    loss=lambda model, batch: (model(batch["x"]).square().mean(), model.d.bias),
    refused="returns the parameter d.bias itself; return its clone()",
)
class ReturnsAParameter(Layers):
    def forward(self, x):
        return self.head(self.d(self.c(self.b(self.a(x)))))
