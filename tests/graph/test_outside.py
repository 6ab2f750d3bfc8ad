"""Python values that reach a program: part of the key, or refused; never frozen."""

import random

import numpy as np
import pytest
import torch
from torch import nn

import evenflow


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 1)
        self.scale = 1.0
        self.register_buffer("k", torch.tensor(1.0))

    def forward(self, x):
        return self.b(torch.relu(self.a(x)) * self.scale * self.k)


BATCH = {"x": torch.linspace(-1, 1, 32).reshape(8, 4), "y": torch.linspace(0, 1, 8).reshape(8, 1)}
settings = {"weight": 1.0}


def squares(model, batch):
    return nn.functional.mse_loss(model(batch["x"]), batch["y"]) * settings["weight"]


def made():
    torch.manual_seed(0)
    return Scaled()


def plain_losses(change):
    settings["weight"] = 1.0
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(3):
        change(model, step)
        loss = squares(model, BATCH)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def piped_losses(change, stages):
    settings["weight"] = 1.0
    model = made()
    pipe = evenflow.pipeline(
        model,
        loss=squares,
        example=BATCH,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        stages=stages,
        num_microbatches=1,
        max_leaf_share=0.0,
    )
    losses = []
    for step in range(3):
        change(model, step)
        losses.append(float(pipe.step(BATCH).loss))
    return losses


def an_attribute(model, step):
    model.scale = 1.0 + step


def a_buffer_assigned(model, step):
    model.k = torch.tensor(1.0 + step)


def a_global_dict(model, step):
    settings["weight"] = 1.0 + step


def a_submodule_replaced(model, step):
    if step == 1:
        model.b = nn.Sequential(model.b, nn.Tanh())


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("change", [an_attribute, a_buffer_assigned, a_global_dict, a_submodule_replaced])
def test_a_change_between_steps_is_seen(change, stages):
    assert piped_losses(change, stages) == plain_losses(change)


class Growing(nn.Module):
    """Counts its calls in a list: the recorded run must not be among them."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 1), []

    def forward(self, x):
        self.calls.append(1)
        return self.layer(x) * len(self.calls)


def test_a_list_that_a_module_changes_does_not_count_the_recording():
    model = Growing()
    wrapped = nn.Sequential(model, nn.Linear(1, 1))
    pipe = evenflow.pipeline(wrapped, loss=squares, example=BATCH, stages=2, num_microbatches=4)
    assert model.calls == []
    pipe.step(BATCH)
    assert model.calls == [1] * 4


def counting():
    counter = [0]

    def loss(model, batch):
        counter[0] += 1
        return squares(model, batch) * counter[0]

    return loss


def drawing(draw):
    return lambda model, batch: squares(model, batch) * draw()


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (counting(), r"the loss function: counter\), so that no two calls are the same"),
        (drawing(random.random), "draws from Python's or numpy's random module"),
        (drawing(lambda: float(np.random.rand())), "draws from Python's or numpy's random module"),
    ],
)
def test_what_differs_with_every_call_is_refused(loss, text):
    with pytest.raises(evenflow.RecordError, match=text):
        evenflow.pipeline(made(), loss=loss, example=BATCH, stages=2)


def test_a_loss_function_may_hold_several_tensors():
    """Cells of a closure are no values to be compared: tensors in them would be, number by number."""
    scale, shift = torch.ones(1), torch.zeros(1)

    def loss(model, batch):
        return nn.functional.mse_loss(model(batch["x"]) * scale.sum() + shift.sum(), batch["y"])

    scale, shift = torch.ones(3), torch.zeros(3)
    pipe = evenflow.pipeline(made(), loss=loss, example=BATCH, stages=2, num_microbatches=1)
    assert torch.equal(pipe.step(BATCH).loss, loss(made(), BATCH))
