"""Programs that are hard to split: each gives, at every cut, what the unsplit model gives."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from evenflow.runtime.recorded.microbatch import Microbatches
from unsplit import assert_splits, mean_square, mlp, regression, seeded

WIDTH = 6


def features(rows: int = 8) -> dict[str, torch.Tensor]:
    return regression(rows, WIDTH)


class Layers(nn.Module):
    """Three layers and a head, for the programs below to run in their own ways."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.b = nn.Linear(WIDTH, WIDTH)
        self.c = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 1)


def layers_that(forward) -> nn.Module:
    """`Layers` with this forward."""
    return seeded(type("Model", (Layers,), {"forward": forward}))


# -- changes in place

IN_PLACE = {}


def in_place(function):
    IN_PLACE[function.__name__] = function
    return function


@in_place
def added_to(self, x):
    h = self.a(x)
    h += self.b(x)
    h *= 2
    return self.head(self.c(h))


@in_place
def assigned_rows(self, x):
    h = self.a(x) * 1.0
    h[0] = 0.5
    h[:, 1:3] = self.b(x)[:, 1:3]
    return self.head(self.c(h))


@in_place
def masked_fill(self, x):
    h = self.a(x).masked_fill_(x > 0.5, -1.0)
    h = self.b(h)
    h.masked_fill_(x < -0.5, 2.0)
    return self.head(self.c(h) * h)


@in_place
def a_view_changed_later(self, x):
    h = self.a(x) * 1.0
    view = h[:, :2]
    y = self.b(x)
    view.mul_(3.0)
    return self.head(self.c(h) + y)


@in_place
def a_base_changed_after_the_view(self, x):
    h = self.a(x) * 1.0
    view = h.t()
    h.add_(self.b(x))
    return self.head(self.c(view.t()))


@in_place
def a_view_of_a_view(self, x):
    h = self.a(x) * 1.0
    view = h.view(-1, 2, 3)
    inner = view[:, 0]
    y = self.b(h.tanh())
    inner.zero_()
    return self.head(self.c(h) + y)


@in_place
def changed_twice_with_uses_between(self, x):
    h = self.a(x) * 1.0
    first = h.sum(1, keepdim=True)
    h.add_(1.0)
    second = self.b(h.exp())
    h.mul_(0.5)
    return self.head(self.c(h) + first + second)


@in_place
def relu_in_place(self, x):
    h = F.relu(self.a(x), inplace=True)
    h = F.relu_(self.b(h))
    return self.head(self.c(h))


@in_place
def a_written_buffer_of_results(self, x):
    out = torch.zeros(x.shape[0], 2 * WIDTH)
    out[:, :WIDTH] = self.a(x)
    out[:, WIDTH:] = self.b(x)
    return self.head(self.c(out[:, ::2] * out[:, 1::2]))


@in_place
def an_out_argument(self, x):
    mask = torch.empty_like(x)
    torch.mul(x, 2.0, out=mask)
    return self.head(self.c(self.b(self.a(x)) * mask))


@in_place
def the_batch_itself(self, x):
    h = self.a(x.clone())
    x += 1.0
    h = self.b(h) + x
    x[0] = 0.0
    return self.head(self.c(h) * x)


@in_place
def a_view_of_the_batch(self, x):
    half = x[:, :3]
    h = self.a(x.clone())
    half.mul_(2.0)
    return self.head(self.c(self.b(h) + x))


@in_place
def index_functions(self, x):
    h = self.a(x) * 1.0
    h.index_add_(1, torch.tensor([0, 2]), self.b(x)[:, :2])
    h.scatter_(1, torch.zeros(x.shape[0], 1, dtype=torch.long), 0.25)
    return self.head(self.c(h))


@in_place
def written_through_data(self, x):
    mask = torch.ones_like(x)
    mask.data[:, 0] = 0.0
    return self.head(self.c(self.b(self.a(x)) * mask))


