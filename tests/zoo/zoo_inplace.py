"""Values made or changed in place, views, aliases, and tensors that skip `__torch_function__`."""

import torch
from torch import nn
from torch.nn import functional as F
from zoo_checks import WIDTH, Zoo

ZOO = Zoo()


class Layers(nn.Module):
    """Four layers and a head, for the programs below to run in their own ways."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.b = nn.Linear(WIDTH, WIDTH)
        self.c = nn.Linear(WIDTH, WIDTH)
        self.d = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 1)


@ZOO.model()
class AddsInPlace(Layers):
    def forward(self, x):
        h = self.a(x)
        h += self.b(h.tanh())
        h -= self.c(x)
        h /= 2
        h **= 2
        return self.head(self.d(h))


@ZOO.model(shared=True)
class AssignsRows(Layers):
    def forward(self, x):
        h = self.a(x).clone()
        for i in range(h.shape[0]):
            h[i] = self.b(h[i - 1].clone()) if i % 2 else h[i] * 2
        return self.head(self.d(self.c(h)))


@ZOO.model()
class ScalesEveryOther(Layers):
    def forward(self, x):
        h = self.a(x) + 0
        h[:, ::2] *= self.b(x)[:, ::2]
        h = self.c(h)
        h[..., 1::2] += 1.5
        return self.head(self.d(h))


@ZOO.model()
class MaskedFill(Layers):
    def forward(self, x):
        h = self.a(x)
        h.masked_fill_(x > 0.3, 0.0)
        g = self.b(h)
        g[x < -0.3] = -1.0
        return self.head(self.d(self.c(g) + h))


@ZOO.model()
class ViewsAcrossCuts(Layers):
    def forward(self, x):
        h = self.a(x)
        left, right = h.chunk(2, dim=-1)
        flipped = h.t()
        h2 = self.b(torch.cat([right, left], -1))
        h3 = self.c(flipped.t() + h2)
        return self.head(self.d(h3.view(2, -1, WIDTH).reshape(-1, WIDTH)) * left[:, :1])


@ZOO.model()
class ReceivedLeafChanged(Layers):
    def forward(self, x):
        h = self.a(x).tanh()
        g = self.b(h)
        g.add_(h)
        g.mul_(0.5)
        k = self.c(g.exp())
        g.sigmoid_()
        return self.head(self.d(k) * g)


@ZOO.model()
class AliasChangedLate(Layers):
    def forward(self, x):
        h = self.a(x) * 1.0
        window = h[:, 2:5]
        g = self.b(x)
        k = self.c(g)
        window.copy_(k[:, :3])
        return self.head(self.d(h))


@ZOO.model()
class ReturnsItsInput(Layers):
    def forward(self, x):
        h = self.a(x)
        same = h.contiguous().to(h.dtype)
        g = self.b(F.dropout(same, 0.5, training=False))
        g = nn.Identity()(g)
        return self.head(self.d(self.c(g.float()) + h.view_as(h)))


@ZOO.model()
class EarlierOutput(Layers):
    """The result was there long before the last layer ran."""

    def forward(self, x):
        early = self.head(self.a(x))
        late = self.d(self.c(self.b(x)))
        early += 0.0 * late.sum()
        return early


@ZOO.model(loss=lambda model, batch: model(batch["x"])[0])
class EarlierLoss(Layers):
    """The loss does not depend on the last layers, which are only looked at."""

    def forward(self, x):
        early = self.head(self.b(self.a(x))).square().mean()
        late = self.d(self.c(x)).detach().mean()
        return early, late


def all_of_it(model, batch):
    out = model(batch["x"])
    return out["loss"], out


@ZOO.model(loss=all_of_it)
class EarlierMetrics(Layers):
    def forward(self, x):
        first = self.a(x)
        kept = first.detach()
        second = self.b(first)
        third = self.c(second)
        return {
            "loss": self.head(self.d(third)).square().mean(),
            "first": kept,
            "x": x,
            "second": second.mean(),
        }


@ZOO.model()
class FillsABuffer(Layers):
    def forward(self, x):
        out = x.new_zeros(x.shape[0], 4, WIDTH)
        for i, layer in enumerate((self.a, self.b, self.c, self.d)):
            out[:, i] = layer(x if i == 0 else out[:, i - 1].clone()).tanh()
        return self.head(out.sum(1))


@ZOO.model()
class Accumulates(Layers):
    def forward(self, x):
        total = torch.zeros_like(x)
        for layer in (self.a, self.b, self.c, self.d):
            x = torch.relu_(layer(x))
            total += x
        return self.head(total)


@ZOO.model()
class InplaceActivations(Layers):
    def forward(self, x):
        h = F.leaky_relu(self.a(x), inplace=True)
        h = nn.ReLU(inplace=True)(self.b(h))
        h = F.silu(self.c(h), inplace=True)
        h = F.hardtanh_(self.d(h))
        return self.head(h)


@ZOO.model()
class TransposedInPlace(Layers):
    def forward(self, x):
        h = self.a(x) * 1.0
        h = h.unsqueeze(0).transpose_(0, 1).squeeze(1)
        h = self.b(h)
        h.unsqueeze_(1)
        h = self.c(h)
        h.squeeze_(1)
        return self.head(self.d(h))


@ZOO.model()
class BatchChanged(Layers):
    def forward(self, x):
        x -= x.mean(0)
        h = self.a(x.clone())
        x /= x.std() + 1.0
        h = self.b(h) + self.c(x.clone())
        x.clamp_(-1, 1)
        return self.head(self.d(h * x))


@ZOO.model(shared=True)
class OutArguments(Layers):
    def forward(self, x):
        with torch.no_grad():
            scale = torch.empty(x.shape[0], 1)
            torch.amax(self.a(x), dim=1, keepdim=True, out=scale)
        h = self.b(self.a(x)) * scale
        return self.head(self.d(self.c(h)))


@ZOO.model()
class UnbindsAndStacks(Layers):
    def forward(self, x):
        columns = list(self.a(x).unbind(1))
        columns[0] = columns[0] * 2
        columns.reverse()
        h = self.b(torch.stack(columns, 1))
        first, *rest = h.split([2, 3, 3], 1)
        h = self.c(torch.cat([*rest, first], 1))
        return self.head(self.d(h))


@ZOO.model()
class StateInADict(Layers):
    def forward(self, x):
        state = {"h": x, "all": []}
        for name in "abcd":
            state["h"] = getattr(self, name)(state["h"]).tanh() * 2
            state["all"].append(state["h"])
        state["all"][3].add_(1.0)
        return self.head(state["all"].pop() + state["all"][0])


@ZOO.model()
class ScatterInPlace(Layers):
    def forward(self, x):
        h = self.a(x) * 1
        order = x.argsort(1)
        h.scatter_add_(1, order, self.b(x))
        h.index_copy_(1, torch.tensor([0, 3]), self.c(x)[:, :2])
        h.index_put_((torch.tensor([0]), torch.tensor([1])), torch.tensor(0.5))
        return self.head(self.d(h))


@ZOO.model()
class FlippedStrides(Layers):
    def forward(self, x):
        h = self.a(x).t().contiguous().t()
        h = self.b(h.flip(0)).roll(1, 1)
        h = self.c(h.T.clone().T)
        return self.head(self.d(h.as_strided((h.shape[0], WIDTH), h.stride())))
