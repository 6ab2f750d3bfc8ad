"""What a step that failed leaves behind, and arguments of the wrong kind."""

import pytest
import torch
from torch import nn

import evenflow


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


GOOD = {"x": torch.linspace(-1, 1, 32).reshape(8, 4), "y": torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])}
BAD = {"x": GOOD["x"], "y": torch.tensor([0, 1, 2, 0, 1, 7, 0, 1])}


def piped(model, **options):
    options = {"optimizer": sgd, "stages": 2, "num_microbatches": 4} | options
    return evenflow.pipeline(model, loss=loss, example=GOOD, **options)


def test_a_step_that_failed_leaves_no_part_of_its_gradients():
    torn, whole = net(), net()
    pipe = piped(torn)
    pipe.step(GOOD, update=False)
    with pytest.raises(IndexError):
        pipe.step(BAD)
    pipe.step(GOOD)
    piped(whole).step(GOOD)
    for one, other in zip(torn.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_parameter_that_is_unfrozen_later_is_refused():
    model = net()
    model[0].weight.requires_grad_(False)
    pipe = piped(model)
    pipe.step(GOOD)
    model[0].weight.requires_grad_(True)
    with pytest.raises(evenflow.ConfigError, match=r"0\.weight was frozen when the pipeline was built"):
        pipe.step(GOOD)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"stages": 1.5}, "stages=1.5 must be a whole number"),
        ({"num_microbatches": True}, "num_microbatches=True must be a whole number"),
        ({"num_microbatches": None, "microbatch_size": 1.5}, "microbatch_size=1.5 must be a whole number"),
        ({"split": "2", "stages": None}, "split='2' is one string; give a list"),
        ({"max_leaf_share": float("nan")}, "max_leaf_share=nan must lie between 0 and 1"),
        ({"schedule": 3}, "schedule= must be a function, not a int"),
        ({"optimizer": 3}, "optimizer= must be a function, not a int"),
        ({"device": "abacus"}, "device='abacus' is no device that torch knows"),
        ({"optimizer": lambda p: None}, "optimizer= returned a NoneType"),
        ({"optimizer": torch.optim.LBFGS, "stages": 1}, "optimizer= returned LBFGS"),
        ({"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau}, "scheduler= returned ReduceLROnPlateau"),
        ({"scheduler": lambda o: 3}, "scheduler= returned a int"),
        ({"schedule": "forward-only"}, "runs no backward"),
    ],
)
def test_arguments_of_the_wrong_kind(options, text):
    with pytest.raises(evenflow.ConfigError) as caught:
        piped(net(), **options)
    assert text in str(caught.value)
