"""A backward in two parts does what a whole one does: every number, every hook, once."""

import random
import threading
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import evenflow
from evenflow.ir import Backward, Forward, InputGrad, Placement, Schedule, WeightGrad
from evenflow.runtime.program.deferral import Deferral
from evenflow.runtime.program.weight_grads import WeightGrads
from own_schedules import OWN
from unsplit import assert_splits, mean_square, mlp, regression, seeded

SPLIT = OWN["straight, split"]
WIDTH = 4
CPU = torch.device("cpu")

# -- each function against torch's own


def called(name, *args, **options):
    """What torch's function of this name makes, whichever stands there now."""
    return getattr(functional, name)(*args, **options)


def grads_of(function, x, parameters, *, put_off: bool):
    """What two microbatches leave: the inputs' gradients, and the parameters'."""
    parameters = [nn.Parameter(each.clone(memory_format=torch.preserve_format)) for each in parameters]
    deferral, inputs = Deferral(CPU), []
    deferral.learn(parameters, ())
    waiting = []
    for number in range(2):
        deferral.into = later = WeightGrads()
        given = (x + number if x.is_floating_point() else x).detach()
        given = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(given).requires_grad_()
        if put_off:
            with deferral:
                made = function(given, *parameters)
        else:
            made = function(given, *parameters)
        gradient = torch.randn(made.shape, dtype=made.dtype, generator=torch.Generator().manual_seed(number))
        made.backward(gradient)
        assert bool(later) == put_off, "else this would compare torch with itself"
        assert all((each.grad is None) == put_off for each in parameters) or number
        waiting.append(later)
        inputs.append((made.detach(), given.grad))
    for later in waiting:
        later.run()
    return inputs, [each.grad for each in parameters]


