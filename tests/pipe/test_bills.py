"""The bill of a step that was run: it adds up to what a watch says."""

import time

import pytest
import torch
from torch import nn

import evenflow
from evenflow.errors import ConfigError
from evenflow.launcher import rank_environment
from evenflow.pipe.times import clock_offsets
from evenflow.pipe.times.clock_offsets import clock_offset
from unsplit import mean_square, regression

SLOW_SECONDS = 0.02


class Slow(nn.Module):
    """A layer that takes its time, forward and backward alike."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return Sleep.apply(self.linear(x))


class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        time.sleep(SLOW_SECONDS)
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(SLOW_SECONDS)
        return gradient


def slow():
    return nn.Sequential(Slow(), Slow(), Slow(), nn.Linear(4, 1))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def stepped(model, **options):
    torch.manual_seed(0)
    pipe = evenflow.pipeline(model, loss=mean_square, example=regression(), optimizer=sgd, **options)
    with pytest.raises(ConfigError, match="no step has run yet"):
        pipe.bills()
    for _ in range(3):
        start = time.perf_counter()
        pipe.step(regression())
        seconds = time.perf_counter() - start
    return seconds, pipe.bills()


def test_one_process_has_one_bill():
    seconds, (predicted, measured) = stepped(slow(), stages=2, schedule="1f1b", num_microbatches=4)
    assert len(predicted) == len(measured) == 1
    assert measured[0].step == pytest.approx(seconds, rel=0.1)
    assert 0 < measured[0].compute < seconds
    assert measured[0].update > 0
    assert measured[0].schedule == measured[0].imbalance == 0, "ranks take turns"
    assert measured[0].transfer < 0.1 * seconds


def on_two_ranks():
    return stepped(slow(), split=["1"], schedule="1f1b", num_microbatches=4)


def test_each_rank_has_its_own_and_all_add_up_to_the_step():
    found = evenflow.launch(on_two_ranks, nproc=2)
    assert found[0][1] == found[1][1], "every rank knows all"
    seconds, (predicted, measured) = found[0]
    for bill in measured:
        assert bill.step == pytest.approx(max(seconds, found[1][0]), rel=0.1)
        assert min(bill.compute, bill.schedule, bill.transfer, bill.host, bill.update) > 0
    for which in (predicted, measured):
        first, second = which
        # The second rank has two of the slow layers, so the first waits for it, and not the other way round.
        assert second.compute == pytest.approx(4 * 4 * SLOW_SECONDS, rel=0.25)
        assert first.compute == pytest.approx(2 * 4 * SLOW_SECONDS, rel=0.25)
        assert first.imbalance > SLOW_SECONDS > second.imbalance


def test_a_step_that_failed_has_no_bill():
    pipe = evenflow.pipeline(
        slow(), loss=mean_square, example=regression(), optimizer=sgd, stages=1, num_microbatches=1
    )
    pipe.step(regression())
    before = pipe.bills()[1]
    pipe._parts.updater.optimizers[0].step = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        pipe.step(regression())
    assert pipe.bills()[1] == before


def on_hosts_whose_clocks_differ():
    """The second rank is on another host, and its clock is ahead."""
    rank = rank_environment().rank
    ahead, real, name = 1000.0 * rank, time.perf_counter, f"host{rank}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: real() + ahead)
        patch.setattr(clock_offsets, "this_host", lambda: name)
        pipe = evenflow.pipeline(
            slow(), loss=mean_square, example=regression(), optimizer=sgd, stages=2, num_microbatches=4
        )
        for _ in range(3):
            start = time.perf_counter()
            pipe.step(regression())
            seconds = time.perf_counter() - start
        return clock_offset(pipe._parts.world), seconds, pipe.bills()[1], pipe.timelines()[1]


def test_clocks_of_several_hosts_are_read_as_one():
    (first, seconds, bills, timeline), (second, *_) = evenflow.launch(on_hosts_whose_clocks_differ, nproc=2)
    assert first == 0.0
    assert second == pytest.approx(1000.0, abs=0.1)
    for bill in bills:
        assert bill.step == pytest.approx(seconds, rel=0.1)
    assert timeline.makespan_seconds < seconds
