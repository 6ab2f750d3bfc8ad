"""Corners that a recording could miss: settings around a call, state that others change, sizes by number."""

import contextlib
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from zoo_checks import ROWS, WIDTH, Zoo, many, sequences
from zoo_inplace import Layers
from zoo_state import ragged, ragged_loss
from zoo_unseen import Block, Stack

ZOO = Zoo()
INFERENCE = "a calls linear in inference mode, whose tensors keep no record of changes; use torch.no_grad()"
COUNTED = "the model was not taken apart: it calls {} on the buffer {}, which the program changes"


# -- what a module is told from outside


@ZOO.model(
    shared=True,
)
class ParentSetsAnAttribute(nn.Module):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = nn.Linear(WIDTH, WIDTH), 1.0

        def forward(self, x):
            return x + self.layer(x).tanh() * self.scale

    def __init__(self):
        super().__init__()
        self.block = self.Scaled()
        self.other = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        for step in range(3):
            self.block.scale = 1.0 + step
            x = self.other(self.block(x))
        return self.head(x)


@ZOO.model()
class ParentSetsAnAttributeOnce(Layers):
    """Each block is told its depth just before it runs, and forgets it afterwards."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(ParentSetsAnAttribute.Scaled() for _ in range(3))

    def forward(self, x):
        for number, block in enumerate(self.blocks):
            block.scale = 2.0 + number
            x = block(x)
            block.scale = 0.0
        return self.head(x)


def both_modes(model, batch):
    model.eval()
    with torch.no_grad():
        target = model(batch["x"])
    model.train()
    return F.mse_loss(model(batch["x"]), batch["y"] + 0.1 * target)


@ZOO.model(loss=both_modes)
def evaluated_in_the_loss():
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()) for _ in range(4)),
        nn.Linear(WIDTH, 1),
    )


@ZOO.model(draws=True, loss=both_modes)
def evaluated_in_the_loss_with_dropout():
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3), nn.ReLU()) for _ in range(4)),
        nn.Linear(WIDTH, 1),
    )


@ZOO.model()
class EvaluatesAPart(Layers):
    """A norm is frozen by eval() in the forward itself."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(2))

    def forward(self, x):
        self.norms[0].eval()
        h = self.norms[0](self.a(x))
        self.norms[0].train()
        h = self.norms[1](self.c(self.b(h)))
        return self.head(self.d(h))


@ZOO.model()
class EvaluatesPartsOfItsBlocks(Layers):
    """The norms and dropouts of some blocks are frozen before any block is called."""

    class Inner(nn.Sequential):
        def __init__(self):
            super().__init__(nn.BatchNorm1d(WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, WIDTH))

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(self.Inner() for _ in range(3))
        self.last = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        for block in self.blocks:
            block[0].eval()
            block[1].eval()
        for block in self.blocks:
            x = block(x)
        for block in self.blocks:
            block[0].train()
            block[1].train()
        return self.head(self.d(self.c(self.last(x))))


