"""How values flow through known architectures: skips, conditions, collected outputs, experts, parts."""

import itertools
import math

import torch
from torch import nn
from torch.nn import functional as F
from zoo_checks import ROWS, WIDTH, Zoo, images, many, sequences, token_loss, tokens, vectors
from zoo_inplace import Layers
from zoo_unseen import Block, Stack

ZOO = Zoo()
CHECKS = "torch.distributions checks its arguments with `if not valid.all()`: a branch on parameters"


def two_losses(model, batch):
    prediction, extra = model(batch["x"])
    loss = F.mse_loss(prediction, batch["y"])
    return loss + 0.01 * extra, {"extra": extra}


@ZOO.model(items=images)
class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        widths = (3, 4, 6, 8)
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(2, b), nn.SiLU())
            for a, b in itertools.pairwise(widths)
        )
        self.middle = nn.Conv2d(8, 8, 1)
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * b, a, 2, stride=2) for a, b in ((4, 6), (6, 8)))
        self.head = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x):
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = self.up[1](torch.cat([x, skips.pop()], 1))
        x = self.up[0](torch.cat([x, skips.pop()], 1))
        return self.head(torch.cat([x, skips.pop()], 1)).mean((2, 3))


def noisy(step):
    def make():
        return {
            "x": torch.randn(ROWS, 4, WIDTH),
            "t": torch.randint(0, 100, (ROWS,)),
            "noise": torch.randn(ROWS, 4, WIDTH),
        }

    return many(step, make)


def diffusion_loss(model, batch):
    alpha = torch.cos(batch["t"] / 100 * math.pi / 2)[:, None, None]
    noised = alpha * batch["x"] + (1 - alpha**2).sqrt() * batch["noise"]
    return F.mse_loss(model(noised, batch["t"]), batch["noise"])


def waves(t, width):
    speeds = torch.exp(-math.log(1000) * torch.arange(width // 2) / (width // 2))
    angles = t[:, None].float() * speeds[None]
    return torch.cat([angles.cos(), angles.sin()], -1)


@ZOO.model(items=noisy, loss=diffusion_loss)
class DiT(nn.Module):
    """One conditioning vector modulates every block."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
            self.modulation = nn.Linear(WIDTH, 3 * WIDTH)
            self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(approximate="tanh"), nn.Linear(16, WIDTH))

        def forward(self, x, c):
            shift, scale, gate = self.modulation(F.silu(c))[:, None].chunk(3, -1)
            h = self.norm(x) * (1 + scale) + shift
            x = x + gate * self.attention(h, h, h, need_weights=False)[0]
            return x + self.mlp(x)

    def __init__(self):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(self.Inner() for _ in range(4))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, t):
        c = self.time(waves(t, WIDTH))
        for block in self.blocks:
            x = block(x, c)
        return self.head(x)


@ZOO.model(items=sequences)
class EncoderAndDecoder(nn.Module):
    """The encoder's output goes to every layer of the decoder."""

    def __init__(self):
        super().__init__()
        arguments = {"d_model": WIDTH, "nhead": 2, "dim_feedforward": 16, "dropout": 0.0, "batch_first": True}
        self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(**arguments) for _ in range(2))
        self.decoder = nn.ModuleList(nn.TransformerDecoderLayer(**arguments) for _ in range(3))
        self.start = nn.Parameter(torch.randn(1, 2, WIDTH))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        for layer in self.encoder:
            x = layer(x)
        y = self.start.expand(len(x), -1, -1)
        for layer in self.decoder:
            y = layer(y, x)
        return self.head(y.mean(1))


@ZOO.model(items=sequences)
class TorchTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Transformer(WIDTH, 2, 2, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.net(x, x.flip(1), tgt_mask=mask, tgt_is_causal=True).mean(1))


@ZOO.model(items=sequences, draws=True)
class TransformerWithDropout(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.2, batch_first=True, norm_first=True)
        self.net = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[:, -1] = True
        return self.head(self.net(x, src_key_padding_mask=padding).mean(1))


@ZOO.model()
class CollectsOutputs(Layers):
    """DenseNet-like: each layer's output goes on to all later ones, and all to the head."""

    def forward(self, x):
        found = [x]
        for layer in (self.a, self.b, self.c, self.d):
            found.append(layer(torch.stack(found).mean(0)).tanh())
        return self.head(sum(found) / len(found))


@ZOO.model(loss=two_losses)
class LossOfEveryLayer(nn.Module):
    """Mixture of experts in its dense form, with a balance loss from every layer."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(WIDTH, 4, bias=False)
            self.up = nn.Parameter(torch.randn(4, WIDTH, 16) / 3)
            self.down = nn.Parameter(torch.randn(4, 16, WIDTH) / 3)

        def forward(self, x):
            scores = self.router(x).softmax(-1)
            top, chosen = scores.topk(2, dim=-1)
            weights = (F.one_hot(chosen, 4).to(x.dtype) * (top / top.sum(-1, keepdim=True))[..., None]).sum(
                -2
            )
            h = torch.einsum("nd,edh->neh", x, self.up).relu()
            h = torch.einsum("neh,ehd->ned", h, self.down)
            balance = 4 * (scores.mean(0) * (weights > 0).float().mean(0)).sum()
            return x + torch.einsum("ned,ne->nd", h, weights), balance

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(self.Experts() for _ in range(3))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        total = 0.0
        for layer in self.layers:
            x, balance = layer(x)
            total = total + balance
        return self.head(x), total


class SparseExperts(nn.Module):
    """Each expert gets the rows that chose it."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == number)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, place, None])
        return x + out


@ZOO.model()
def experts_by_index():
    return Stack(SparseExperts)


@ZOO.model()
def experts_routed_by_the_batch():
    """Hash routing: the expert of a row is a function of the batch, not of parameters."""

    class Hashed(Stack):
        def forward(self, x):
            chosen = (x[:, 0] * 100).long() % 3
            h = self.blocks[0](x)
            for block in self.blocks[1:]:
                out = torch.zeros_like(h)
                for number, expert in enumerate(block):
                    rows = (chosen == number).nonzero().squeeze(1)
                    if rows.numel():
                        out.index_add_(0, rows, expert(h[rows]))
                h = h + out
            return self.head(h)

    kinds = iter(
        [
            nn.Linear(WIDTH, WIDTH),
            *(nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3)) for _ in range(3)),
        ]
    )
    return Hashed(lambda: next(kinds))


