"""A backward in two parts does what a whole one does: every number, every hook, once."""

import itertools

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

import evenflow
from evenflow.ir import Backward, Forward, InputGrad, Placement, Schedule, WeightGrad
from evenflow.runtime.split_backward import Extent, Walk, extent
from own_schedules import OWN
from unsplit import assert_splits, mean_square, mlp, regression, seeded

SPLIT = OWN["straight, split"]
WIDTH = 4


def walks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of walks that are made from now on."""
    found: list[str] = []
    to, whole = Walk.run_to, Walk.run
    monkeypatch.setattr(Walk, "run_to", lambda walk, leaves: (found.append("part"), to(walk, leaves)))
    monkeypatch.setattr(Walk, "run", lambda walk: (found.append("whole"), whole(walk)))
    return found


# -- models whose graph must be walked once


class Twice(torch.autograd.Function):
    """Counts its backwards, and gives up what it saved."""

    num_backwards = 0

    @staticmethod
    def forward(ctx, x):
        ctx.kept = [x.detach()]
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        Twice.num_backwards += 1
        return gradient * 2 + 0 * ctx.kept.pop()


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return Twice.apply(self.linear(x)).tanh()


RUNS = itertools.count()  # an attribute that counts would be state, of which a recording takes care


def runs_so_far():
    return int(repr(RUNS).removeprefix("count(").removesuffix(")"))


class Checkpointed(nn.Module):
    """Counts how often the region that it checkpoints is run: forward, and once more for each backward."""

    def __init__(self, *, reentrant):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.reentrant = reentrant

    def region(self, x):
        next(RUNS)
        return self.linear(x).tanh()

    def forward(self, x):
        return checkpoint(self.region, x, use_reentrant=self.reentrant)


class HookedTensor(nn.Module):
    num_calls = 0

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        h = self.linear(x)
        h.register_hook(self.note)
        return h.tanh()

    @staticmethod
    def note(gradient):
        HookedTensor.num_calls += 1
        return gradient * 0.5


class HookedModule(nn.Module):
    num_calls = 0

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.linear.register_full_backward_hook(self.note)

    def forward(self, x):
        return self.linear(x).tanh()

    @staticmethod
    def note(module, gradient_in, gradient_out):
        HookedModule.num_calls += 1


ONCE = {
    "custom function": Custom,
    "reentrant checkpoint": lambda: Checkpointed(reentrant=True),
    "checkpoint": lambda: Checkpointed(reentrant=False),
    "hooked tensor": HookedTensor,
    "hooked module": HookedModule,
}


@pytest.mark.parametrize("kind", ONCE)
def test_a_graph_that_allows_one_walk_gets_one(monkeypatch, kind):
    def build():
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), ONCE[kind](), nn.Linear(WIDTH, 1))

    assert_splits(seeded(build), regression(), loss=mean_square, schedule=SPLIT)
    pipe = evenflow.pipeline(
        seeded(build)(),
        loss=mean_square,
        example=regression(),
        num_microbatches=2,
        split=["1"],
        atomic=[ONCE[kind]] if isinstance(ONCE[kind], type) else [Checkpointed],
        schedule=SPLIT,
    )
    found = walks(monkeypatch)
    Twice.num_backwards = HookedTensor.num_calls = HookedModule.num_calls = 0
    before = runs_so_far()
    pipe.step(regression())
    # The first stage's weight gradients are whole walks too.
    assert found == ["whole"] * 4
    runs = (runs_so_far() - before) // 2
    counts = [Twice.num_backwards, HookedTensor.num_calls, HookedModule.num_calls, runs]
    assert sorted(counts) == [0, 0, 0, 2], "once for each microbatch"


# -- stages that lack something


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


MODELS = {
    "frozen": frozen,
    "frozen at first": frozen_at_first,
    "bare": Bare,
    "experts": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), Experts(), Experts(), nn.Linear(WIDTH, 1)),
    "reused": Reused,
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_split_backward_gives_the_same_numbers(kind):
    assert_splits(seeded(MODELS[kind]), regression(), loss=mean_square, schedule=SPLIT)


def test_hooks_of_parameters_are_called_once_for_each_microbatch():
    model, called = mlp(WIDTH, 8, 8, 1), []
    model[4].weight.register_hook(lambda gradient: called.append("before"))
    model[4].weight.register_post_accumulate_grad_hook(lambda parameter: called.append("after"))
    pipe = evenflow.pipeline(
        model, loss=mean_square, example=regression(), num_microbatches=2, split=["2", "4"], schedule=SPLIT
    )
    pipe.step(regression())
    assert called == ["before", "after"] * 2


# -- the order of sums


def late_weights(num_ranks: int, stages_per_rank: int, num_microbatches: int) -> Schedule:
    """All weight gradients at the end."""
    assert num_ranks == 2
    kinds = (Forward, InputGrad, WeightGrad)
    ranks = tuple(
        tuple(kind(stage, at) for kind in kinds for at in range(num_microbatches)) for stage in range(2)
    )
    return Schedule("late", Placement.linear(2), num_microbatches, ranks)


def test_gradients_add_up_in_order_where_some_graphs_are_walked_once(monkeypatch):
    from evenflow.runtime import stage

    # Every second microbatch of the second stage may be walked once only.
    numbers = iter(range(100))

    def alternating(walk):
        reach = extent(walk)
        return Extent(reach.received, reach.weights, twice=next(numbers) % 4 != 3)

    monkeypatch.setattr(stage, "extent", alternating)
    assert_splits(
        lambda: mlp(WIDTH, 8, 8, 1),
        regression(),
        loss=mean_square,
        num_microbatches=8,
        stages=(2,),
        schedule=lambda num_ranks, stages_per_rank, num_microbatches: (
            late_weights if num_ranks == 2 else SPLIT
        )(num_ranks, stages_per_rank, num_microbatches),
    )


# -- what a walk reaches


def test_the_extent_of_a_graph():
    leaf = torch.ones(2, requires_grad=True)
    one = torch.ones(())

    def of(*roots):
        return extent(Walk([get_gradient_edge(root) for root in roots], [one] * len(roots)))

    assert of() == Extent(received=False, weights=False, twice=True)
    assert of(leaf) == Extent(received=False, weights=True, twice=True)
    assert of(leaf.sum()) == Extent(received=False, weights=True, twice=True)
    assert not of(Twice.apply(leaf).sum()).twice
    assert not of(checkpoint(torch.tanh, leaf, use_reentrant=True).sum()).twice
    assert not of(checkpoint(torch.tanh, leaf, use_reentrant=False).sum()).twice


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
