"""A roll call: every rank's numbers on every rank, and an error where one is gone."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from evenflow.runtime.ranks.roll_call import RollCall


def calls(number, timeout_seconds=20.0):
    """The ends of so many ranks, each of which has a socket to every other."""
    sockets = [{} for _ in range(number)]
    for low in range(number):
        for high in range(low + 1, number):
            ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sockets[low][high], sockets[high][low] = ends
    return [RollCall(own, rank, timeout_seconds=timeout_seconds) for rank, own in enumerate(sockets)]


@pytest.mark.parametrize("number", [2, 3, 5])
def test_every_rank_hears_all_numbers_in_the_order_of_ranks(number):
    ends = calls(number)
    with ThreadPoolExecutor(number) as pool:
        for turn in range(3):
            rows = [[rank, -turn, 2**56 + rank] for rank in range(number)]
            found = list(pool.map(lambda end, row: end.gather(row), ends, rows))
            assert found == [rows] * number


@pytest.mark.parametrize("gone", [0, 1])
def test_who_is_gone_is_not_waited_for(gone):
    ends = calls(2)
    ends[gone] = None
    with pytest.raises(OSError, match=r"has ended|reset|Broken pipe"):
        ends[1 - gone].gather([1])


def test_who_does_not_answer_is_waited_for_no_longer_than_that():
    first, _second = calls(2, timeout_seconds=0.1)
    with pytest.raises(TimeoutError):
        first.gather([1])
    with pytest.raises(OSError, match="Bad file descriptor"):  # what comes late is no answer to the next
        first.gather([2])


def test_a_message_always_finds_room():
    ends = calls(3)
    row = list(range(ends[0].most_numbers))
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda end: end.gather(row), ends)) == [[row] * 3] * 3
    assert len(row) * 3 * 8 <= 2**16