@ZOO.model(items=sequences)
def recurrent_layers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
            self.lstm = nn.LSTM(WIDTH, WIDTH, 2, batch_first=True)
            self.rnn = nn.RNN(WIDTH, WIDTH, nonlinearity="relu", batch_first=True)
            self.head = nn.Linear(WIDTH, 1)

        def forward(self, x):
            x, state = self.gru(x)
            x, (h, c) = self.lstm(x, (state.repeat(2, 1, 1), torch.zeros(2, len(x), WIDTH)))
            x, last = self.rnn(x, h[:1])
            return self.head(x[:, -1] + c[0] + last[0])

    return Model()


@ZOO.model(items=sequences, shared=True)
class CellsInALoop(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.cell = nn.LSTMCell(WIDTH, WIDTH)
        self.attend = nn.Linear(WIDTH, 1)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        h = c = torch.zeros(len(x), WIDTH)
        states = []
        for row in self.enter(x).unbind(1):
            h, c = self.cell(row, (h, c))
            states.append(h)
        states = torch.stack(states, 1)
        return self.head((self.attend(states).softmax(1) * states).sum(1))


@ZOO.model(
    items=lambda step: many(step, lambda: {"x": torch.randint(0, 16, (ROWS, 5)), "y": torch.randn(ROWS, 1)})
)
class EmbeddingBags(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = nn.EmbeddingBag(16, WIDTH, mode="mean")
        self.most = nn.EmbeddingBag(16, WIDTH, mode="max")
        self.mix = nn.Bilinear(WIDTH, WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        flat, offsets = x.flatten(), torch.arange(0, x.numel(), x.shape[1])
        return self.head(self.mix(self.mean(x), self.most(flat, offsets)))


@ZOO.model(items=images)
class EveryConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(3, 4, 3, padding=1)
        self.back = nn.ConvTranspose1d(4, 4, 2, stride=2)
        self.two = nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=2)
        self.norm = nn.InstanceNorm2d(6, affine=True)
        self.three = nn.Conv3d(1, 2, 3, padding=1, padding_mode="circular")
        self.group = nn.GroupNorm(3, 12)
        self.head = nn.Linear(12, 1)

    def forward(self, x):
        h = self.back(self.one(x.flatten(2)).relu()).view(len(x), 4, 16, 8)
        h = self.norm(self.two(h)).relu()
        h = self.three(F.avg_pool2d(h, 4)[:, None]).flatten(1, 2)
        return self.head(F.adaptive_avg_pool2d(self.group(h), 1).flatten(1))


@ZOO.model(items=sequences)
class Fourier(nn.Module):
    """FNet and a Fourier neural operator: complex values cross the cuts."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(
            torch.randn(4, WIDTH, WIDTH, dtype=torch.cfloat) / 5 for _ in range(3)
        )
        self.skips = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        for weight, skip in zip(self.weights, self.skips, strict=True):
            modes = torch.fft.rfft(x, dim=1)
            modes = torch.einsum("bmi,mio->bmo", modes, weight)
            x = torch.fft.irfft(modes, n=x.shape[1], dim=1) + skip(x).relu()
        x = torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real
        return self.head(x.mean(1))


@ZOO.model(items=sequences)
class Scan(nn.Module):
    """A gated linear recurrence, written as a loop over time (Mamba-like)."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter = nn.Linear(WIDTH, 3 * WIDTH)
            self.decay = nn.Parameter(torch.rand(WIDTH))
            self.leave = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            gate, value, step = self.enter(x).chunk(3, -1)
            decay = torch.exp(-F.softplus(step) * self.decay)
            state, states = x.new_zeros(len(x), WIDTH), []
            for t in range(x.shape[1]):
                state = decay[:, t] * state + value[:, t]
                states.append(state)
            return x + self.leave(torch.stack(states, 1) * F.silu(gate))

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(self.Inner() for _ in range(3)))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        return self.head(self.blocks(x)[:, -1])


def graphs(step):
    def make():
        return {"x": torch.randn(6, WIDTH), "edges": torch.randint(0, 6, (6, 2)), "y": torch.randn(6, 1)}

    return many(step, make)


@ZOO.model(
    items=graphs, loss=lambda model, batch: F.mse_loss(model(batch["x"], batch["edges"].t()), batch["y"])
)
class GraphNetwork(nn.Module):
    class Inner(nn.Module):
        def __init__(self, add):
            super().__init__()
            self.message, self.update = nn.Linear(2 * WIDTH, WIDTH), nn.GRUCell(WIDTH, WIDTH)
            self.add = add

        def forward(self, x, edges):
            source, target = edges
            messages = self.message(torch.cat([x[source], x[target]], -1)).relu()
            zeros = torch.zeros_like(x)
            if self.add == "index":
                total = zeros.index_add(0, target, messages)
            elif self.add == "scatter":
                total = zeros.scatter_add_(0, target[:, None].expand_as(messages), messages)
            else:
                total = zeros.scatter_reduce(0, target[:, None].expand_as(messages), messages, "amax")
            return self.update(total, x)

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(self.Inner(add) for add in ("index", "scatter", "max"))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x, edges):
        for layer in self.layers:
            x = layer(x, edges)
        return self.head(x)


