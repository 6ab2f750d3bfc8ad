"""More corners: hooks on gradients, tasks by name, rare layers and losses, compiled parts."""

import math
import warnings

import torch
from torch import nn
from torch.nn import functional as F
from zoo_checks import ROWS, WIDTH, Zoo, images, many, sequences, vectors
from zoo_inplace import Layers
from zoo_unseen import Block, Stack, linear_and, tanh_block

ZOO = Zoo()


def quietly(model, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.compile warns of its own look at a gradient
        return F.mse_loss(model(batch["x"]), batch["y"])


@ZOO.model(loss=quietly)
def compiled_function_in_blocks():
    @torch.compile(backend="eager")
    def swish(x):
        return x * torch.sigmoid(x)

    class Inner(Block):
        def forward(self, x):
            return x + swish(self.layer(self.norm(x)))

    return Stack(Inner)


@ZOO.model()
def hooks_on_parameters():
    stack = Stack(tanh_block)
    for block in stack.blocks:
        block[0].weight.register_hook(lambda gradient: gradient * 0.5)
    return stack


@ZOO.model(shared=True, refused="a.weight carries a gradient hook and is used in several places")
def hooks_on_shared_parameters():
    class Model(Layers):
        def forward(self, x):
            return self.head(self.c(self.a(self.b(self.a(x)).tanh())))

    model = Model()
    model.a.weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    return model


@ZOO.model()
def backward_hooks_on_modules():
    stack = Stack(tanh_block)
    for block in stack.blocks:
        block[1].register_full_backward_hook(lambda module, into, out: (into[0] * 0.5,))
    return stack


@ZOO.model(refused="the model was not taken apart: it carries hooks: put them on a module inside it")
def hook_on_the_model():
    stack = Stack(tanh_block)
    stack.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    return stack


@ZOO.model()
class BranchOnAConstantBuffer(Layers):
    def __init__(self):
        super().__init__()
        self.register_buffer("twice", torch.tensor(True))
        self.register_buffer("power", torch.tensor(2.0))

    def forward(self, x):
        h = self.b(self.a(x))
        if self.twice:
            h = self.c(h)
        return self.head(self.d(h) * self.power.item() + float(self.power))


@ZOO.model()
class BranchOnAPartOfABuffer(Layers):
    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.tensor([1, 0, 1, 1]))

    def forward(self, x):
        for number, layer in enumerate((self.a, self.b, self.c, self.d)):
            if self.kept[number] > 0:
                x = layer(x).tanh()
        return self.head(x)


def tasks(step):
    items = vectors(step)
    for number, item in enumerate(items):
        item["task"] = ["sum", "difference", "sum"][(number + step) % 3]
    return items


@ZOO.model(items=tasks, loss=lambda model, batch: F.mse_loss(model(batch["x"], batch["task"]), batch["y"]))
class HeadsByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
        self.heads = nn.ModuleDict({"sum": nn.Linear(WIDTH, 1), "difference": nn.Linear(WIDTH, 1)})

    def forward(self, x, task):
        return self.heads[task](self.body(x).tanh())


@ZOO.model(refused="depends on more than the batch")
class LayerDrop(Layers):
    def forward(self, x):
        for layer in (self.a, self.b, self.c, self.d):
            if torch.rand(()) > 0.3:
                x = layer(x)
        return self.head(x)


