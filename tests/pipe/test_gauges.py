"""Gauges: what is not known has no name; peaks outlast a new count; the last step is the one that is read."""

import socket
from dataclasses import replace

import pytest
import torch

import evenflow
from evenflow.errors import PeerError
from evenflow.pipe.times.devices import fullness
from evenflow.pipe.times.gauges import Gauges
from evenflow.runtime.ranks.roll_call import RollCall
from evenflow.runtime.ranks.world import ProcessGroupWorld
from unsplit import mean_square, mlp, regression, sgd


def make():
    return evenflow.pipeline(
        mlp(4, 8, 1), loss=mean_square, example=regression(), optimizer=sgd, stages=2, device="cpu"
    )


def gauges_of(pipe):
    return Gauges(pipe._parts, pipe._times)


@pytest.mark.parametrize("ask", [Gauges.own, Gauges.of_all])
def test_memory_that_nobody_tells_of_has_no_name(monkeypatch, ask):
    monkeypatch.setattr("evenflow.pipe.times.gauges.resident_bytes", lambda when: None)
    pipe = make()
    pipe.step(regression())
    assert ask(gauges_of(pipe)).keys() == {"bubble", "bubble/rank0"}


def test_the_peak_outlasts_a_new_count_of_it(monkeypatch):
    """On two GPUs, as torch counts their peaks: from one reset to the next."""
    pipe, peaks = make(), {torch.device("cuda", 0): 5, torch.device("cuda", 1): 3}
    pipe.step(regression())
    monkeypatch.setattr("evenflow.pipe.times.gauges.gpus_of", lambda parts: frozenset(peaks))
    monkeypatch.setattr("evenflow.pipe.times.gauges.own_cap_bytes", lambda parts: 16.0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peaks.__getitem__)
    gauges = gauges_of(pipe)
    assert gauges.own()["peak_bytes/rank0"] == 8
    gauges.keep_peaks()
    peaks |= {torch.device("cuda", 0): 1, torch.device("cuda", 1): 4}
    assert gauges.own()["peak_bytes/rank0"] == 9
    assert gauges.own()["cap_bytes/rank0"] == 16


def test_a_rank_that_is_lost_as_gauges_are_exchanged_is_told_of_so():
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    there.close()
    world = object.__new__(ProcessGroupWorld)  # without torch.distributed, which the roll call does not need
    world.rank, world.size, world.members = 0, 2, (0, 1)
    world.roll_call = RollCall({1: here}, 0, timeout_seconds=20.0)
    pipe = make()
    pipe.step(regression())
    parts = replace(pipe._parts, mesh=replace(pipe._parts.mesh, world=world))
    with pytest.raises(PeerError, match=r"^rank 0 lost its peer while exchanging gauges with all ranks: "):
        Gauges(parts, pipe._times).of_all()


@pytest.mark.parametrize(
    ("fuller", "other"), [((20, 24), (30, 80)), ((2, None), (1, None)), ((1, None), (None, None))]
)
def test_the_fuller_of_two(fuller, other):
    assert fullness(*fuller) > fullness(*other)