def adversarial(model, batch):
    fake = model["generator"](batch["x"])
    real = batch["x"].flip(0)
    judge = model["judge"]
    for_generator = F.softplus(-judge(fake)).mean()
    for_judge = F.softplus(judge(fake.detach())).mean() + F.softplus(-judge(real)).mean()
    return for_generator + for_judge, {"generator": for_generator, "judge": for_judge.item()}


def adversarial_without_item(model, batch):
    fake = model["generator"](batch["x"])
    judge = model["judge"]
    for_generator = F.softplus(-judge(fake)).mean()
    for_judge = F.softplus(judge(fake.detach())).mean() + F.softplus(-judge(batch["x"].flip(0))).mean()
    return for_generator + for_judge, {"generator": for_generator, "judge": for_judge.detach()}


@ZOO.model(loss=adversarial_without_item, shared=True)
def adversaries():
    return nn.ModuleDict({"generator": _mlp(WIDTH, WIDTH), "judge": _mlp(WIDTH, 1)})


@ZOO.model(
    loss=adversarial,
    shared=True,
    refused="calls item on numbers that depend on the parameters",
)
def adversaries_with_item():
    """`.item()` of a loss beside the loss: a number that depends on parameters."""
    return nn.ModuleDict({"generator": _mlp(WIDTH, WIDTH), "judge": _mlp(WIDTH, 1)})