@ZOO.model(items=images)
class SegNet(nn.Module):
    """Indices of a pooling go to the unpooling, stages later."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.pool, self.back = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        self.three, self.four = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x):
        x, first = self.pool(self.one(x).relu())
        size = x.size()
        x, second = self.pool(self.two(x).relu())
        x = self.three(self.back(x, second, output_size=size)).relu()
        return self.four(self.back(x, first)).mean((2, 3))


@ZOO.model(items=images)
class SpatialTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.where = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 6))
        self.net = nn.Sequential(nn.Unfold(4, stride=2), nn.Linear(9, 8), nn.PReLU())
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        grid = F.affine_grid(self.where(x).view(-1, 2, 3), x.shape, align_corners=False)
        x = F.grid_sample(x, grid, align_corners=False)
        x = F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2)
        return self.head(self.net(x).mean(1))


@ZOO.model()
class LinearAlgebra(Layers):
    def forward(self, x):
        h = self.a(x)
        gram = h.t() @ h / 10 + torch.eye(WIDTH)
        solved = torch.linalg.solve(gram, self.b(x).t()).t()
        factor = torch.linalg.cholesky(gram)
        values = torch.linalg.svdvals(gram + torch.diag(torch.arange(WIDTH) / 10))
        h = self.c(solved).tanh() + (factor.diagonal() + values) / 100
        return self.head(self.d(h)) + torch.logdet(gram) / 100 + torch.cdist(h, h).mean() / 100


def adaptive(model, batch):
    labels = (batch["y"][:, 0] * 3).round().clamp(0, 9).long()
    return model(batch["x"], labels).loss


@ZOO.model(loss=adaptive)
def adaptive_softmax():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
            self.out = nn.AdaptiveLogSoftmaxWithLoss(WIDTH, 10, cutoffs=[2, 5], div_value=1.5)

        def forward(self, x, labels):
            return self.out(self.body(x).tanh(), labels)

    return Model()


def spoken(step):
    return many(
        step,
        lambda: {
            "x": torch.randn(ROWS, 9, WIDTH),
            "y": torch.randint(1, 5, (ROWS, 3)),
            "lengths": torch.randint(1, 4, (ROWS,)),
        },
    )


def ctc(model, batch):
    log = model(batch["x"]).log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(log, batch["y"], torch.full((len(batch["x"]),), 9), batch["lengths"])


@ZOO.model(items=spoken, loss=ctc)
def speech():
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)), nn.Linear(WIDTH, 5))


def triplets(model, batch):
    found = [F.normalize(model(batch["x"].roll(shift, 0)), dim=1) for shift in range(3)]
    return F.triplet_margin_loss(*found) + F.cosine_embedding_loss(
        found[0], found[1], torch.ones(len(batch["x"]))
    )


@ZOO.model(loss=triplets, shared=True)
def triplet_network():
    return nn.Sequential(*(tanh_block() for _ in range(3)))


@ZOO.model()
class RoundsStraightThrough(Layers):
    def forward(self, x):
        h = self.a(x)
        h = h + (h.round() - h).detach()
        h = self.b(h)
        hard = F.one_hot(h.argmax(-1), WIDTH).float() - h.softmax(-1).detach() + h.softmax(-1)
        return self.head(self.d(self.c(hard)))


@ZOO.model(items=sequences)
class Perceiver(nn.Module):
    def __init__(self):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(3, WIDTH))
        self.cross = nn.ModuleList(nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(3))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        z, maps = self.latents.expand(len(x), -1, -1), []
        for layer in self.cross:
            found, weights = layer(z, x, x, average_attn_weights=False)
            z = z + found
            maps.append(weights)
        return self.head(z.mean(1)) + torch.stack(maps).var()


@ZOO.model()
class ForwardCalledDirectly(Layers):
    def forward(self, x):
        h = self.a.forward(x)
        h = type(self.b).forward(self.b, h)
        return self.head(self.d(getattr(self, "c")(h)))  # noqa: B009 (as some models do)


class TreeNode(nn.Module):
    """A module made of modules of its own kind."""

    def __init__(self, depth):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.children_ = nn.ModuleList(TreeNode(depth - 1) for _ in range(2)) if depth else None

    def forward(self, x):
        h = self.layer(x).tanh()
        return h if self.children_ is None else h + sum(child(h) for child in self.children_)


@ZOO.model()
def tree():
    return nn.Sequential(TreeNode(2), nn.Linear(WIDTH, 1))


@ZOO.model(shared=True)
class WeightStandardised(Layers):
    def forward(self, x):
        for layer in (self.a, self.b, self.c, self.d):
            weight = layer.weight
            weight = (weight - weight.mean(1, keepdim=True)) / (weight.std(1, keepdim=True) + 1e-5)
            x = F.linear(x, weight, layer.bias).relu()
        return self.head(x)


@ZOO.model(refused="a torch.float32 Named of shape [4, 8], used by a, came from an operation that cannot be")
class SubclassOfTensor(Layers):
    class Named(torch.Tensor):
        pass

    def forward(self, x):
        h = self.a(x.as_subclass(self.Named))
        h = self.c(self.b(h).tanh())
        return self.head(self.d(h)).as_subclass(torch.Tensor)


@ZOO.model(items=sequences)
class MaskedByATriangle(nn.Module):
    """Masks of the batch, cached under no_grad, used in every layer, one changed in place in between."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        mask = (x.detach().mean(-1) > 0).float()
        for number, layer in enumerate(self.layers):
            x = layer(x) * mask[..., None]
            if number == 1:
                mask = mask.clone()
                mask[:, 0] = 1.0
            if number == 2:
                mask = mask.clone()
                mask.mul_(0.5)
        return self.head(x.mean(1) + mask.sum(1, keepdim=True))


