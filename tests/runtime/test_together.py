"""Several optimizers of one stage, stepped as one."""

import copy

import pytest
import torch

from evenflow.errors import ConfigError
from evenflow.runtime.recorded.together import Together, as_one


def weights(number):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(number)]


def both(a, b):
    return Together(
        [torch.optim.AdamW([a], lr=0.1), torch.optim.SGD([("b", b)], lr=0.2, momentum=0.9)],
    )


def train(optimizer, parameters, steps):
    for at in range(steps):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 0.1 + at)
        optimizer.step()


def test_each_takes_its_own_step_and_one_scheduler_steers_them():
    a, b = weights(2)
    together = both(a, b)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(together, 0.5)
    c, d = weights(2)
    adam, sgd = torch.optim.AdamW([c], lr=0.1), torch.optim.SGD([d], lr=0.2, momentum=0.9)
    for _ in range(3):
        train(together, [a, b], 1)
        scheduler.step()
        train(adam, [c], 1)
        train(sgd, [d], 1)
        for group in (*adam.param_groups, *sgd.param_groups):
            group["lr"] *= 0.5
    assert torch.equal(a, c)
    assert torch.equal(b, d)
    assert set(together.state) == {a, b}


def test_its_state_goes_out_and_in():
    a, b = weights(2)
    together = both(a, b)
    train(together, [a, b], 2)
    c, d = (torch.nn.Parameter(each.detach().clone()) for each in (a, b))
    again = both(c, d)
    again.load_state_dict(copy.deepcopy(together.state_dict()))
    again.param_groups[0]["lr"] = together.param_groups[0]["lr"] = 0.3  # they are the members' own
    train(together, [a, b], 1)
    train(again, [c, d], 1)
    assert torch.equal(a, c)
    assert torch.equal(b, d)


def test_a_parameter_that_two_of_them_have_is_refused_by_name():
    (a,) = weights(1)
    with pytest.raises(ConfigError, match="returned 2 optimizers, of which two have the parameter b; give"):
        both(a, a)


def test_one_in_a_list_is_itself_and_anything_else_stays():
    (a,) = weights(1)
    only = torch.optim.SGD([a], lr=0.1)
    assert as_one([only]) is only
    assert as_one([only, 3]) == [only, 3]
    assert as_one([]) == []
