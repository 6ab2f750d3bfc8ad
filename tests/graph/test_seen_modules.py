"""What modules are made of, seen again: changes are seen as by somebody who looks for the first time."""

import pytest
import torch
from torch import nn

from evenflow.graph.python.seen_modules import SeenModules


class Block(nn.Module):
    scale = 2.0

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1), nn.BatchNorm1d(2))
        self.sizes, self.name = [1, 2], "block"

    def forward(self, x):
        return self.inner(x) * self.scale


class Settings:
    depth = 1


def put(path, key, value):
    return lambda model: setattr(model.get_submodule(path), key, value)


CHANGES = {
    "a number": put("0.inner.1", "p", 0.5),
    "a number like another": put("0.inner.0", "in_features", 2.0),
    "a new attribute": put("1", "eps_again", 1e-5),
    "an attribute less": lambda model: delattr(model[1], "eps"),
    "a list, in place": lambda model: model[0].sizes.append(3),
    "an object": put("0", "settings", Settings()),
    "a mode": put("0.inner.1", "training", False),
    "another module": lambda model: model[0].inner.__setitem__(1, nn.Dropout(0.1)),
    "no module": lambda model: model[0].inner.__setitem__(1, None),
    "one more module": lambda model: model.append(nn.Linear(2, 2)),
    "a module twice": lambda model: model.append(model[1]),
    "another order": lambda model: model._modules.update({"0": model._modules.pop("0")}),
    "another class": lambda model: setattr(model[0].inner[0], "__class__", nn.Identity),
    "a buffer": lambda model: model[1].register_buffer("more", torch.ones(1)),
    "another buffer": put("0.inner.2", "running_mean", torch.ones(2)),
    "frozen": lambda model: model[1].requires_grad_(requires_grad=False),
    "a hook": lambda model: model[1].register_forward_hook(lambda *_: None),
    "a class's value": lambda _: setattr(Block, "scale", 3.0),
    "a parameter": lambda model: model[1].register_parameter("more", nn.Parameter(torch.ones(1))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_seen_again_is_what_is_there(change, monkeypatch):
    monkeypatch.setattr(Block, "scale", 2.0)
    model, names = nn.Sequential(Block(), nn.LayerNorm(2)), frozenset({"depth"})
    seen = SeenModules(model)
    before = seen.now(names)
    assert seen.now(names) == before == SeenModules(model).now(names)
    CHANGES[change](model)
    after = seen.now(names)
    assert after != before
    assert after == seen.now(names) == SeenModules(model).now(names)


def test_a_change_that_is_taken_back_is_seen_as_none():
    model = nn.Sequential(nn.Dropout(0.1))
    seen = SeenModules(model)
    before = seen.now(frozenset())
    model[0].p = 0.25
    assert seen.now(frozenset()) != before
    model[0].p = float("0.1")
    assert seen.now(frozenset()) == before