def _mlp(into, out):
    return nn.Sequential(nn.Linear(into, WIDTH), nn.LeakyReLU(0.2), nn.Linear(WIDTH, out))


@ZOO.model()
class NeRF(nn.Module):
    """Frequencies of the position, and the position again in the middle."""

    def __init__(self):
        super().__init__()
        width = 6 * WIDTH
        self.first = nn.ModuleList([nn.Linear(width, 16), nn.Linear(16, 16)])
        self.second = nn.ModuleList([nn.Linear(16 + width, 16), nn.Linear(16, 16)])
        self.density, self.colour = nn.Linear(16, 1), nn.Linear(16, 3)

    def forward(self, x):
        encoded = torch.cat([f(2.0**k * math.pi * x) for k in range(3) for f in (torch.sin, torch.cos)], -1)
        h = encoded
        for layer in self.first:
            h = layer(h).relu()
        h = torch.cat([h, encoded], -1)
        for layer in self.second:
            h = layer(h).relu()
        alpha = 1 - torch.exp(-F.softplus(self.density(h)))
        through = torch.cumprod(torch.cat([torch.ones(1, 1), 1 - alpha + 1e-10]), 0)[:-1]
        return (through * alpha * self.colour(h).sigmoid()).mean(1, keepdim=True)


def mixture_loss(model, batch):
    logits, means, spreads = model(batch["x"])
    parts = torch.distributions.Normal(means, spreads)
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=logits), parts)
    return -mixture.log_prob(batch["y"][:, 0]).mean()


