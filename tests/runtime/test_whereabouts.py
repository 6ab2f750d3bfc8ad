"""Whereabouts and boards: what a process waits for, how long it may, and where it stands."""

import os

import pytest

from evenflow.ir.op import Exchange, Payload, Recv, Send
from evenflow.runtime.notes.board import Board
from evenflow.runtime.notes.clocks import HostClock
from evenflow.runtime.notes.log import Log
from evenflow.runtime.notes.script import script
from evenflow.runtime.notes.whereabouts import Wait, Whereabouts

SEND, RECV = Send(1, 2, 0, Payload.ACTIVATION), Recv(0, 1, 0, Payload.ACTIVATION)


def following(*ops):
    where = Whereabouts(1)
    where.follow(Log(1, script(ops).lines, HostClock()), 3, [0, 1, 2])
    return where


def test_an_exchange_waits_for_both_ends():
    op = Exchange((SEND, RECV))
    assert following(op).wait == Wait((0, 2), f"their part of {op}")


def test_a_send_waits_for_its_target():
    assert following(SEND).wait == Wait((2,), "room for what it sends")


def test_a_process_has_patience_until_its_first_step_has_ended():
    where = Whereabouts(0)
    where.end()  # the pipeline is built
    where.begin(0, "running its ops")
    where.end()
    assert where.is_warming
    where.stepped(1, [])
    assert not where.is_warming
    where.begin(1, "recording", is_warming=True)
    assert where.is_warming
    where.end()
    assert not where.is_warming


def test_the_last_step_is_told_outside_of_steps():
    where = Whereabouts(0)
    where.begin(7, "running its ops")
    where.end()
    assert where.position.text == "outside of a step (the last was step 7)"


@pytest.mark.parametrize("call", ["memfd_create", "ftruncate"])
def test_where_the_system_gives_no_file_a_board_is_for_its_process_alone(monkeypatch, call):
    def refuse(*_):
        raise OSError("not permitted")

    monkeypatch.setattr(os, call, refuse)
    board = Board()
    board.begin(2, ("0F0",))
    assert (board.file, board.read().text) == (-1, "in 0F0 of step 2")
    board.close()