@ZOO.model()
class EvaluatesRecurrentParts(Layers):
    """What LSTM does in its first call it does not do again, so that its program is recorded twice."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent = nn.LSTM(WIDTH, WIDTH, 2, dropout=0.3, batch_first=True)

        def forward(self, x):
            return x + self.recurrent(x[:, None])[0][:, 0]

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(self.Inner() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            block.recurrent.eval()
        for block in self.blocks:
            x = block(x)
        for block in self.blocks:
            block.recurrent.train()
        return self.head(self.d(self.c(x)))


@ZOO.model()
class SetsAPartOfABlockOnce(Layers):
    """Blocks run twice after a part of each was told its factor: neither call says so to the block."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.norm = (
                SetsAPartOfABlockOnce.Factor(),
                nn.LayerNorm(WIDTH, bias=False, elementwise_affine=False),
            )

        def forward(self, x):
            return self.part(self.norm(x))

    class Factor(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = 1.0

        def forward(self, x):
            return x * self.scale

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(self.Inner() for _ in range(3))

    def forward(self, x):
        for number, block in enumerate(self.blocks):
            block.part.scale = 2.0 + number
        for layer in (self.a, self.b):
            for block in self.blocks:
                x = block(x)
            x = layer(x)
        for block in self.blocks:
            block.part.scale = 1.0
        return self.head(self.d(self.c(x)))


# -- settings around a call


def attention(context=contextlib.nullcontext):
    """Blocks of self-attention, each under a context of its own."""

    class Inner(Block):
        def forward(self, x):
            h = self.layer(self.norm(x)).view(len(x), -1, 2, WIDTH // 2).transpose(1, 2)
            with context():
                h = F.scaled_dot_product_attention(h, h, h, is_causal=True)
            return x + h.transpose(1, 2).reshape(x.shape)

    class Model(Stack):
        def forward(self, x):
            return super().forward(x).mean(1)

    return Model(Inner)


@ZOO.model(items=sequences)
def attention_backend():
    return attention(lambda: sdpa_kernel(SDPBackend.MATH))


def attention_in_the_loss(model, batch):
    with sdpa_kernel(SDPBackend.MATH):
        return F.mse_loss(model(batch["x"]), batch["y"])


@ZOO.model(items=sequences, loss=attention_in_the_loss)
def attention_backend_around_the_model():
    return attention()


@ZOO.model(
    items=sequences,
    loss=attention_in_the_loss,
    refused="nor can it stay whole (it is called under other settings (flash attention",
)
def attention_backend_around_what_is_not_seen():
    class Inner(Block):
        def forward(self, x):
            return x + torch.vmap(self.layer)(x)

    class Model(Stack):
        def forward(self, x):
            return super().forward(x).mean(1)

    return Model(Inner)


@ZOO.model(
    items=sequences,
    refused="in a checkpoint under other settings (flash attention",
)
def attention_backend_around_a_checkpoint():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = attention()

        def forward(self, x):
            with sdpa_kernel(SDPBackend.MATH):
                return checkpoint(self.inner, x, use_reentrant=False)

    return Model()


@ZOO.model()
class DefaultType(Layers):
    def forward(self, x):
        h = self.b(self.a(x))
        torch.set_default_dtype(torch.float64)
        try:
            table = torch.linspace(0, 1, WIDTH).cos()
        finally:
            torch.set_default_dtype(torch.float32)
        return self.head(self.d(self.c((h * table).float())))


@ZOO.model(refused=INFERENCE)
class InferenceMode(Layers):
    def forward(self, x):
        with torch.inference_mode():
            scale = self.a(x).abs().amax(1, keepdim=True)
        h = self.b(x) / (scale.clone() + 1)
        return self.head(self.d(self.c(h)))


@ZOO.model()
class EnabledInsideDisabled(Layers):
    def forward(self, x):
        with torch.no_grad():
            h = self.a(x)
            with torch.enable_grad():
                g = self.b(x)
            k = h + g
        return self.head(self.d(self.c(g) + k))


@ZOO.model(refused="the model was not taken apart: it runs under saved_tensors_hooks")
class SavedTensorsPacked(Layers):
    """Saved tensors go through bfloat16: what the backward sees is rounded."""

    def forward(self, x):
        h = self.a(x)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.bfloat16(), lambda t: t.float()):
            h = self.c(self.b(h).tanh())
        return self.head(self.d(h))


@ZOO.model(refused="the model was not taken apart: it runs under saved_tensors_hooks")
class SavedOnCPU(Layers):
    def forward(self, x):
        h = self.a(x)
        with torch.autograd.graph.save_on_cpu():
            h = self.c(self.b(h).tanh())
        return self.head(self.d(h))


@ZOO.model()
class DefaultDevice(Layers):
    def forward(self, x):
        with torch.device("cpu"):
            table = torch.arange(WIDTH).float()
        return self.head(self.d(self.c(self.b(self.a(x + table)))))


# -- state that is no registered buffer


@ZOO.model()
class TensorAttribute(Layers):
    """A running mean in a plain attribute, changed in place."""

    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(WIDTH)

    def forward(self, x):
        h = self.b(self.a(x))
        with torch.no_grad():
            self.mean.mul_(0.9).add_(h.mean(0), alpha=0.1)
        return self.head(self.d(self.c(h - self.mean)))


@ZOO.model()
class TensorInAList(Layers):
    def __init__(self):
        super().__init__()
        self.means = [torch.zeros(WIDTH), torch.zeros(WIDTH)]

    def forward(self, x):
        h = self.b(self.a(x))
        self.means[0].add_(x.mean(0))
        return self.head(self.d(self.c(h + self.means[0])))


@ZOO.model()
def tensor_in_a_list_of_blocks():
    class Inner(Block):
        def __init__(self):
            super().__init__()
            self.kept = {"mean": torch.zeros(WIDTH)}

        def forward(self, x):
            h = self.layer(x)
            self.kept["mean"].lerp_(h.detach().mean(0), 0.1)
            return h - self.kept["mean"]

    return Stack(Inner)


@ZOO.model()
def tensor_attribute_replaced_in_blocks():
    """The mean of the microbatch before, kept as an attribute."""

    class Inner(Block):
        def __init__(self):
            super().__init__()
            self.before = torch.zeros(WIDTH)

        def forward(self, x):
            h = self.layer(x) + self.before
            self.before = h.detach().mean(0)
            return h

    return Stack(Inner)


@ZOO.model()
def attribute_none_then_tensor():
    """An observer that is None until the first call (data-dependent initialisation, ActNorm)."""

    class Inner(Block):
        def __init__(self):
            super().__init__()
            self.scale = None

        def forward(self, x):
            h = self.layer(x)
            if self.scale is None:
                self.scale = h.detach().std(0) + 1.0
            return h / self.scale

    return Stack(Inner)


@ZOO.model()
def buffer_initialised_by_the_first_call():
    class Inner(Block):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(WIDTH))
            self.register_buffer("ready", torch.tensor(False))

        def forward(self, x):
            h = self.layer(x)
            if not self.ready:
                self.scale.copy_(h.detach().std(0) + 1.0)
                self.ready.fill_(True)
            return h / self.scale

    return Stack(Inner)