@ZOO.model(loss=mixture_loss)
class MixtureDensity(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.logits, self.means, self.spreads = (nn.Linear(16, 3) for _ in range(3))

    def forward(self, x):
        h = self.body(x)
        return self.logits(h), self.means(h), F.softplus(self.spreads(h)) + 1e-3


def mixture_by_hand(model, batch):
    logits, means, spreads = model(batch["x"])
    log = -0.5 * ((batch["y"] - means) / spreads) ** 2 - spreads.log()
    return -torch.logsumexp(log + logits.log_softmax(-1), -1).mean()


@ZOO.model(loss=mixture_by_hand)
def mixture_density_by_hand():
    return MixtureDensity()


def flow_loss(model, batch):
    z, log_det = model(batch["x"])
    return (0.5 * z.square().sum(1) - log_det).mean(), {"log_det": log_det.mean()}


@ZOO.model(loss=flow_loss)
class Flow(nn.Module):
    """Coupling layers: two results each, the log-determinants added up."""

    class Coupling(nn.Module):
        def __init__(self, flip):
            super().__init__()
            self.flip = flip
            half = WIDTH // 2
            self.net = nn.Sequential(nn.Linear(half, 16), nn.ReLU(), nn.Linear(16, 2 * half))

        def forward(self, x):
            a, b = x.chunk(2, 1)[:: -1 if self.flip else 1]
            scale, shift = self.net(a).chunk(2, 1)
            scale = torch.tanh(scale)
            b = b * scale.exp() + shift
            return torch.cat([b, a] if self.flip else [a, b], 1), scale.sum(1)

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(self.Coupling(i % 2 == 1) for i in range(4))

    def forward(self, x):
        log_det = x.new_zeros(x.shape[0])
        for layer in self.layers:
            x, one = layer(x)
            log_det += one
        return x, log_det


@ZOO.model(shared=True)
class NeuralODE(nn.Module):
    """Two steps of Runge and Kutta's method: one net, eight times."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH + 1, 16), nn.Tanh(), nn.Linear(16, WIDTH))
        self.head = nn.Linear(WIDTH, 1)

    def slope(self, t, x):
        return self.net(torch.cat([x, torch.full_like(x[:, :1], t)], 1))

    def forward(self, x):
        h = 0.5
        for step in range(2):
            t = step * h
            k1 = self.slope(t, x)
            k2 = self.slope(t + h / 2, x + h / 2 * k1)
            k3 = self.slope(t + h / 2, x + h / 2 * k2)
            k4 = self.slope(t + h, x + h * k3)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return self.head(x)


def vae_loss(model, batch):
    back, mean, log = model(batch["x"])
    kl = -0.5 * (1 + log - mean.pow(2) - log.exp()).sum(1).mean()
    return F.mse_loss(back, batch["x"]) + 0.1 * kl, {"kl": kl}


@ZOO.model(loss=vae_loss, draws=True)
class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU())
        self.mean, self.log = nn.Linear(16, 4), nn.Linear(16, 4)
        self.decoder = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, WIDTH))

    def forward(self, x):
        h = self.encoder(x)
        mean, log = self.mean(h), self.log(h)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log)
        return self.decoder(z), mean, log


@ZOO.model(loss=vae_loss, draws=True)
class VAEByDistributions(VAE):
    def forward(self, x):
        h = self.encoder(x)
        mean, log = self.mean(h), self.log(h)
        z = torch.distributions.Normal(mean, torch.exp(0.5 * log)).rsample()
        return self.decoder(z), mean, log


@ZOO.model(draws=True)
class NoiseEverywhere(Layers):
    """Gumbel softmax, dropout, noise drawn in place and from the batch's shape."""

    def forward(self, x):
        h = F.gumbel_softmax(self.a(x), tau=0.5)
        h = F.dropout(self.b(h), 0.3)
        h = h + torch.empty_like(h).normal_(0, 0.1)
        h = self.c(h) * torch.bernoulli(torch.full((len(x), 1), 0.8))
        return self.head(self.d(h + 0.1 * torch.rand(x.shape[0], WIDTH)))


@ZOO.model(draws=True)
def stochastic_depth():
    class Inner(Block):
        def forward(self, x):
            keep = (torch.rand(x.shape[0], 1) < 0.7).to(x.dtype)
            return x + self.layer(self.norm(x)) * keep / 0.7

    return Stack(Inner)


def noise_in_the_loss(model, batch):
    noise = torch.randn_like(batch["x"])
    t = torch.rand(batch["x"].shape[0], 1)
    target = batch["x"] - noise
    return F.mse_loss(model(t * batch["x"] + (1 - t) * noise), target)


@ZOO.model(loss=noise_in_the_loss, draws=True)
def flow_matching():
    return nn.Sequential(_mlp(WIDTH, WIDTH), _mlp(WIDTH, WIDTH), _mlp(WIDTH, WIDTH))


def distil(model, batch):
    with torch.no_grad():
        taught = model["teacher"](batch["x"])
    found = model["student"](batch["x"])
    soft = F.kl_div((found / 2).log_softmax(-1), (taught / 2).softmax(-1), reduction="batchmean") * 4
    return soft + found[:, :1].sub(batch["y"]).square().mean(), {
        "agree": (found.argmax(-1) == taught.argmax(-1)).float().mean()
    }


@ZOO.model(loss=distil)
def teacher_and_student():
    both = nn.ModuleDict(
        {"teacher": nn.Sequential(_mlp(WIDTH, WIDTH), _mlp(WIDTH, WIDTH)), "student": _mlp(WIDTH, WIDTH)}
    )
    both["teacher"].requires_grad_(False).eval()
    return both


def bootstrap(model, batch):
    """BYOL-like: the target net's weights follow the online net's, in the forward."""
    online, target = model["online"], model["target"]
    with torch.no_grad():
        for mine, theirs in zip(online.parameters(), target.parameters(), strict=True):
            theirs.mul_(0.9).add_(mine, alpha=0.1)
        aim = F.normalize(target(batch["x"].flip(1)), dim=1)
    return 2 - 2 * (F.normalize(online(batch["x"]), dim=1) * aim).sum(1).mean()


@ZOO.model(loss=bootstrap, refused="changes the parameter target.0.weight in place")
def online_and_target():
    both = nn.ModuleDict({"online": _mlp(WIDTH, WIDTH), "target": _mlp(WIDTH, WIDTH)})
    both["target"].requires_grad_(False)
    return both


@ZOO.model(items=sequences)
class DeepSet(nn.Module):
    def __init__(self):
        super().__init__()
        self.each, self.all = _mlp(WIDTH, WIDTH), _mlp(3 * WIDTH, 1)

    def forward(self, x):
        h = self.each(x)
        return self.all(torch.cat([h.mean(1), h.amax(1), h.std(1)], -1))


@ZOO.model(items=sequences, shared=True)
class PointerNetwork(nn.Module):
    """Each step's choice (argmax) is masked for the next ones."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.cell = nn.GRUCell(WIDTH, WIDTH)
        self.key, self.query = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.start = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        h, state = self.encoder(x)
        keys, state = self.key(h), state[0]
        entry = self.start.expand(len(x), -1)
        taken = torch.zeros(x.shape[:2], dtype=torch.bool)
        total = 0.0
        for _ in range(3):
            state = self.cell(entry, state)
            scores = torch.einsum("btd,bd->bt", keys, self.query(state)).masked_fill(taken, -1e9)
            chosen = scores.argmax(-1)
            total = total + scores.log_softmax(-1).gather(1, chosen[:, None])
            taken = taken.scatter(1, chosen[:, None], True)
            entry = h[torch.arange(len(x)), chosen]
        return total


@ZOO.model()
class HyperNetwork(nn.Module):
    """One net makes the weights of another from what it is given."""

    def __init__(self):
        super().__init__()
        self.code = nn.Parameter(torch.randn(3, 4))
        self.maker = nn.Linear(4, WIDTH * WIDTH + WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        made = self.maker(self.code)
        for weights in made:
            weight, bias = weights.split([WIDTH * WIDTH, WIDTH])
            x = F.linear(x, weight.view(WIDTH, WIDTH) / 4, bias).tanh()
        return self.head(x)


@ZOO.model()
class WeightsOfTheSample(Layers):
    def forward(self, x):
        weights = torch.einsum("ni,nj->nij", self.a(x), self.b(x)).softmax(-1)
        h = torch.bmm(weights, self.c(x)[..., None]).squeeze(-1)
        return self.head(self.d(h))


@ZOO.model()
class Autocast(Layers):
    def forward(self, x):
        h = self.a(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.c(self.b(h).relu())
            with torch.autocast("cpu", enabled=False):
                h = self.d(h.float()).softmax(-1)
        return self.head(h)


def under_autocast(model, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(batch["x"])
    return F.mse_loss(found.float(), batch["y"])


@ZOO.model(loss=under_autocast)
def autocast_around_the_model():
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)) for _ in range(4)), nn.Linear(WIDTH, 1)
    )


@ZOO.model(loss=under_autocast, shared=True, tolerance=1e-2)
def autocast_of_a_layer_used_twice():
    """Under autocast the cast of a weight is cached, and its gradients are summed before the cast back."""

    class Model(Layers):
        def forward(self, x):
            return self.head(self.a(self.b(self.a(x))))

    return Model()


@ZOO.model(loss=lambda model, batch: F.mse_loss(model(batch["x"].bfloat16()).float(), batch["y"]))
def all_in_bfloat16():
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)), nn.Linear(WIDTH, 1)
    ).bfloat16()


@ZOO.model()
def mixed_types():
    """Some layers in double precision."""

    class Model(Layers):
        def __init__(self):
            super().__init__()
            self.b.double()
            self.c.double()

        def forward(self, x):
            return self.head(self.d(self.c(self.b(self.a(x).double())).float()))

    return Model()


class ParametersAndFunctions(nn.Module):
    """No modules at all: a dictionary of parameters, and functions of it."""

    def __init__(self):
        super().__init__()
        self.p = nn.ParameterDict()
        for i in range(4):
            self.p[f"w{i}"] = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)
            self.p[f"b{i}"] = nn.Parameter(torch.zeros(WIDTH))
        self.p["out"] = nn.Parameter(torch.randn(WIDTH, 1))


def functional(p, x):
    for i in range(4):
        x = torch.relu(x @ p[f"w{i}"] + p[f"b{i}"])
    return x @ p["out"]


@ZOO.model(loss=lambda model, batch: F.mse_loss(functional(model.p, batch["x"]), batch["y"]))
def parameters_and_functions():
    return ParametersAndFunctions()


@ZOO.model(
    loss=lambda model, batch: F.mse_loss(
        torch.func.functional_call(model, dict(model.named_parameters()), (batch["x"],)), batch["y"]
    )
)
def functional_call_of_the_model():
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)), nn.Linear(WIDTH, 1)
    )


@ZOO.model(items=sequences)
class CausalAttention(nn.Module):
    """A GPT by hand: a mask in a buffer, F.scaled_dot_product_attention, views and transposes."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
            self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))
            self.register_buffer("mask", torch.ones(8, 8).tril().bool()[None, None], persistent=False)

        def forward(self, x, fast):
            n, t, _ = x.shape
            q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
            if fast:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                scores = (q @ k.transpose(-2, -1)) / math.sqrt(WIDTH // 2)
                scores = scores.masked_fill(~self.mask[:, :, :t, :t], float("-inf"))
                y = scores.softmax(-1) @ v
            x = x + self.out(y.transpose(1, 2).reshape(n, t, WIDTH))
            return x + self.mlp(self.norm2(x))

    def __init__(self):
        super().__init__()
        self.position = nn.Embedding(8, WIDTH)
        self.blocks = nn.ModuleList(self.Inner() for _ in range(4))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        x = x + self.position(torch.arange(x.shape[1], device=x.device))
        for number, block in enumerate(self.blocks):
            x = block(x, fast=number % 2 == 0)
        return self.head(x[:, -1])


@ZOO.model(items=tokens, loss=token_loss)
class PlainGPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True, activation="gelu")
        self.net = nn.TransformerEncoder(layer, 3)
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.net(self.embed(x), mask=mask, is_causal=True))