@pytest.mark.parametrize("name", IN_PLACE)
def test_changes_in_place(name):
    assert_splits(layers_that(IN_PLACE[name]), features(), loss=mean_square)


# -- how values go

WAYS = {}


def way(function):
    WAYS[function.__name__] = function
    return function


@way
def an_op_that_returns_its_input(self, x):
    h = self.a(x).contiguous()
    h = h.to(torch.float32)
    kept = h
    h = self.b(h).contiguous()
    return self.head(self.c(h) + kept.contiguous())


@way
def an_identity_module(self, x):
    h = nn.functional.dropout(self.a(x), 0.0)
    return self.head(self.c(self.b(h.view_as(h)) + h))


@way
def used_on_many_stages(self, x):
    h = self.a(x)
    y = self.b(h) * h
    z = self.c(y) + h
    return self.head(z * h).sum(1, keepdim=True) + h.mean()


@way
def a_diamond(self, x):
    h = self.a(x)
    left, right = self.b(h), self.c(h)
    return self.head(left * right + torch.stack([left, right, h]).sum(0))


@way
def views_cross(self, x):
    h = self.a(x).view(-1, 2, 3).transpose(1, 2)
    h = self.b(h.reshape(-1, WIDTH))
    first, second = h.chunk(2, dim=1)
    return self.head(self.c(torch.cat([second, first], 1)).t().t())


@way
def expanded_crosses(self, x):
    h = self.a(x).mean(1, keepdim=True).expand(-1, WIDTH)
    return self.head(self.c(self.b(h) * h))


@way
def several_results(self, x):
    values, order = self.a(x).sort(dim=1)
    top = self.b(values).topk(3, dim=1)
    return self.head(self.c(torch.cat([top.values, values.gather(1, order)[:, :3]], 1)))


@way
def a_value_hidden_in_an_object(self, x):
    notes = SimpleNamespace(h=None)
    notes.h = self.a(x)
    y = self.b(notes.h)
    notes.late = y * 2
    return self.head(self.c(y) + notes.h + notes.late)


@way
def lists_and_dicts(self, x):
    kept = []
    for layer in (self.a, self.b, self.c):
        x = layer(x).tanh()
        kept.append(x)
    named = {str(i): value for i, value in enumerate(kept)}
    return self.head(sum(named.values()))


@way
def without_gradients_in_between(self, x):
    h = self.a(x)
    with torch.no_grad():
        scale = self.b(h).abs().mean() + 1.0
    return self.head(self.c(h) / scale)


@way
def detached(self, x):
    h = self.a(x)
    return self.head(self.c(self.b(h.detach()) + h))


@way
def constants(self, x):
    positions = torch.arange(x.shape[0], device=x.device)[:, None] / 10
    return self.head(self.c(self.b(self.a(x + positions)) * torch.tensor(0.5) + torch.ones(WIDTH)))


@way
def a_module_called_twice(self, x):
    return self.head(self.b(self.a(self.b(x)).tanh()))


@way
def parameters_used_by_functions(self, x):
    h = F.linear(x, self.a.weight)
    h = h + self.a.bias * self.b.weight[0]
    return self.head(h @ self.c.weight.t() + self.b.bias)


@way
def a_loop_over_rows(self, x):
    rows = [self.b(self.a(row)) for row in x.unbind(0)]
    return self.head(self.c(torch.stack(rows)))


@way
def glue_in_many_places(self, x):
    mask = (x > 0).float()
    h = self.a(x) * mask
    h = self.b(h) * mask.flip(1)
    return self.head(self.c(h) + mask.sum(1, keepdim=True))


@way
def no_head(self, x):
    return self.c(self.b(self.a(x))).sum(1, keepdim=True)


