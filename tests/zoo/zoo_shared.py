"""Parameters that are used more than once."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from zoo_checks import WIDTH, Zoo, token_loss, tokens
from zoo_inplace import Layers

ZOO = Zoo()
VOCABULARY = 16


@ZOO.model(loss=token_loss, items=tokens, shared=True)
class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.blocks(self.embed(x)))


@ZOO.model(loss=token_loss, items=tokens, shared=True)
class TiedByFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.bias = nn.Parameter(torch.zeros(VOCABULARY))

    def forward(self, x):
        h = self.embed(x) * WIDTH**0.5
        for block in self.blocks:
            h = h + block(h).relu()
        return h @ self.embed.weight.T + self.bias


@ZOO.model(shared=True)
class OneLayerManyTimes(Layers):
    def forward(self, x):
        for _ in range(5):
            x = torch.tanh(self.a(x))
        return self.head(x)


@ZOO.model(shared=True)
class FarApart(Layers):
    """One vector added near the start and again near the end."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        h = self.a(x) + self.shift
        h = self.d(self.c(self.b(h).tanh()).tanh())
        return self.head(h * self.shift)


@ZOO.model(shared=True, stages=(3, 4))
class RecurrentDepth(nn.Module):
    """One transformer block looped six times, fed the input each time."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.block = nn.ModuleDict(
            {
                "norm": nn.LayerNorm(WIDTH),
                "up": nn.Linear(WIDTH, 2 * WIDTH),
                "down": nn.Linear(2 * WIDTH, WIDTH),
            }
        )
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        start = state = self.enter(x)
        for _ in range(6):
            inner = self.block["up"](self.block["norm"](state + start))
            state = state + self.block["down"](F.gelu(inner))
        return self.head(state)


@ZOO.model(shared=True)
class UniversalTransformer(nn.Module):
    """One nn.TransformerEncoderLayer used three times."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        h = x[:, None] * torch.ones(3, 1)
        for step in range(3):
            h = self.layer(h + step / 3)
        return self.head(h.mean(1))


def normed(layer):
    return parametrizations.weight_norm(layer)


@ZOO.model()
def weight_norm():
    layers = (nn.Sequential(normed(nn.Linear(WIDTH, WIDTH)), nn.ReLU()) for _ in range(4))
    return nn.Sequential(*layers, nn.Linear(WIDTH, 1))


@ZOO.model(shared=True)
def spectral_norm():
    layers = (
        nn.Sequential(parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)), nn.ReLU()) for _ in range(4)
    )
    return nn.Sequential(*layers, nn.Linear(WIDTH, 1))


@ZOO.model()
def old_weight_norm():
    """By hooks, as torch's older function does."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = (nn.Sequential(nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH)), nn.ReLU()) for _ in range(4))
        return nn.Sequential(*layers, nn.Linear(WIDTH, 1))


@ZOO.model()
def old_spectral_norm():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = (nn.Sequential(nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH)), nn.ReLU()) for _ in range(4))
        return nn.Sequential(*layers, nn.Linear(WIDTH, 1))


@ZOO.model()
def orthogonal():
    layers = (
        nn.Sequential(parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH)), nn.Tanh()) for _ in range(4)
    )
    return nn.Sequential(*layers, nn.Linear(WIDTH, 1))


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).transpose(-1, -2)


@ZOO.model(shared=True)
def own_parametrization():
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(4)]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", Symmetric())
    return nn.Sequential(*layers, nn.Linear(WIDTH, 1))


@ZOO.model(shared=True)
class ParametrizedAndReused(nn.Module):
    """A parametrised layer used three times, its weight computed once (parametrize.cached)."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        parametrize.register_parametrization(self.layer, "weight", Symmetric())
        self.other = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        with parametrize.cached():
            x = self.layer(x).tanh()
            x = self.other(x)
            x = self.layer(x).tanh()
            return self.head(self.layer(x))


@ZOO.model(shared=True)
class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        one, other = self.tower(x), self.tower(x.flip(0))
        return self.head((one - other).abs())


@ZOO.model(shared=True)
class Autoencoder(Layers):
    """The decoder's weights are the encoder's, transposed."""

    def forward(self, x):
        h = self.b(self.a(x).tanh()).tanh()
        back = F.linear(F.linear(h, self.b.weight.t()).tanh(), self.a.weight.t())
        return self.head(self.d(self.c(back)))


@ZOO.model(shared=True)
class CrossLayerGroups(nn.Module):
    """ALBERT-like: two groups of layers in turn."""

    def __init__(self):
        super().__init__()
        self.groups = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(2)
        )
        self.layers = nn.ModuleList(self.groups[i % 2] for i in range(5))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


@ZOO.model(shared=True)
class SliceOfOneParameter(nn.Module):
    """One big parameter, of which every layer uses a slice."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(4, WIDTH, WIDTH) / 3)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        for weight in self.weights:
            x = torch.tanh(x @ weight)
        for i in range(2):
            x = x + F.linear(x, self.weights[i])
        return self.head(x)


@ZOO.model(shared=True)
class WeightDecayInTheLoss(Layers):
    """A penalty over all parameters, beside the data's loss."""

    def forward(self, x):
        h = self.head(self.d(self.c(self.b(self.a(x)).tanh())))
        return h + 1e-3 * sum(p.square().sum() for p in self.parameters())


def penalised(model, batch):
    penalty = sum(p.abs().sum() for name, p in model.named_parameters() if name.endswith("weight"))
    return F.mse_loss(model(batch["x"]), batch["y"]) + 1e-3 * penalty


@ZOO.model(loss=penalised, shared=True)
def lasso():
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)), nn.Linear(WIDTH, 1))