def contrastive(model, batch):
    one = F.normalize(model["image"](batch["x"]), dim=-1)
    other = F.normalize(model["text"](batch["x"].flip(1)), dim=-1)
    logits = model["scale"].weight.exp() * one @ other.t()
    labels = torch.arange(len(one))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


@ZOO.model(loss=contrastive)
def two_towers():
    scale = nn.Linear(1, 1, bias=False)
    nn.init.constant_(scale.weight, 1.0)
    return nn.ModuleDict({"image": _mlp(WIDTH, WIDTH), "text": _mlp(WIDTH, WIDTH), "scale": scale})


@ZOO.model(
    items=lambda step: [[item["x"], item["y"]] for item in vectors(step)],
    loss=lambda model, batch: F.mse_loss(model(batch[0]), batch[1]),
)
class Highway(Layers):
    """Reversible halves and gates."""

    def forward(self, x):
        one, other = x, x.flip(1)
        for layer, gate in ((self.a, self.b), (self.c, self.d)):
            one = one + layer(other).tanh()
            other = other * torch.sigmoid(gate(one))
        return self.head(one + other)


@ZOO.model(loss=lambda model, batch: model(batch))
class TakesTheWholeBatch(Layers):
    """The model gets the dictionary, and computes its loss."""

    def forward(self, batch):
        h = {"h": self.a(batch["x"])}
        for name in "bcd":
            h["h"] = getattr(self, name)(h["h"])
        return F.smooth_l1_loss(self.head(h["h"]), batch["y"])


@ZOO.model()
class FrozenMiddle(Layers):
    """Gradients pass frozen layers on their way to the first; the last bias trains alone (BitFit)."""

    def __init__(self):
        super().__init__()
        for layer in (self.b, self.c):
            layer.requires_grad_(False)
        self.d.weight.requires_grad_(False)

    def forward(self, x):
        return self.head(self.d(self.c(self.b(self.a(x)).relu())))


@ZOO.model()
class UnusedPart(Layers):
    def forward(self, x):
        return self.head(self.c(self.a(x)))


@ZOO.model()
class LoRA(nn.Module):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
            self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

        def forward(self, x):
            return self.base(x) + 0.5 * self.up(self.down(x))

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(self.Inner(), nn.SELU()) for _ in range(4)))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        return self.head(self.blocks(x))