@pytest.mark.parametrize("name", WAYS)
def test_ways_of_values(name):
    shared = name in ("a_module_called_twice", "parameters_used_by_functions", "a_loop_over_rows")
    # One stage adds the uses of a shared parameter in another order than autograd: exact makes it one order,
    # but not autograd's.
    tolerance = 1e-6 if shared else 0.0
    assert_splits(layers_that(WAYS[name]), features(), loss=mean_square, tolerance=tolerance, exact=shared)


def test_a_value_used_on_stages_0_2_and_3():
    """A skip that passes a stage, and a gradient that is relayed."""

    def forward(self, x):
        h = self.a(x)
        y = self.b(h.tanh())
        z = self.c(y) * h
        return self.head(z) + h.sum(1, keepdim=True)

    assert_splits(layers_that(forward), features(), loss=mean_square, stages=(4, 5))


# -- arguments and results


class Inner(nn.Module):
    """A module with every kind of argument."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, *, x, scale=None, kind="tanh", pair=(None, None), flags=()):
        h = self.layer(x)
        h = torch.tanh(h) if kind == "tanh" else h
        h = h if scale is None else h * scale
        return h if pair[0] is None else h + pair[0] * len(flags)


@dataclass
class Result:
    first: torch.Tensor
    second: torch.Tensor
    name: str


class Trees(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.parts = nn.ModuleList(Inner() for _ in range(3))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        h = self.parts[0](x=x, kind=None)
        packed = self.pack(h, self.parts[1](x=h, scale=h.mean(), pair=(h, None), flags=["a", 1, None]))
        first, second = self.unpack(packed)
        return self.head(self.parts[2](x=first, kind="none", pair=(second, "s"), flags=(True,)))

    def pack(self, first, second):
        return {
            "tuple": (first, second),
            "list": [first, [second, None]],
            "dict": {"first": first, "more": {"second": second, "name": "x"}},
            "dataclass": Result(first, second, "x"),
        }[self.kind]

    def unpack(self, packed):
        match self.kind:
            case "tuple":
                return packed
            case "list":
                return packed[0], packed[1][0]
            case "dict":
                return packed["first"], packed["more"]["second"]
        return packed.first, packed.second


class Wrapped(nn.Module):
    """Returns its inner module's tree, so that the tree passes through a module's result."""

    def __init__(self, kind):
        super().__init__()
        self.first = Trees(kind)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.inner = Packing(self.first.pack)

    def forward(self, x):
        packed = self.inner(self.second(x), x)
        first, second = self.first.unpack(packed)
        return self.first(first * second)


class Packing(nn.Module):
    def __init__(self, pack):
        super().__init__()
        self.pack = pack
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, h, x):
        return self.pack(self.layer(h), x.tanh())


@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "dataclass"])
@pytest.mark.parametrize("model", [Trees, Wrapped])
def test_trees_of_arguments_and_results(model, kind):
    assert_splits(seeded(lambda: model(kind)), features(), loss=mean_square)


@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "dataclass"])
def test_a_leaf_that_returns_a_tree(kind):
    assert_splits(
        seeded(lambda: Wrapped(kind)), features(), loss=mean_square, atomic=[Packing], stages=(2, 3)
    )


def test_batches_of_every_form():
    x, y = torch.randn(8, WIDTH), torch.randn(8, 1)
    build = layers_that(lambda self, x: self.head(self.c(self.b(self.a(x)))))

    def check(batch, pick):
        assert_splits(
            build, batch, loss=lambda m, b: F.mse_loss(m(pick(b)[0]) * pick(b)[2], pick(b)[1]), stages=(2,)
        )

    check((x, y), lambda b: (*b, 1.0))
    check([x, {"y": y, "scale": 0.5, "name": "n", "none": None}], lambda b: (b[0], b[1]["y"], b[1]["scale"]))
    check({"x": x, "y": y, "scale": torch.tensor(0.25)}, lambda b: (b["x"], b["y"], b["scale"]))
    check(torch.cat([x, y], 1), lambda b: (b[:, :WIDTH], b[:, WIDTH:], 2.0))
    check({"x": x, "same": x, "y": y}, lambda b: (b["x"] + b["same"], b["y"], 1.0))


def test_a_batch_that_is_not_contiguous():
    batch = {"x": torch.randn(WIDTH, 8).t(), "y": torch.randn(8, 2)[:, :1]}
    build = layers_that(lambda self, x: self.head(self.c(self.b(self.a(x)))))
    assert_splits(build, batch, loss=mean_square)


# -- modules with a mind of their own


class Statistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(WIDTH, WIDTH),
            nn.BatchNorm1d(WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.BatchNorm1d(WIDTH, momentum=None),
            nn.Linear(WIDTH, 1),
        )

    def forward(self, x):
        return self.layers(x)


def test_running_statistics_end_as_unsplit():
    assert_splits(seeded(Statistics), features(), loss=mean_square, num_microbatches=4)


class Counting(nn.Module):
    """A buffer that functions in the container change, and tensors that they only use."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept
        self.layers = mlp(WIDTH, WIDTH, WIDTH, 1)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("scale", torch.full((WIDTH,), 0.5))
        self.shift = torch.full((WIDTH,), 0.25)  # a tensor that is not registered

    def forward(self, x):
        self.calls += 1
        kept = self.kept(self.calls)
        x = x * self.scale + self.shift
        for layer in self.layers:
            x = layer(x)
        return x + kept + self.scale[0] + self.shift[0]