@ZOO.model(refused=COUNTED.format("item", "calls"))
class BranchOnACounter(Layers):
    """A buffer counts, and from the third call on the model does something else."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        h = self.b(self.a(x))
        if self.calls.item() > 2:
            h = h.tanh() * 3
        return self.head(self.d(self.c(h)))


@ZOO.model(refused=COUNTED.format("item", "calls"))
class BranchOnACounterBefore(Layers):
    """The same, where the counter is read before it counts."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        h = self.b(self.a(x))
        if self.calls.item() > 1:
            h = h.tanh() * 3
        self.calls += 1
        return self.head(self.d(self.c(h)))


@ZOO.model(refused=COUNTED.format("__bool__", "calls"))
class BranchOnACounterBool(Layers):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        h = self.b(self.a(x))
        if self.calls:
            h = h.tanh() * 3
        self.calls += 1
        return self.head(self.d(self.c(h)))


@ZOO.model(
    loss=lambda model, batch: F.mse_loss(model(batch["x"]), batch["y"]),
    refused=COUNTED.format("__float__", "step"),
)
class WarmUp(Layers):
    """A number from a buffer scales the result: float(buffer)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("step", torch.ones(()))

    def forward(self, x):
        h = self.b(self.a(x)) * min(1.0, float(self.step) / 10)
        self.step += 1
        return self.head(self.d(self.c(h)))


# -- sizes that depend on numbers of the batch


@ZOO.model(
    items=ragged,
    loss=ragged_loss,
)
class SlicedByATensor(Layers):
    """x[:, :lengths.max()], where the bound is a tensor."""

    def forward(self, x, lengths):
        half = (lengths + 1) // 2
        x = x[:, : half.min() + 1]
        h = self.b(self.a(x))
        return self.head(self.d(self.c(h)).sum(1) / x.shape[1])


@ZOO.model(items=ragged, loss=ragged_loss)
class RangeOfATensor(Layers):
    def forward(self, x, lengths):
        places = torch.arange(lengths.min())
        h = self.b(self.a(x[:, places]))
        return self.head(self.d(self.c(h)).sum(1) / len(places))


@ZOO.model(items=ragged, loss=ragged_loss)
class OneHotOfUnknownWidth(Layers):
    def forward(self, x, lengths):
        hot = F.one_hot(lengths % 4 + lengths.min() % 3)
        h = self.b(self.a(x)).mean(1) * hot.shape[1] + hot.float().mean(1, keepdim=True)
        return self.head(self.d(self.c(h)))


@ZOO.model(items=ragged, loss=ragged_loss)
class RepeatedByATensor(Layers):
    def forward(self, x, lengths):
        rows = x[:, 0].repeat_interleave(lengths, 0)
        h = self.b(self.a(rows))
        return self.head(self.d(self.c(h)).mean(0, keepdim=True) / len(rows)).expand(len(x), 1)


@ZOO.model(items=ragged, loss=ragged_loss)
class ZerosOfATensor(Layers):
    def forward(self, x, lengths):
        table = torch.ones(lengths.min(), WIDTH).cumsum(0)
        h = self.b(self.a(x + table.mean(0))) / table.shape[0]
        return self.head(self.d(self.c(h)).mean(1))


@ZOO.model(items=ragged, loss=ragged_loss)
class UniqueAndBincount(Layers):
    def forward(self, x, lengths):
        values, back = lengths.unique(return_inverse=True)
        counts = torch.bincount(lengths)
        h = self.b(self.a(x)).mean(1) / len(values) + back[:, None] + len(counts)
        return self.head(self.d(self.c(h)))


@ZOO.model(items=ragged, loss=ragged_loss)
class SplitByAList(Layers):
    def forward(self, x, lengths):
        flat = torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)])
        h = self.c(self.b(self.a(flat)).tanh())
        rows = [part.mean(0) for part in h.split(lengths.tolist())]
        return self.head(self.d(torch.stack(rows)))


@ZOO.model(items=ragged, loss=ragged_loss)
class RangeInPython(Layers):
    """`for _ in range(tensor)`, and an index that is a tensor."""

    def forward(self, x, lengths):
        h = self.b(self.a(x)).mean(1)
        for i in range(lengths.min()):
            h = h + x[:, i]
        return self.head(self.d(self.c(h + x[:, lengths.min() - 1])))


@ZOO.model(items=ragged, loss=ragged_loss)
class NumbersInArguments(Layers):
    """Tensors where numbers are expected: shifts, sizes, bounds, factors."""

    def forward(self, x, lengths):
        n = lengths.min()
        h = self.a(x).roll(int(n), 1)
        h = torch.clamp(self.b(h), max=n / 6) + torch.full((WIDTH,), n / 10)
        h = h * n.item() + torch.linspace(0, n, WIDTH)
        h = self.c(F.pad(h, (0, 0, 0, n.item()))).mean(1)
        return self.head(self.d(h))


# -- objects around tensors


class Graph:
    """A batch of a graph library: an object, no container that torch knows."""

    def __init__(self, x, weight):
        self.x, self.weight = x, weight


@ZOO.model(
    loss=lambda model, batch: F.mse_loss(model(Graph(batch["x"], batch["y"].abs() + 1)), batch["y"]),
)
def tensors_in_an_object():
    class Inner(Block):
        def forward(self, graph):
            return Graph(graph.x + self.layer(self.norm(graph.x)) * graph.weight, graph.weight)

    class Model(Stack):
        def forward(self, graph):
            for block in self.blocks:
                graph = block(graph)
            return self.head(graph.x)

    return Model(Inner)


@ZOO.model(loss=lambda model, batch: F.mse_loss(model(SimpleNamespace(**batch)), batch["y"]))
def object_changed_on_its_way():
    class Inner(Block):
        def forward(self, state):
            state.x = state.x + self.layer(self.norm(state.x))
            state.depth = getattr(state, "depth", 0) + 1

    class Model(Stack):
        def forward(self, state):
            for block in self.blocks:
                block(state)
            return self.head(state.x) * state.depth

    return Model(Inner)


@ZOO.model()
def list_filled_by_blocks():
    class Inner(Block):
        def forward(self, x, collected):
            collected.append(self.layer(self.norm(x)))
            return x + collected[-1]

    class Model(Stack):
        def forward(self, x):
            collected = []
            for block in self.blocks:
                x = block(x, collected)
            return self.head(x + torch.stack(collected).mean(0))

    return Model(Inner)


@ZOO.model()
def closures_as_arguments():
    class Inner(Block):
        def forward(self, x, mix):
            return mix(self.layer(self.norm(x)))

    class Model(Stack):
        def forward(self, x):
            first = x
            for number, block in enumerate(self.blocks):
                x = block(x, lambda h, number=number: h + first * number)
            return self.head(x)

    return Model(Inner)


@ZOO.model()
def modules_as_arguments():
    class Inner(Block):
        def forward(self, x, norm):
            return x + self.layer(norm(x))

    class Model(Stack):
        def __init__(self, kind):
            super().__init__(kind)
            self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
            for block in self.blocks:
                del block.norm

        def forward(self, x):
            for block, norm in zip(self.blocks, self.norms, strict=True):
                x = block(x, norm)
            return self.head(x)

    return Model(Inner)


CLASS_WEIGHTS = torch.linspace(0.5, 2.0, 5)


def weighted(model, batch):
    labels = (batch["y"][:, 0] * 2).round().clamp(0, 4).long()
    return F.cross_entropy(model(batch["x"]), labels, weight=CLASS_WEIGHTS)


@ZOO.model(loss=weighted)
def class_weights_in_a_global():
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)), nn.Linear(WIDTH, 5))


@ZOO.model(loss=lambda model, batch: CRITERION(model(batch["x"]), batch["y"]))
def criterion_module_with_buffers():
    """The criterion is a module that is not part of the model, as in most training scripts."""
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)), nn.Linear(WIDTH, 1))


CRITERION = nn.HuberLoss(delta=0.5)
WEIGHTED_CRITERION = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, label_smoothing=0.1)


def by_weighted_criterion(model, batch):
    labels = (batch["y"][:, 0] * 2).round().clamp(0, 4).long()
    return WEIGHTED_CRITERION(model(batch["x"]), labels)


@ZOO.model(loss=by_weighted_criterion)
def criterion_module_with_class_weights():
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)), nn.Linear(WIDTH, 5))


# -- numbers and layouts


@ZOO.model(
    items=lambda step: many(step, lambda: {"x": torch.randn(ROWS, 3, 8, 8), "y": torch.randn(ROWS, 1)})
)
def channels_last():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Sequential(nn.Conv2d(a, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
                for a in (3, 8, 8)
            )
            self.head = nn.Linear(8, 1)

        def forward(self, x):
            x = x.to(memory_format=torch.channels_last)
            for layer in self.layers:
                x = layer(x)
            return self.head(x.mean((2, 3)))

    return Model().to(memory_format=torch.channels_last)


@ZOO.model()
class DataChanged(Layers):
    """Changed through .data and detach(), which autograd does not see."""

    def forward(self, x):
        h = self.a(x)
        h.data.clamp_(-1, 1)
        g = self.b(h)
        g.detach().mul_(0.5)
        return self.head(self.d(self.c(g) + h))


@ZOO.model()
class ComplexViews(Layers):
    def forward(self, x):
        h = torch.view_as_complex(self.a(x).view(-1, WIDTH // 2, 2))
        h = h * torch.polar(torch.ones(WIDTH // 2), torch.arange(WIDTH // 2).float())
        g = torch.view_as_real(h).flatten(1)
        g = self.c(self.b(g))
        return self.head(self.d(g) * h.abs().sum(1, keepdim=True) + h.conj().real.mean())


@ZOO.model()
class EmptyTensors(Layers):
    def forward(self, x):
        h = self.b(self.a(x))
        past = h[:0]
        h = torch.cat([past, self.c(h)], 0)
        return self.head(self.d(h) + past.sum())


@ZOO.model()
class ResultsTwice(Layers):
    def forward(self, x):
        def pair(h):
            return h, h

        one, other = pair(self.a(x))
        one, other = self.b(one), self.c(other)
        values, places = one.max(1, keepdim=True)
        return self.head(self.d(other) * values + places)


def aliases(model, batch):
    out, view, h = model(batch["x"])
    loss = F.mse_loss(out, batch["y"])
    noted = h.detach().clone()
    noted.add_(1.0)
    return loss, (view, h, noted, batch["x"])


@ZOO.model(loss=aliases)
class ReturnsAliases(Layers):
    def forward(self, x):
        h = self.b(self.a(x))
        view = h[:, :2]
        g = self.d(self.c(h))
        return self.head(g), view, h
