"""Measuring a link in processes of one's own: two real ones over Gloo, one of which dies."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from evenflow.doctor.exchange import Exchange
from evenflow.doctor.worker import Fault, Meeting, Worker


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def measured(workers, store, name, timeout_seconds=30.0):
    def side(number):
        meeting = Meeting("127.0.0.1", store.port, name, number)
        return workers[number].measure(meeting, timeout_seconds=timeout_seconds)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(side, (0, 1)))


def test_a_process_that_died_is_replaced_and_a_link_that_works_is_measured(store):
    with Worker("cpu", "gloo") as first, Worker("cpu", "gloo") as second:
        workers = [first, second]
        os.kill(second.pid, signal.SIGKILL)
        assert Fault("the process that measured it ended") in measured(
            workers, store, "dies", timeout_seconds=3
        )
        for found in measured(workers, store, "works"):
            assert isinstance(found, Exchange)
            assert 0 < found.latency_seconds < 1
            for rate in (
                found.there_bytes_per_second,
                found.back_bytes_per_second,
                found.together_bytes_per_second,
            ):
                assert 1e6 < rate < 1e12
            assert 0 <= found.overlap_share <= 1
        pids = [worker.pid for worker in workers]
    assert not any(map(is_there, pids))


def is_there(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
