"""Clocks: marks of a device's work, read afterwards; a GPU's are events in its stream."""

import time

import pytest
import torch

from evenflow.ir.op import Forward
from evenflow.runtime.notes.clocks import CudaClock, HostClock, clock_of
from evenflow.runtime.notes.log import Log
from evenflow.runtime.notes.script import script


class FakeEvent:
    """As torch.cuda.Event: what a stream has reached, in milliseconds, is known once it is waited for."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing
        self.is_waited_for = False

    def record(self, stream):
        self.stream, self.reached = stream, FakeEvent.now

    def synchronize(self):
        self.is_waited_for = True

    def elapsed_time(self, other):
        assert other.is_waited_for
        return other.reached - self.reached


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    FakeEvent.now = 500.0
    return torch.device("cuda", 1)


def test_events_are_read_on_the_hosts_clock(gpu):
    clock = clock_of(gpu)
    FakeEvent.now += 250.0
    mark = clock.mark()
    assert mark.stream == "stream of cuda:1"
    assert not mark.is_waited_for
    FakeEvent.now += 1000.0  # the device has gone on for a second when somebody asks
    before = time.perf_counter()
    told = clock.seconds(mark)
    assert before - 1.0 <= told <= time.perf_counter() - 1.0
    assert clock.seconds(mark) == told


def test_a_log_waits_for_no_event_before_it_is_read(gpu):
    clock = CudaClock(gpu)
    log = Log(0, script([Forward(0, 0), Forward(0, 1)]).lines, clock)
    for _ in log.lines:
        marks = [clock.mark()]
        for took in (1.0, 5.0):
            FakeEvent.now += took
            marks.append(clock.mark())
        log.marks.append(tuple(marks))
    assert not any(mark.is_waited_for for line in log.marks for mark in line)
    spans = log.spans()
    assert [span.seconds for span in spans] == pytest.approx([5e-3, 5e-3])
    assert spans[1].start_seconds - spans[0].end_seconds == pytest.approx(1e-3)
    assert log.parts() == spans


def test_a_processors_clock_is_the_hosts():
    clock = clock_of(torch.device("cpu"))
    assert isinstance(clock, HostClock)
    assert time.perf_counter() <= clock.seconds(clock.mark()) <= time.perf_counter()
