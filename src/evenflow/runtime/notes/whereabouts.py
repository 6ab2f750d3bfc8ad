"""Whereabouts: where a process is, and which ranks it waits for; what its watchdog looks at.

The hot path writes one number for each op, and two attributes around each wait; nothing is composed before
somebody asks.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from evenflow.ir.costs import Costs
from evenflow.ir.op import Exchange, Op, Payload, Send
from evenflow.runtime.notes.board import Board, Position
from evenflow.runtime.notes.log import Log
from evenflow.runtime.notes.script import singles
from evenflow.runtime.notes.straggler import WINDOW_STEPS


@dataclass(frozen=True, slots=True)
class Wait:
    """For which processes, and for what, in words that follow on "waits for"."""

    ranks: tuple[int, ...]
    what: str


class Whereabouts:
    """One process's; made by the thread that runs the pipeline. From the beginning it builds one.

    `is_warming` until its first step has ended: what is done for the first time may take long. `waiting` is
    what it and its peers do together just now: whoever waits for them sets it. `counted` goes up with each
    such wait and each thing begun, so that a place is told from the next that looks the same.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.thread = threading.get_ident()
        self.board = Board()
        self.ended = threading.Event()
        self.step = 0  # the last one begun
        self._is_new, self._has_stepped = True, False
        self.waiting: Wait | None = None
        self.counted = 0
        self.finished: deque[tuple[int, Sequence[Log]]] = deque(maxlen=WINDOW_STEPS)  # steps, to be measured
        self.costs: Costs | None = None  # as planned
        self._log: Log | None = None
        self._holders: Sequence[int] = ()
        self._texts: dict[int, tuple[object, tuple[str, ...]]] = {}  # of lines, by their id
        self.board.say(0, "building the pipeline")

    @property
    def is_warming(self) -> bool:
        """Whether it does something for the first time."""
        return self._is_new or not self._has_stepped

    def begin(self, step: int, doing: str, *, is_warming: bool = False) -> None:
        """From now on the process does this; `is_warming`: for the first time, which may take long."""
        self.counted += 1
        self._is_new, self.step = is_warming, step
        self.board.say(step, doing)

    def follow(self, log: Log, step: int, holders: Sequence[int]) -> None:
        """From now on it runs the ops of a log; `holders` are the processes that have the stages."""
        known = self._texts.get(id(log.lines))
        if known is None:
            known = self._texts[id(log.lines)] = log.lines, tuple(str(line.op) for line in log.lines)
        self.step = step
        self.board.begin(step, known[1])
        log.position = self.board.numbers
        self._log, self._holders = log, holders

    def end(self) -> None:
        """From now on it does nothing of Evenflow's."""
        self.counted += 1
        self._is_new = False
        self._log = None
        self.board.end()
        self.board.say(self.step, "")

    def stepped(self, number: int, logs: Sequence[Log]) -> None:
        """A step has ended, so many in all; these are its logs."""
        self._has_stepped = True
        self.finished.append((number, logs))

    @property
    def position(self) -> Position:
        """Where it is."""
        return self.board.read()

    @property
    def place(self) -> tuple[object, ...]:
        """What stays the same for as long as the process stands where it is."""
        log = self._log
        return self.counted, None if log is None else (id(log), len(log.marks), log.awaited)

    @property
    def wait(self) -> Wait | None:
        """What it waits for, of which ranks; None where it waits for none, as far as it knows."""
        log, waiting = self._log, self.waiting
        if waiting is not None or log is None:
            return waiting
        awaited, at = log.awaited, len(log.marks)
        if awaited is not None:
            kind = "the activation" if awaited.payload is Payload.ACTIVATION else "the gradient"
            of = f"{kind} {awaited.source}>{awaited.target} of microbatch {awaited.microbatch}"
            return Wait((self._holders[awaited.source],), of)
        if at < len(log.lines):
            op = log.lines[at].op
            if isinstance(op, Exchange):
                return self._of(_peers(op), f"their part of {op}")
            return self._of(_sent_to(op), "room for what it sends")
        return self._of({peer for line in log.lines for peer in _sent_to(line.op)}, "what it sent to arrive")

    def _of(self, stages: Collection[int], what: str) -> Wait | None:
        ranks = {self._holders[stage] for stage in stages}
        return Wait(tuple(sorted(ranks)), what) if ranks else None


@contextlib.contextmanager
def patiently(whereabouts: Whereabouts | None, doing: str) -> Iterator[None]:
    """Let others know, if they watch, that this process does what may take long."""
    if whereabouts is None:
        yield
        return
    whereabouts.begin(whereabouts.step, doing, is_warming=True)
    try:
        yield
    finally:
        whereabouts.end()


@contextlib.contextmanager
def awaited(whereabouts: Whereabouts | None, ranks: Sequence[int], what: str) -> Iterator[None]:
    """Let others know, if they watch, that this process waits for those ranks."""
    if whereabouts is None:
        yield
        return
    whereabouts.counted += 1
    whereabouts.waiting = Wait(tuple(rank for rank in ranks if rank != whereabouts.rank), what)
    try:
        yield
    finally:
        whereabouts.waiting = None


def _sent_to(op: Op) -> set[int]:
    """The stages that an op sends to."""
    return {single.target for single in singles(op) if isinstance(single, Send)}


def _peers(exchange: Exchange) -> set[int]:
    """The stages at the other ends of transfers that all end together."""
    return {each.target if isinstance(each, Send) else each.source for each in exchange.transfers}
