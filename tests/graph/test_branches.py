"""Python that looks at numbers: the batch's choose a recording, the parameters' are refused."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import evenflow
from evenflow.errors import RecordError
from evenflow.runtime.recorded.microbatch import Microbatches
from unsplit import (
    assert_same_step,
    assert_splits,
    mean_square,
    pipeline_step,
    plain_step,
    regression,
    seeded,
)

WIDTH = 4


class Branching(nn.Module):
    """Takes the way that `choose(batch's x)` says; `inside` puts the choice into a module of its own."""

    def __init__(self, choose):
        super().__init__()
        self.choose = choose
        self.first = nn.Linear(WIDTH, WIDTH)
        self.left = nn.Linear(WIDTH, WIDTH)
        self.right = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, x):
        h = self.first(x)
        way = self.choose(x)
        h = self.left(h).tanh() if way else self.right(h).sigmoid()
        return self.last(h * 2 if way else h)


CHOICES = {
    "all": lambda x: (x > 0).all(),
    "bool": lambda x: bool(x[0, 0] > 0),
    "item": lambda x: x[0, 0].item() > 0,
    "int": lambda x: int(x[0, 0] > 0) == 1,
    "float": lambda x: float(x.min()) > 0,
    "tolist": lambda x: x.tolist()[0][0] > 0,
    "equal": lambda x: torch.equal(x, x.abs()),
    "allclose": lambda x: torch.allclose(x, x.abs()),
    "contains": lambda x: 1.0 in x.sign() and -1.0 not in x.sign(),
    "nonzero": lambda x: (x < 0).nonzero().shape[0] == 0,
    "of a changed copy": lambda x: x.clone().mul_(2).min().item() > 0,
}


def batch_of(*signs: int, width: int = WIDTH) -> Microbatches:
    """Microbatches that are all positive or all negative, of the same shape."""
    items = []
    for number, sign in enumerate(signs):
        generator = torch.Generator().manual_seed(number)
        x = sign * (torch.rand(2, width, generator=generator) + 0.1)
        items.append({"x": x, "y": torch.randn(2, 1, generator=generator)})
    return Microbatches(items)


@pytest.mark.parametrize(
    ("choice", "stages"), [*((choice, 2) for choice in CHOICES), ("all", 1), ("item", 3)]
)
def test_a_branch_that_flips_between_microbatches_and_steps(choice, stages):
    build = seeded(lambda: Branching(CHOICES[choice]))
    model = build()
    pipe = evenflow.pipeline(
        model, loss=mean_square, example=batch_of(1, -1), stages=stages, max_leaf_share=0.0
    )
    for signs in [(1, 1), (1, -1, 1), (-1, -1), (-1, 1)]:
        batch = batch_of(*signs)
        expected = plain_step(build(), mean_square, list(batch.items))
        assert_same_step(pipeline_step(pipe, model, batch), expected)


class ByLength(nn.Module):
    """Loops as often as the batch says."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.step = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, x):
        h = self.first(x)
        for _ in range(int((x[:, 0] > 0).sum())):
            h = self.step(h).tanh()
        return self.last(h)


def test_a_loop_as_long_as_the_batch_says():
    build = seeded(ByLength)
    model = build()
    data = [batch_of(1, -1, 1), batch_of(-1, 1)]
    pipe = evenflow.pipeline(
        model, loss=mean_square, example=data[0], stages=2, max_leaf_share=0.0, exact=True, split=["last"]
    )
    for batch in data:
        expected = plain_step(build(), mean_square, list(batch.items))
        assert_same_step(pipeline_step(pipe, model, batch), expected, tolerance=1e-6)