def noted_before_change(model, batch):
    out, noted = model(batch["x"])
    extra = batch["x"].mean(0)
    view = extra[:2]
    extra += 1
    return F.mse_loss(out, batch["y"]), {"noted": noted, "view": view, "same": [extra, extra]}


@ZOO.model(loss=noted_before_change, shared=True)
class NotesThenChanges(Layers):
    """What is noted beside the loss is changed in place afterwards: the note changes too."""

    def forward(self, x):
        h = self.b(self.a(x))
        total = torch.zeros(len(x), 1)
        noted = total[:, 0]
        total += self.head(self.d(self.c(h))).detach()
        return self.head(h), noted


@ZOO.model(loss=lambda model, batch: model(batch["x"]))
class ReturnsAViewOfABuffer(Layers):
    """A slice of a running mean goes out beside the loss."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x):
        h = self.b(self.a(x))
        with torch.no_grad():
            self.mean.lerp_(h.mean(0), 0.1)
        return self.head(self.d(self.c(h))).square().mean(), self.mean[:3]


@ZOO.model(loss=lambda model, batch: (F.mse_loss(model(batch["x"]), batch["y"]), model.count))
class MetricReadFromTheModel(Layers):
    """The loss function reads the model's buffer itself, after the model has changed it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        h = self.b(self.a(x))
        self.count += h.detach().abs().sum()
        return self.head(self.d(self.c(h)))


@ZOO.model(loss=lambda model, batch: F.mse_loss(model(batch["x"]) * model.scale, batch["y"]))
class BufferReadInTheLoss(Layers):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x):
        self.scale *= 1.1
        return self.head(self.d(self.c(self.b(self.a(x)))))


@ZOO.model(refused="it changes its own attributes while it runs: memory")
class AttributeReplacedByTheModel(Layers):
    """A tensor kept between calls as an attribute of the root (a memory), detached."""

    def __init__(self):
        super().__init__()
        self.memory = None

    def forward(self, x):
        h = self.b(self.a(x))
        if self.memory is not None:
            h = h + self.memory
        self.memory = h.detach()
        return self.head(self.d(self.c(h)))


@ZOO.model(
    items=lambda step: many(
        step,
        lambda: {
            "x": [torch.randn(ROWS, WIDTH), torch.randn(ROWS, 2 * WIDTH)],
            "y": (torch.randn(ROWS, 1), None, "x", 3),
        },
    ),
    loss=lambda model, batch: F.mse_loss(model(*batch["x"]), batch["y"][0]) * batch["y"][3],
)
class NestedBatch(Layers):
    def forward(self, x, wide):
        one, other = wide.chunk(2, 1)
        return self.head(self.d(self.c(self.b(self.a(x) + one) * other)))


@ZOO.model()
class CumulativeAndSorted(Layers):
    def forward(self, x):
        h = self.a(x).sort(1, descending=True).values.cumsum(1)
        h = self.b(h.logcumsumexp(1)).gather(1, x.argsort(1))
        places = torch.bucketize(x, torch.linspace(-1, 1, WIDTH - 1))
        h = self.c(h.take_along_dim(places, 1)).cummax(1).values
        return self.head(self.d(h) * math.pi)


class Spread(Block):
    """A block with a running mean of its layer's spread."""

    def __init__(self):
        super().__init__()
        self.register_buffer("spread", torch.ones(WIDTH))


