"""Rehearsals: what a whole microbatch takes on one device, and how that corrects what nodes take alone."""

import time

import pytest
import torch
from torch import nn

from evenflow.cost.cache import Cache, Place
from evenflow.cost.profile import profile_of
from evenflow.cost.rehearsal import Rehearsal, as_rehearsed, found_in, keep_in
from evenflow.errors import RecordError
from evenflow.pipe.building.recorded import recorded
from evenflow.pipe.given.splitter import Splitter
from evenflow.plan.chain import Chain, Seconds

CPU = torch.device("cpu")
ROWS, WIDTH, SLEEP = 4, 16, 0.02


def mean_square(model, batch):
    return model(batch["x"]).square().mean()


def rehearsal(model, loss=mean_square):
    found = recorded(
        model,
        loss=loss,
        example={"x": torch.randn(ROWS, WIDTH)},
        splitter=Splitter(1, 1, None, None),
        max_leaf_share=0.0,
        device=CPU,
        atomic=[Slow, Picky],
    )
    return Rehearsal.of(found, profile_of(found, budget_seconds=0.0).chain)


class Sleeps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        time.sleep(SLEEP)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(2 * SLEEP)
        return grad


class Slow(nn.Module):
    def forward(self, x):
        return Sleeps.apply(x)


class Picky(nn.Module):
    """Has no row for the large numbers that come through the layers; alone, it is measured on small ones."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(4, WIDTH)

    def forward(self, x):
        return self.rows((x.abs() * 2).long()).sum(1)


def linear():
    return nn.Linear(WIDTH, WIDTH)


def test_every_stage_is_timed_in_every_pass():
    found = rehearsal(nn.Sequential(linear(), Slow(), *(linear() for _ in range(6))))
    passes = found.run(3)
    assert len(passes) == 3
    assert {len(each) for each in passes} == {len(found.positions) + 1}
    at = sum(position <= 1 for position in found.positions)
    for each in passes:
        slowest = max(range(len(each)), key=lambda stage: each[stage][0])
        assert slowest == at
        assert each[at][0] >= SLEEP
        assert each[at][1] >= 2 * SLEEP
        assert all(forward > 0 and backward > 0 for forward, backward in each)


def test_who_is_late_begins_half_a_pass_later():
    found = rehearsal(nn.Sequential(linear(), Slow(), linear()))
    start = time.perf_counter()
    found.run(1, late=True)
    assert time.perf_counter() - start >= (2 + 0.5) * 3 * SLEEP


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(linear(), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5), linear())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = rehearsal(model)
    own, state = dict(model.named_parameters()), torch.get_rng_state()
    found.run(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter is own[name] for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in own.values())
    assert not model[2]._forward_pre_hooks


def test_a_model_without_memory_stays_without():
    import evenflow

    with evenflow.deferred_init():
        model = nn.Sequential(linear(), nn.BatchNorm1d(WIDTH), linear())
    assert len(rehearsal(model).run(2)) == 2
    assert all(parameter.is_meta for parameter in model.parameters())


def test_layers_without_gradients_have_no_backward():
    model = nn.Sequential(linear(), nn.Tanh(), linear(), linear())
    model[0].requires_grad_(False)
    found = rehearsal(model)
    (passed,) = found.run(1)
    assert min(forward for forward, _ in passed) > 0
    assert passed[0][1] < passed[-1][1]


def test_what_fails_is_named():
    model = nn.Sequential(linear(), Picky())
    with torch.no_grad():
        model[0].bias.fill_(9.0)
    with pytest.raises(RecordError, match=r"1 to .*cannot be run.*IndexError: index out of range"):
        rehearsal(model).run(1)


def test_what_it_needs_is_at_least_all_weights_with_gradients_and_what_is_saved():
    found = rehearsal(nn.Sequential(*(linear() for _ in range(4))))
    weights = 4 * (WIDTH * WIDTH + WIDTH) * 4
    assert found.needed_bytes >= 2 * weights + 4 * ROWS * WIDTH * 4


def chain_of(forward, input_grad, weight_grad, kind="cpu"):
    number = len(forward)
    zeros = (0.0,) * number
    return Chain(
        tuple("abcdefgh"[:number]),
        1,
        (1.0,) * number,
        {kind: Seconds(tuple(forward), tuple(input_grad), tuple(weight_grad))},
        (),
        (),
        (),
        zeros,
        zeros,
        zeros,
        (True,) * number,
    )


def test_seconds_add_up_to_those_of_the_stages():
    chain = chain_of((1.0, 3.0, 2.0), (1.0, 1.0, 1.0), (1.0, 3.0, 0.0))
    found = as_rehearsed(chain, (0, 1, 2), (2,), {"cpu": ((8.5, 3.5), (1.5, 2.5))}, op_seconds=0.5)
    seconds = found.seconds["cpu"]
    assert seconds.forward == (2.0, 6.0, 1.0)
    assert seconds.input_grad == (0.5, 0.5, 2.0)
    assert seconds.weight_grad == (0.5, 1.5, 0.0)


def test_nodes_take_at_least_half_of_a_stage():
    found = as_rehearsed(chain_of((1.0,), (1.0,), (0.0,)), (0,), (), {"cpu": ((1.0, 4.0),)}, op_seconds=3.0)
    assert (found.seconds["cpu"].forward, found.seconds["cpu"].input_grad) == ((0.5,), (2.0,))


def test_equal_nodes_stay_equal():
    chain = chain_of((1.0, 1.0, 2.0), (1.0,) * 3, (0.0,) * 3)
    found = as_rehearsed(chain, (0, 0, 2), (1,), {"cpu": ((2.0, 1.0), (3.0, 2.0))}, op_seconds=0.0)
    # Both are half of what was measured of their kind: one took 2 times as long, the other as long.
    assert found.seconds["cpu"].forward == (1.5, 1.5, 2.0)


def test_a_kind_that_did_not_rehearse_keeps_its_seconds():
    chain = chain_of((1.0, 2.0), (1.0, 1.0), (0.0, 0.0), kind="other")
    assert as_rehearsed(chain, (0, 1), (), {"cpu": ((9.0, 9.0),)}, op_seconds=0.0) == chain


def test_what_was_kept_is_found_where_nodes_and_cuts_are_the_same(tmp_path):
    cache, passed = Cache(tmp_path, Place("cpu", "2", 1)), ((1.0, 2.0), (3.0, 4.0))
    assert found_in(cache, ("a", "b", "a"), (2,)) is None
    keep_in(cache, ("a", "b", "a"), (2,), passed)
    assert found_in(cache, ("a", "b", "a"), (2,)) == passed
    assert found_in(cache, ("a", "b", "a"), (1,)) is None
    assert found_in(cache, ("a", "b", "b"), (2,)) is None