def assert_as_torch(function, x, *parameters):
    found, expected = (grads_of(function, x, parameters, put_off=put_off) for put_off in (True, False))
    for mine, torchs in zip(
        (*found[0][0], *found[0][1], *found[1]), (*expected[0][0], *expected[0][1], *expected[1]), strict=True
    ):
        assert mine.dtype == torchs.dtype
        assert torch.equal(mine, torchs), (mine - torchs).abs().max()
        lies, torchs_lies = (
            [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (mine, torchs)
        )
        assert lies == torchs_lies


def any_strides(chance: random.Random, *shape: int) -> torch.Tensor:
    """A tensor of this shape whose dimensions lie in memory in any order."""
    order = list(range(len(shape)))
    if chance.random() < 0.5:
        chance.shuffle(order)
    made = torch.randn([shape[each] for each in order])
    return made.permute([order.index(each) for each in range(len(shape))])


@pytest.mark.parametrize("seed", range(60))
def test_linear(seed):
    chance = random.Random(seed)
    torch.manual_seed(seed)
    shape = [chance.choice([1, 2, 3, 17]) for _ in range(chance.randint(0, 3))]
    wide, out = (chance.choice([1, 2, 5, 64]) for _ in range(2))
    parameters = [any_strides(chance, out, wide), *([torch.randn(out)] * chance.randint(0, 1))]
    assert_as_torch(partial(called, "linear"), any_strides(chance, *shape, wide), *parameters)


@pytest.mark.parametrize("seed", range(30))
def test_addmm(seed):
    chance = random.Random(seed)
    torch.manual_seed(seed)
    rows, wide, out = (chance.choice([1, 2, 5, 64]) for _ in range(3))
    assert_as_torch(
        lambda x, bias, weight: torch.addmm(bias, x, weight),
        any_strides(chance, rows, wide),
        torch.randn(out),
        any_strides(chance, wide, out),
    )


@pytest.mark.parametrize("seed", range(40))
def test_convolutions(seed):
    chance = random.Random(seed)
    torch.manual_seed(seed)
    num_dims, groups = chance.randint(1, 3), chance.choice([1, 1, 2])
    inner, outer = (groups * chance.choice([1, 2, 8]) for _ in range(2))
    size = chance.choice([1, 3])
    options = {
        "stride": chance.choice([1, 2]),
        "padding": chance.choice([0, 1, [1] * num_dims]),
        "dilation": chance.choice([1, 2]),
        "groups": groups,
    }
    weight = torch.randn(outer, inner // groups, *[size] * num_dims)
    x = torch.randn(chance.choice([1, 2]), inner, *[chance.choice([7, 12])] * num_dims)
    if num_dims == 2 and chance.random() < 0.5:
        x, weight = (each.contiguous(memory_format=torch.channels_last) for each in (x, weight))
    bias = [torch.randn(outer)] * chance.randint(0, 1)
    assert_as_torch(partial(called, f"conv{num_dims}d", **options), x, weight, *bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_other_types(kind, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 9, 8, dtype=dtype)
    weight = torch.randn(16, 8, *[3, 3] * (kind == "conv2d"), dtype=dtype)
    assert_as_torch(partial(called, kind), x, weight, torch.randn(16, dtype=dtype))


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_autocast(kind):
    def cast(*tensors):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return getattr(functional, kind)(*tensors)

    torch.manual_seed(0)
    weight = torch.randn(16, 8, *[3, 3] * (kind == "conv2d"))
    assert_as_torch(cast, torch.randn(2, 8, 9, 8), weight, torch.randn(16))


def test_a_weight_that_is_used_several_times():
    torch.manual_seed(0)

    def several(x, weight, bias):
        for _ in range(4):
            x = functional.linear(x, weight, bias).tanh()
        return functional.linear(x, weight)

    assert_as_torch(several, torch.randn(3, 7, 64), torch.randn(64, 64) / 8, torch.randn(64))


def test_a_weight_that_is_made_of_parameters():
    torch.manual_seed(0)

    def made(x, scale, weight, bias):
        normed = scale * weight / weight.norm(dim=1, keepdim=True)
        for half in (normed[:32], normed[32:], normed[16:48], normed[:32]):
            x = torch.cat([functional.linear(x, half), functional.linear(x, half, bias[:32])], -1).tanh()
        return x

    assert_as_torch(made, torch.randn(3, 7, 64), torch.randn(64, 1), torch.randn(64, 64), torch.randn(64))


@pytest.mark.parametrize("by_columns", [True, False])
def test_grouped_products(by_columns):
    torch.manual_seed(0)
    ends = torch.tensor([3, 3, 10, 16], dtype=torch.int32)
    weight = torch.randn(4, 32, 16) if by_columns else torch.randn(4, 16, 32)

    def grouped(x, weight):
        return torch._grouped_mm(x, weight.transpose(-2, -1) if by_columns else weight, offs=ends)

    assert_as_torch(grouped, torch.randn(16, 16), weight)


def test_a_checkpoint_puts_off_once():
    torch.manual_seed(0)

    def region(x, weight, bias):
        return functional.linear(functional.linear(x, weight, bias).tanh(), weight)

    runs = []

    def checkpointed(x, *parameters):
        def once_more(*tensors):
            runs.append(1)
            return region(*tensors)

        return checkpoint(once_more, x, *parameters, use_reentrant=False)

    deferral, weight, bias = Deferral(CPU), nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
    deferral.learn((weight, bias), ())
    x = torch.randn(3, 8)
    with deferral:
        checkpointed(x, weight, bias).sum().backward()
    deferral.into.run()
    assert len(runs) == 2
    found, weight.grad, bias.grad = (weight.grad, bias.grad), None, None
    region(x, weight, bias).sum().backward()
    assert torch.equal(found[0], weight.grad)
    assert torch.equal(found[1], bias.grad)


def test_torch_is_left_as_it_was():
    before = functional.linear, torch.addmm, functional.conv2d
    other = threading.Thread(target=lambda: Deferral(CPU).__exit__(Deferral(CPU).__enter__()))
    with Deferral(CPU):
        other.start()
        other.join()
        assert functional.linear is not before[0]
        assert functional.linear.__name__ == before[0].__name__
    assert (functional.linear, torch.addmm, functional.conv2d) == before


def test_what_is_put_off_holds_no_graph():
    deferral, weight = Deferral(CPU), nn.Parameter(torch.randn(4, 4))
    deferral.learn((weight,), ())
    memories = []
    for _ in range(2):
        deferral.into = later = WeightGrads()
        x = torch.randn(3, 4, requires_grad=True)
        with deferral:
            functional.linear(functional.linear(x, weight).tanh(), weight).sum().backward()
        memories.append(weakref.ref(later))
        del x, later
    deferral.into = WeightGrads()
    assert [memory() for memory in memories] == [None, None], "though they were never run"


# -- whole models


def frozen():
    model = mlp(WIDTH, 8, 8, 1)
    model[2].requires_grad_(False)
    return model


def frozen_at_first():
    model = mlp(WIDTH, 8, 8, 1)
    model[0].requires_grad_(False)
    return model


class Bare(nn.Module):
    """A stage without parameters, and a value that gets no gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x):
        h = self.first(x)
        unused = h.detach() * 2
        for _ in range(6):
            h = h.tanh() + unused.mean()
        return self.last(h)


class Experts(nn.Module):
    """Each row goes to one of the experts, whose gradients are zero for the other rows."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        scores = self.router(x).softmax(-1)
        best = scores.argmax(-1, keepdim=True)
        chosen = [scores[:, n, None] * (best == n) * expert(x) for n, expert in enumerate(self.experts)]
        return sum(chosen)


class Reused(nn.Module):
    """A hidden state that every later layer uses again."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        first = h = self.layers[0](x)
        for layer in self.layers[1:]:
            h = layer(h).tanh() * first + first
        return h.sum(-1, keepdim=True)


class Penalised(nn.Module):
    """A weight that is no weight alone."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh() + layer.weight.pow(2).mean()
        return x


class Again(nn.Module):
    """A weight that is used several times."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for _ in range(3):
            x = self.layer(x).tanh()
        return x


class Normalised(nn.Module):
    """Weights that are made of parameters."""

    def __init__(self):
        super().__init__()
        layers = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.layers = nn.ModuleList(nn.utils.parametrizations.weight_norm(layer) for layer in layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


class Nested(nn.Module):
    """A weight, and a part of it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = torch.cat([functional.linear(x, self.layer.weight[:2])] * 2, -1).tanh()
        return self.layer(x)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x):
        x = x[:, None]
        return self.attention(x, x, x, need_weights=False)[0][:, 0]


class Picture(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x):
        picture = self.last(self.first(x[:, None, None]).relu())
        return picture[:, 0, 0]


class Checkpointed(nn.Module):
    """Runs again in the backward, out of sight."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return checkpoint(lambda x: self.inner(x).tanh(), x, use_reentrant=False)


class TwoBiases(nn.Module):
    """A bias that is added elsewhere too, and its weight that is used twice."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return functional.linear(self.inner(x) + self.inner.bias, self.inner.weight).tanh()


class Mixed(nn.Module):
    """A weight in two regions of autocast, and a weight that is made once for two uses."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(WIDTH, 1) * 1.25)

    def forward(self, x):
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = self.inner(x).tanh()
        made = self.inner.weight * self.scale
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = functional.linear(functional.linear(x, made), made)
        return x.float()


class LearnedInput(nn.Module):
    """A parameter that two products take for their input, under autocast."""

    def __init__(self):
        super().__init__()
        self.tokens, self.inner = nn.Parameter(torch.randn(3, WIDTH)), nn.Linear(WIDTH, WIDTH)
        self.other = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            added = self.inner(self.tokens).sum() + self.other(self.tokens).sum()
        return x * added.float().tanh()


ATOMIC = [Penalised, Again, Nested, Checkpointed, TwoBiases, Mixed, LearnedInput]
MODELS = {
    "frozen": frozen,
    "frozen at first": frozen_at_first,
    "bare": Bare,
    "experts": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), Experts(), Experts(), nn.Linear(WIDTH, 1)),
    "reused": Reused,
    "penalised": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), Penalised(), nn.Linear(WIDTH, 1)),
    "normalised": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), Normalised(), nn.Linear(WIDTH, 1)),
    "nested": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), Nested(), nn.Linear(WIDTH, 1)),
    "again": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), Again(), Again(), nn.Linear(WIDTH, 1)),
    "attention": lambda: nn.Sequential(Attention(), Attention(), nn.Linear(WIDTH, 1)),
    "checkpointed": lambda: nn.Sequential(*(Checkpointed() for _ in range(4)), nn.Linear(WIDTH, 1)),
    "two biases": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), TwoBiases(), nn.Linear(WIDTH, 1)),
    "mixed": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), Mixed(), Mixed(), nn.Linear(WIDTH, 1)),
    "learned input": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), LearnedInput(), nn.Linear(WIDTH, 1)),
    "pictures": lambda: nn.Sequential(Picture(), Picture(), nn.Linear(WIDTH, 1)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_split_backward_gives_the_same_numbers(kind):
    # A parameter that is used on several stages would have several accumulators.
    assert_splits(
        seeded(MODELS[kind]),
        regression(),
        loss=mean_square,
        schedule=SPLIT,
        atomic=ATOMIC,
    )


def put_off_by(model, monkeypatch, **options) -> set[str]:
    """The parameters that get their gradients in a `WeightGrad` of the second stage."""
    found, put = set(), WeightGrads.put
    names = {}

    def noted(later, parameters, grads):
        found.update(names[id(each.node.variable)] for each in parameters if each is not None)
        put(later, parameters, grads)

    monkeypatch.setattr(WeightGrads, "put", noted)
    pipe = evenflow.pipeline(
        model, loss=mean_square, example=regression(), num_microbatches=2, schedule=SPLIT, **options
    )
    names.update((id(each), name) for name, each in pipe.named_parameters())
    pipe.step(regression())
    return found


PROJECTIONS = [("in", "_weight"), ("in", "_bias"), ("out", ".weight"), ("out", ".bias")]


@pytest.mark.parametrize("share", [None, 0.0])
@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (lambda: nn.Linear(WIDTH, WIDTH), {"weight", "bias"}),
        (Attention, {f"attention.{at}_proj{of}" for at, of in PROJECTIONS}),
        (Picture, {"first.weight", "first.bias", "last.weight", "last.bias"}),
        (lambda: nn.LayerNorm(WIDTH), set()),
        (Penalised, set()),
        (Nested, set()),
        (Again, set()),  # several uses in a module: who knows what else it calls
    ],
)  # fmt: skip
def test_what_is_put_off(monkeypatch, layer, names, share):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), layer(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1))
    found = put_off_by(model, monkeypatch, split=["1"], max_leaf_share=share)
    assert found == {f"1.{name}" for name in names} | {f"{n}.{k}" for n in (2, 3) for k in ("weight", "bias")}


def test_hooks_of_parameters_are_called_once_for_each_microbatch():
    model, called = mlp(WIDTH, 8, 8, 1), []
    model[4].weight.register_hook(lambda gradient: called.append("before"))
    model[4].weight.register_post_accumulate_grad_hook(lambda parameter: called.append("after"))
    pipe = evenflow.pipeline(
        model, loss=mean_square, example=regression(), num_microbatches=2, split=["2", "4"], schedule=SPLIT
    )
    pipe.step(regression())
    assert called == ["before", "after"] * 2


def test_hooks_in_autograds_graph_are_called_too():
    model, called = mlp(WIDTH, 8, 8, 1), []
    node = model[4].weight.view_as(model[4].weight).grad_fn.next_functions[0][0]
    node.register_prehook(lambda gradients: called.append(len(gradients)))
    pipe = evenflow.pipeline(
        model, loss=mean_square, example=regression(), num_microbatches=2, split=["2", "4"], schedule=SPLIT
    )
    pipe.step(regression())
    assert called == [1, 1]


def test_a_whole_backward_and_parts_in_one_stage():
    def mixed(num_ranks: int, stages_per_rank: int, num_microbatches: int) -> Schedule:
        queue = []
        for at in range(num_microbatches):
            halves = (InputGrad(0, at), WeightGrad(0, at))
            queue += [Forward(0, at), *(halves if at % 2 else (Backward(0, at),))]
        return Schedule("mixed", Placement.linear(1), num_microbatches, (tuple(queue),))

    assert_splits(
        lambda: mlp(WIDTH, 8, 1),
        regression(),
        loss=mean_square,
        schedule=mixed,
        stages=(),
        num_microbatches=4,
    )