def test_a_number_of_the_batch_used_as_a_number():
    """It must not be frozen into the recording."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

        def forward(self, x):
            scale = round(float(x.max()), 2)
            return self.b(self.a(x) * scale) + scale

    assert_splits(seeded(Scaled), batch_of(1, -1, 1, 1), loss=mean_square, stages=(2,))


def test_plain_values_of_the_batch_are_not_frozen():
    class Powered(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

        def forward(self, x, power, names):
            h = self.a(x) ** power
            return self.b(h.tanh() if "tanh" in names else h)

    def loss(model, batch):
        return F.mse_loss(model(batch["x"], batch["power"], batch["names"]), batch["y"])

    build = seeded(Powered)
    model = build()
    batches = [
        regression() | {"power": power, "names": names}
        for power, names in [(2, ["tanh"]), (3, ["tanh"]), (2, []), (2.0, []), (True, [])]
    ]
    pipe = evenflow.pipeline(
        model, loss=loss, example=batches[0], stages=2, max_leaf_share=0.0, num_microbatches=1
    )
    for batch in batches:
        assert_same_step(pipeline_step(pipe, model, batch), plain_step(build(), loss, [batch]))


def test_other_shapes_are_recorded_anew():
    build = seeded(lambda: Branching(lambda x: x.shape[0] > 2))
    model = build()
    pipe = evenflow.pipeline(
        model, loss=mean_square, example=regression(8), stages=2, max_leaf_share=0.0, num_microbatches=2
    )
    for rows in (8, 4, 12, 8, 2):
        batch = regression(rows)
        halves = [{k: t[i * rows // 2 : (i + 1) * rows // 2] for k, t in batch.items()} for i in range(2)]
        assert_same_step(pipeline_step(pipe, model, batch), plain_step(build(), mean_square, halves))


def test_training_flags_are_part_of_the_key():
    class Flagged(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

        def forward(self, x):
            h = self.a(x)
            return self.c(self.b(h) if self.training else h * 3)

    build = seeded(Flagged)
    model = build()
    pipe = evenflow.pipeline(
        model, loss=mean_square, example=regression(), stages=2, max_leaf_share=0.0, num_microbatches=1
    )
    for training in (True, False, True):
        assert_same_step(
            pipeline_step(pipe, model.train(training), regression()),
            plain_step(build().train(training), mean_square, [regression()]),
        )


# -- refused


def refused(text: str):
    return pytest.raises(RecordError, match=re.escape(text))


READS = {
    "item": lambda h: h.sum().item() > 0,
    "bool": lambda h: bool(h.sum() > 0),
    "if": lambda h: 1 if h.sum() > 0 else 0,
    "tolist": lambda h: h.tolist()[0][0] > 0,
    "float": lambda h: float(h.sum()) > 0,
    "equal": lambda h: torch.equal(h, h.abs()),
    "allclose": lambda h: torch.allclose(h, h.abs()),
    "numpy": lambda h: h.detach().numpy()[0, 0] > 0,
    "contains": lambda h: 0.5 in h,
    "nonzero": lambda h: h.nonzero().shape[0] > 3,
    "masked": lambda h: h[h > 0].shape[0] > 3,
}


@pytest.mark.parametrize("read", READS)
def test_a_branch_on_parameters_in_the_loss_function_is_refused_by_name(read):
    def loss(model, batch):
        h = model(batch["x"])
        return h.square().mean() * (2.0 if READS[read](h) else 1.0)

    with refused("the loss function calls "):
        evenflow.pipeline(nn.Linear(WIDTH, WIDTH), loss=loss, example=regression(), num_microbatches=1)


def test_a_branch_on_a_random_number_is_refused():
    def loss(model, batch):
        scale = 2.0 if torch.rand(()) > 0.5 else 1.0
        return mean_square(model, batch) * scale

    with refused("the loss function calls __bool__ on a tensor bool[] that depends on more than the batch"):
        evenflow.pipeline(nn.Linear(WIDTH, 1), loss=loss, example=regression())


def test_an_array_of_the_batch_is_refused():
    def loss(model, batch):
        scale = float(batch["x"].numpy().max())
        return mean_square(model, batch) * scale

    with refused("the loss function turns a tensor of the batch into an array (numpy), whose further use"):
        evenflow.pipeline(nn.Linear(WIDTH, 1), loss=loss, example=regression())


@pytest.mark.parametrize("kind", ["backward", "grad", "requires_grad_"])
def test_effects_that_cannot_be_repeated_are_refused_in_the_loss(kind):
    def loss(model, batch):
        value = mean_square(model, batch)
        if kind == "backward":
            value.backward(retain_graph=True)
        elif kind == "grad":
            (gradient,) = torch.autograd.grad(value, model.weight, create_graph=True)
            value = value + gradient.square().sum()
        else:
            batch["x"].requires_grad_()
        return value

    with refused("the loss function itself cannot be recorded: "):
        evenflow.pipeline(nn.Linear(WIDTH, 1), loss=loss, example=regression())


def test_a_parameter_changed_in_place_is_refused_in_the_loss():
    def loss(model, batch):
        with torch.no_grad():
            model.weight.mul_(0.5)
        return mean_square(model, batch)

    with refused("the loss function itself cannot be recorded: it changes the parameter weight in place"):
        evenflow.pipeline(nn.Linear(WIDTH, 1), loss=loss, example=regression())


def test_the_model_is_as_before_when_recording_fails():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 1))
    parameters, state = list(model.parameters()), {k: t.clone() for k, t in model.state_dict().items()}

    def loss(model, batch):
        return mean_square(model, batch) if model(batch["x"]).sum() > 0 else 0

    forward = nn.Module.__call__
    with refused("calls __bool__ on numbers that depend on the parameters"):
        evenflow.pipeline(model, loss=loss, example=regression())
    assert all(mine is before for mine, before in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert nn.Module.__call__ is forward


class Nested(nn.Module):
    """Looks a second time only where the first look allows it: elsewhere that look would fail."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x):
        h = self.first(x)
        if (x > 0).all():
            table = torch.arange(8.0)
            if table[(x[:, 0] * 4).long()].sum() > 3:
                h = h.tanh()
        return self.last(h)


def test_a_second_look_that_the_first_protects():
    build = seeded(Nested)
    model = build()
    near, far = batch_of(1, 1), batch_of(-1, -1)
    for item in far.items:
        item["x"] *= 100  # out of the table
    pipe = evenflow.pipeline(model, loss=mean_square, example=near, stages=2, max_leaf_share=0.0)
    for batch in (far, near, Microbatches([near.items[0], far.items[1]])):
        expected = plain_step(build(), mean_square, list(batch.items))
        assert_same_step(pipeline_step(pipe, model, batch), expected)