@pytest.mark.parametrize(
    "kept", [lambda buffer: buffer * 2, lambda buffer: buffer.clone(), lambda buffer: buffer.view(1, 1)]
)
def test_buffers_used_and_changed(kept):
    """What is kept of the buffer is this microbatch's, though the next one changes it before it is used."""
    assert_splits(seeded(lambda: Counting(kept)), features(), loss=mean_square, num_microbatches=4)


class OwnNorm(nn.Module):
    """Running statistics through the function instead of torch's module."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("variance", torch.ones(WIDTH))

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.variance, training=True, momentum=0.3)


class NormsTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = mlp(WIDTH, WIDTH, WIDTH, 1)
        self.norm = OwnNorm()

    def forward(self, x):
        h = self.norm(self.layers[1](self.layers[0](x)))
        h = self.norm(self.layers[3](self.layers[2](h)))
        return self.layers[4](h)


def test_running_statistics_of_a_norm_used_twice():
    """Its two uses must not be parted: each would run ahead with its own statistics."""
    assert_splits(seeded(NormsTwice), features(), loss=mean_square, num_microbatches=4, stages=(2,))


class Averaging(nn.Module):
    """Keeps a running average of its activations, and uses it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("average", torch.zeros(WIDTH))

    def forward(self, x):
        h = self.layer(x)
        with torch.no_grad():
            self.average.mul_(0.9).add_(h.mean(0), alpha=0.1)
        return h - self.average


def test_running_averages_of_activations():
    build = seeded(lambda: nn.Sequential(Averaging(), nn.Tanh(), Averaging(), nn.Linear(WIDTH, 1)))
    assert_splits(build, features(), loss=mean_square, num_microbatches=4)


class Replacing(nn.Module):
    """A buffer that is replaced instead of changed."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("average", torch.zeros(WIDTH))

    def forward(self, x):
        h = self.layer(x)
        self.average = 0.9 * self.average + 0.1 * h.detach().mean(0)
        return h - self.average


def test_a_buffer_that_is_replaced():
    build = seeded(lambda: nn.Sequential(Replacing(), nn.Tanh(), Replacing(), nn.Linear(WIDTH, 1)))
    assert_splits(build, features(), loss=mean_square, num_microbatches=4)


class Square(torch.autograd.Function):
    """Has another derivative than autograd would find, so that taking it apart shows."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x * 7


class Squaring(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return Square.apply(self.layer(x)) + 1


class WithFunctions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = Squaring()
        self.second = Squaring()
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()))