@ZOO.model()
def norms_by_running_means():
    """Divided by a running mean which this very call has changed: autograd keeps it for the backward."""

    class Inner(Spread):
        def forward(self, x):
            h = self.layer(x)
            with torch.no_grad():
                self.spread.lerp_(h.std(0), 0.1)
            return h / self.spread

    return Stack(Inner)


@ZOO.model()
def norms_by_running_means_through_data():
    """The same, changed through `.data`: autograd does not see that the kept numbers are others."""

    class Inner(Spread):
        def forward(self, x):
            h = self.layer(x)
            self.spread.data.mul_(0.5).add_(h.data.std(0))
            return h / self.spread

    return Stack(Inner)


@ZOO.model()
def norms_by_replaced_means():
    class Inner(Spread):
        def forward(self, x):
            h = self.layer(x)
            self.spread = 0.5 * self.spread + h.detach().std(0)
            return h / self.spread

    return Stack(Inner)


@ZOO.model()
class LooksAtAResult(Layers):
    """A look at the sizes of what is received, in every block, and a print of a shape."""

    def forward(self, x):
        h = self.a(x)
        assert h.shape == x.shape
        assert not h.is_complex()
        assert h.stride() == (WIDTH, 1)
        text = f"{tuple(h.shape)} {h.dtype} {h.device} {h.ndim} {h.numel()} {h.requires_grad}"
        h = self.b(h) * len(text)
        return self.head(self.d(self.c(h)).view(h.size(0), -1) / h.nelement())


@ZOO.model()
class SortsByLength(Layers):
    """An order is looked up in Python (tolist), and put back."""

    def forward(self, x):
        order = x[:, 0].argsort().tolist()
        h = self.b(self.a(x[order]))
        back = [order.index(i) for i in range(len(order))]
        return self.head(self.d(self.c(h))[back])


@ZOO.model(options={"schedule": "gpipe"})
def moving_means_under_gpipe():
    return nn.Sequential(
        *(linear_and(nn.BatchNorm1d(WIDTH), nn.ReLU()) for _ in range(4)),
        nn.Linear(WIDTH, 1),
    )


@ZOO.model(options={"schedule": "zb-h1"})
def hooks_and_checkpoints_in_halves():
    class Inner(Block):
        def forward(self, x):
            h = torch.utils.checkpoint.checkpoint(self.norm, x, use_reentrant=False)
            h = self.layer(h)
            h.register_hook(lambda gradient: gradient * 2)
            return x + h

    return Stack(Inner)


# -- what the user does between the steps


class Switchable(Block):
    """A block with a switch, and a shift that its parent adds."""

    def __init__(self):
        super().__init__()
        self.doubled = False
        self.register_buffer("shift", torch.zeros(WIDTH))

    def forward(self, x):
        h = self.layer(self.norm(x))
        return h * 2 if self.doubled else h


class ShiftedStack(Stack):
    def __init__(self):
        super().__init__(Switchable)
        # The blocks are light beside it.
        self.wide = nn.Sequential(nn.Linear(WIDTH, 256), nn.Linear(256, WIDTH))

    def forward(self, x):
        for block in self.blocks:
            x = block(x) + block.shift
        return self.head(self.wide(x))


def switch(model):
    for block in model.blocks:
        block.doubled = True


@ZOO.model(between=switch)
def attribute_switched_between_steps():
    return ShiftedStack()


def load_shift(model):
    for block in model.blocks:
        block.shift.fill_(1.0)


@ZOO.model(between=load_shift)
def buffer_filled_between_steps():
    return ShiftedStack()


def replace_shift(model):
    for block in model.blocks:
        block.shift = torch.ones(WIDTH)


@ZOO.model(between=replace_shift)
def buffer_replaced_between_steps():
    return ShiftedStack()


def more_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5


@ZOO.model(between=more_dropout, draws=True)
def dropout_raised_between_steps():
    return Stack(lambda: linear_and(nn.Dropout(0.1)))


@ZOO.model(between=more_dropout, draws=True)
def dropout_raised_from_zero_between_steps():
    return Stack(lambda: linear_and(nn.Dropout(0.0)))