def test_a_custom_function_keeps_its_own_gradient():
    assert_splits(seeded(WithFunctions), features(), loss=mean_square)


def test_a_custom_function_in_the_loss_keeps_its_own_gradient():
    assert_splits(
        layers_that(lambda self, x: self.head(self.c(self.b(self.a(x))))),
        features(),
        loss=lambda model, batch: Square.apply(mean_square(model, batch)) + Square.apply(batch["y"]).mean(),
    )


class Mapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x):
        return torch.vmap(lambda row: torch.tanh(self.weight @ row))(x)


def test_vmap_inside_a_module():
    assert_splits(
        seeded(lambda: nn.Sequential(Mapped(), nn.Linear(WIDTH, WIDTH), Mapped(), nn.Linear(WIDTH, 1))),
        features(),
        loss=mean_square,
        # Without batching of the matrix product's gradient, the sum over rows has no one order.
        tolerance=1e-6,
    )


class Remembering(nn.Module):
    """Keeps something of each call in its own attributes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.num_calls = 0
        self.last = None

    def forward(self, x):
        self.num_calls += 1
        self.last = self.layer(x)
        return self.last * 2


def test_a_module_that_changes_its_own_state():
    build = seeded(lambda: nn.Sequential(Remembering(), nn.Tanh(), Remembering(), nn.Linear(WIDTH, 1)))
    assert_splits(build, features(), loss=mean_square)


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = mlp(WIDTH, WIDTH, WIDTH, WIDTH, 1)
        self.layers[0].register_forward_hook(lambda module, args, output: output * 2)
        self.layers[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        self.layers[4].register_full_backward_hook(lambda module, given, got: (given[0] * 3,))

    def forward(self, x):
        return self.layers(x)


def test_modules_with_hooks():
    assert_splits(seeded(Hooked), features(), loss=mean_square)


def test_parameters_that_are_frozen_or_unused():
    plain = layers_that(lambda self, x: self.head(self.c(self.b(self.a(x)))))
    assert_splits(lambda: _frozen(plain()), features(), loss=mean_square)


def _frozen(model):
    model.b.requires_grad_(False)
    model.a.bias.requires_grad_(False)
    model.unused = nn.Linear(2, 2)
    return model


def test_everything_before_the_last_layer_frozen():
    build = layers_that(lambda self, x: self.head(self.c(self.b(self.a(x)))))

    def frozen():
        model = build()
        for layer in (model.a, model.b, model.c):
            layer.requires_grad_(False)
        return model

    assert_splits(frozen, features(), loss=mean_square)


def test_a_batch_that_asks_for_gradients():
    build = layers_that(lambda self, x: self.head(self.c(self.b(self.a(x)))))
    batch = features()
    batch["x"].requires_grad_()

    def loss(model, b):
        return mean_square(model, b)

    assert_splits(build, Microbatches([batch, batch]), loss=loss)


def test_autocast_in_the_model():
    def forward(self, x):
        h = self.a(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.b(h)
            h = self.c(h)
        return self.head(h.float())

    assert_splits(layers_that(forward), features(), loss=mean_square)


def test_metrics_beside_the_loss():
    def loss(model, batch):
        prediction = model(batch["x"])
        return F.mse_loss(prediction, batch["y"]), {"mean": prediction.mean(), "n": len(batch["y"])}

    assert_splits(layers_that(lambda self, x: self.head(self.c(self.b(self.a(x))))), features(), loss=loss)


def test_a_loss_of_many_functions():
    def loss(model, batch):
        prediction = model(batch["x"])
        error = prediction - batch["y"]
        weight = torch.where(error.detach().abs() < 0.5, 1.0, 2.0)
        return (weight * error.square()).mean() + 0.01 * sum(p.square().sum() for p in model.parameters())

    assert_splits(
        layers_that(lambda self, x: self.head(self.c(self.b(self.a(x))))),
        features(),
        loss=loss,
        tolerance=1e-6,
    )
