"""Watchdog: a rank that stops, hangs or vanishes ends the run within a time that is known, with one report.

Each process has a thread that tells the others now and then where its main one is, through the store
of the launcher's agent, which lives in none of the ranks. A rank that has waited for longer than the timeout
looks for who is to blame (`blame`). If somebody is, it raises the alarm: each rank that can answers with its
stacks, the first to raise it writes the report, and all end. They end themselves, because a main thread that
waits inside of torch raises nothing; a stopped process is ended by its siblings, because it hears of nothing.

A look costs two questions to the store (0.1 ms), twenty times within a timeout. The step pays nothing: where
it is can be told from what it notes anyway.
"""

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]  # torch hands it on
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from evenflow.errors import ConfigError, PeerError
from evenflow.runtime.notes.board import board_of
from evenflow.runtime.notes.log import Log
from evenflow.runtime.notes.processes import Process, this_process, this_system
from evenflow.runtime.notes.stacks import place_of, stacks_of
from evenflow.runtime.notes.straggler import WINDOW_STEPS, Pace, Stragglers, pace_of
from evenflow.runtime.notes.whereabouts import Whereabouts
from evenflow.runtime.ranks.alarm import Answer, Sight, answered, report
from evenflow.runtime.ranks.beats import Beat, Blame, blame, heard
from evenflow.runtime.ranks.world import World

_LOG = logging.getLogger(__name__)
TIMEOUT_SECONDS = 300.0
# What is done for the first time (recording, planning, compiling) may take so many times as long.
WARMING_PATIENCE = 10
_LOOKS = 20  # within a timeout, and at least one a second
_SHORTEST_SECONDS, _LONGEST_SECONDS = 0.02, 1.0  # between two of them
# Of a timeout: after which a wait is looked into, and for how long a silent rank must have been silent; that
# long at least a process may get no processor, or no turn in Python.
_OBSERVED, _SILENT, _SILENT_SECONDS = 0.2, 0.75, 1.0
_PAUSED_LOOKS = 5  # after so many that were missed the process was not running
_FAILURES = 3  # of looks in a row, after which a rank goes by what it sees alone
_MOST_ASKED = 64  # ranks that one may ask after in each second
_ANSWER_SECONDS = 1.5
# From the alarm on; then it ends whatever hangs, be it the store or a disk.
_END_SECONDS = 4.5
_ALARMED_SECONDS = 0.02  # between two looks, once the alarm is raised
_STORE_SECONDS = 10.0
_FLUSH_SECONDS = 1.0


def check_timeout(timeout: float | None) -> None:
    """Raise `ConfigError` for what is no time to wait."""
    is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if timeout is not None and not (is_number and 0 < timeout < float("inf")):
        raise ConfigError(
            f"timeout={timeout!r} must be a number of seconds above 0: how long a rank may wait for another "
            "one that does not move; None for as long as the group of all ranks lets it"
        )


def group_seconds(timeout: float, kind: str) -> float:
    """The timeout of torch's own groups, so that they give up after the watchdog has.

    Between GPUs hosts go ahead and wait for nobody while their devices do: there the groups, too, must see to
    it that a wait ends, even if compiling then has no more time than the rest.

    >>> group_seconds(30, "cpu"), group_seconds(30, "cuda")
    (360, 90)
    """
    return (WARMING_PATIENCE if kind == "cpu" else 1) * timeout + 60


def watched(world: World, timeout: float | None) -> World:
    """The world; where it has several processes and there is a timeout, a watchdog now watches this one.

    It does until the world is gone, or its `whereabouts` have `ended`. All ranks call this in the same order.
    """
    if world.size == 1 or timeout is None:
        return world
    prefix = f"evenflow/watch/{world.share(uuid.uuid4().hex, source=0)}"
    try:
        default = dist.distributed_c10d._get_default_store()  # noqa: SLF001 (torch has no public way)
        store = default.clone()  # type: ignore[attr-defined]  # torch's own annotations know no such thing
        store.set_timeout(timedelta(seconds=_STORE_SECONDS))
        store.check([prefix])
    except (RuntimeError, NotImplementedError) as error:
        _LOG.warning("no watchdog watches rank %d: its store cannot be asked twice (%s)", world.rank, error)
        return world
    world.whereabouts = Whereabouts(world.rank)
    watchdog = _Watchdog(world.whereabouts, world.size, store, prefix, timeout)
    thread = threading.Thread(target=watchdog.run, name="evenflow's watchdog", daemon=True)
    thread.start()
    # At the end of the process, too: a thread of torch's that comes back to Python then would crash it.
    weakref.finalize(world, _end, world.whereabouts.ended, thread)
    return world


def _end(ended: threading.Event, thread: threading.Thread) -> None:
    ended.set()
    if thread is not threading.current_thread():
        thread.join(_FLUSH_SECONDS)


class _Watchdog:
    def __init__(self, where: Whereabouts, size: int, store: Store, prefix: str, timeout: float) -> None:
        self._where, self._size, self._store, self._prefix = where, size, store, prefix
        self._timeout = timeout
        self._interval = min(max(timeout / _LOOKS, _SHORTEST_SECONDS), _LONGEST_SECONDS)
        self._host, self._machine, self._process = socket.gethostname(), this_system(), this_process()
        # With many ranks each asks more seldom after all others: else what the store is asked grows with
        # their square.
        self._asking_seconds = max(self._interval, min(size / _MOST_ASKED, timeout / _LOOKS))
        self._number = 0
        self._place: object = None
        self._since = time.monotonic()
        self._finished: deque[Sequence[Log]] = deque(maxlen=WINDOW_STEPS)
        self._steps, self._judged, self._pace = 0, 0, Pace(0.0, 0.0)
        self._stragglers = Stragglers()
        self._changed: dict[int, tuple[int, float]] = {}  # of each rank: its last beat, and since when
        self._asked: Mapping[int, Beat] = {}  # what the ranks last told, and when they were asked
        self._asked_at = self._looked_at = self._since
        self._found: Blame | None = None

    def run(self) -> None:
        """Look, until the pipeline is gone."""
        failures = 0
        try:
            while not self._where.ended.wait(self._interval):
                try:
                    self._look()
                    failures = 0
                except Exception as error:  # noqa: BLE001 (a rank that is watched no more looks dead)
                    failures, self._looked_at = failures + 1, time.monotonic()
                    if failures >= _FAILURES:
                        with contextlib.suppress(Exception):
                            self._look_alone(error)
            with contextlib.suppress(RuntimeError, OSError):  # the store is gone, and with it the launcher
                self._store.set(self._key("beat"), self._beat(has_left=True).told())
        finally:
            self._where.board.close()

    def _look(self) -> None:
        now = time.monotonic()
        was_running = now - self._looked_at < max(_PAUSED_LOOKS * self._interval, _SILENT_SECONDS)
        self._looked_at = now
        if not was_running:  # stopped, or suspended: what it would measure is that
            self._forget(now)
            return
        mine = self._beat()
        self._store.set(self._key("beat"), mine.told())
        if self._store.check([self._shared("alarm")]):
            self._answer()
        if mine.rank == 0 and mine.steps >= self._judged + WINDOW_STEPS:
            self._judge(mine.steps)
        if not mine.waits_for or mine.stood_seconds < self._timeout * _OBSERVED:
            self._forget(self._since)
            return
        if self._found is None and now - self._asked_at < self._asking_seconds:
            return
        beats, now = self._beats(), time.monotonic()
        self._asked, self._asked_at = beats, now
        for rank in range(self._size):
            number = beats[rank].number if rank in beats else 0
            if self._changed.get(rank, (-1, now))[0] != number:
                self._changed[rank] = number, now
        if mine.stood_seconds < self._timeout:
            return
        long = max(_SILENT * self._timeout, _SILENT_SECONDS)
        silent = {rank for rank, (_, since) in self._changed.items() if now - since >= long}
        before, self._found = (
            self._found,
            blame(beats, silent, mine.rank, timeout_seconds=self._timeout),
        )
        if self._found is not None and self._found == before:  # seen twice: no look was cut in two
            self._raise(self._found)

    def _forget(self, since: float) -> None:
        """What was seen of a wait counts no more; this process has stood where it stands since then."""
        self._since, self._found = since, None
        self._changed.clear()
        self._asked = {}

    def _beat(self, *, has_left: bool = False) -> Beat:
        with contextlib.suppress(Exception):  # what is measured decides nothing here
            self._measure()
        where, place, now = self._where, self._where.place, time.monotonic()
        if place != self._place:
            self._place, self._since = place, now
        stood, wait, position = now - self._since, where.wait, where.position
        self._number += 1
        return Beat(
            rank=where.rank,
            number=self._number,
            host=self._host,
            machine=self._machine,
            pid=self._process.pid,
            parent=self._process.parent,
            started=self._process.started,
            board=where.board.file,
            at=position.text,
            op=position.op,
            before=position.before,
            line=self._line() if stood > 2 * self._interval else "",
            stood_seconds=stood,
            waits_for=() if wait is None else wait.ranks,
            waits_on="" if wait is None else wait.what,
            patience=WARMING_PATIENCE if where.is_warming else 1,
            has_left=has_left,
            steps=self._steps,
            worked_seconds=self._pace.seconds,
            planned_seconds=self._pace.planned_seconds,
        )

    def _line(self) -> str:
        with contextlib.suppress(Exception):  # a stack changes while it is read
            return place_of(self._where.thread)
        return ""

    def _measure(self) -> None:
        """Read what the steps that have ended since took; here nobody waits for it."""
        finished, steps = self._where.finished, self._steps
        with contextlib.suppress(IndexError):  # the main thread may push one out meanwhile
            while all(log.num_passed == len(log.lines) for log in finished[0][1]):
                self._steps, logs = finished.popleft()
                self._finished.append(logs)
        if self._steps > steps:
            self._pace = pace_of(self._finished, self._where.costs)

    def _judge(self, step: int) -> None:
        """Tell of stragglers, once all ranks have a window of steps behind them."""
        beats = self._beats()
        if len(beats) == self._size and all(beat.steps >= WINDOW_STEPS for beat in beats.values()):
            self._judged = step
            paces = {rank: Pace(beat.worked_seconds, beat.planned_seconds) for rank, beat in beats.items()}
            for found in self._stragglers.judge(step, paces):
                _LOG.warning("%s", found.told(beats[found.rank].host))

    def _key(self, kind: str, rank: int | None = None) -> str:
        """A rank's key in the store, by default this one's."""
        return f"{self._prefix}/{kind}/{self._where.rank if rank is None else rank}"

    def _shared(self, kind: str) -> str:
        """A key that all ranks have together."""
        return f"{self._prefix}/{kind}/all"

    def _beats(self) -> Mapping[int, Beat]:
        return {rank: heard(told) for rank, told in self._told("beat").items()}

    def _told(self, kind: str) -> Mapping[int, bytes]:
        """What each rank has told of a kind; a question about a key that nobody has set would wait."""
        keys = {rank: self._key(kind, rank) for rank in range(self._size)}
        if self._store.check(list(keys.values())):
            return dict(zip(keys, self._store.multi_get(list(keys.values())), strict=True))
        return {rank: self._store.get(key) for rank, key in keys.items() if self._store.check([key])}

    def _raise(self, found: Blame) -> NoReturn:
        """Raise the alarm, unless another rank has; then answer."""
        self._store.compare_set(
            self._shared("alarm"), "", json.dumps(asdict(found) | {"by": self._where.rank})
        )
        self._answer()

    def _answer(self) -> NoReturn:
        """The alarm is raised: tell what is known here; the first who raised it makes a report of it. End."""
        threading.Thread(target=_end_later, daemon=True).start()
        alarm = json.loads(self._store.get(self._shared("alarm")))
        by = alarm.pop("by")
        found = Blame(alarm["waiter"], tuple(alarm["culprits"]), alarm["silent"])
        beats = self._beats()
        silent = set(found.culprits if found.silent else ())
        mine = Answer(self._beat(), stacks_of(self._where.thread), self._sights(silent, beats))
        self._store.set(self._key("answer"), mine.told())
        if by == self._where.rank:
            # Who has closed its pipeline does not answer, and is well.
            left = {rank for rank, beat in beats.items() if beat.has_left}
            self._write(found, {**beats, **self._asked}, {*range(self._size)} - silent - left)
        else:
            lost = self._follow(silent)
            writer = beats.get(by, mine.beat)
            if (writer.machine, writer.parent) != (self._machine, self._process.parent):
                self._end_siblings(lost, beats)  # the writer cannot
        os._exit(1)

    def _write(self, found: Blame, beats: Mapping[int, Beat], survivors: Collection[int]) -> None:
        """Write the report, from the beats on which the alarm was raised, and end all."""
        told = self._awaited("answer", survivors)
        answers = {rank: answered(each) for rank, each in told.items()}
        mute = {*survivors} - answers.keys()  # as good as silent
        own = answers.get(self._where.rank)
        if own is not None:
            answers[self._where.rank] = replace(own, sights={**self._sights(mute, beats), **own.sights})
        text = report(found, beats, answers, timeout_seconds=self._timeout)
        _record(text)
        _let_out(text)
        self._store.set(self._shared("report"), text)
        self._store.set(self._key("leaving"), "")
        # Who is ended tears connections, and where one has ended a launcher ends all: nobody goes before
        # all are ready.
        self._awaited("leaving", answers.keys())
        lost = sorted(mute | {*(found.culprits if found.silent else ())})
        self._store.set(self._shared("end"), json.dumps(lost))
        self._end_siblings(lost, beats)

    def _sights(self, ranks: Collection[int], beats: Mapping[int, Beat]) -> Mapping[int, Sight]:
        """What can be seen from here of these ranks' processes."""
        return {
            rank: Sight(_process_of(beat).state(), board_of(beat.pid, beat.board))
            for rank, beat in beats.items()
            if rank in ranks and beat.machine == self._machine and not beat.has_left
        }

    def _end_siblings(self, ranks: Collection[int], beats: Mapping[int, Beat]) -> None:
        """End those of them that this process's launcher has started, but for who has closed its pipeline."""
        for rank, beat in beats.items():
            if rank in ranks and beat.machine == self._machine and not beat.has_left:
                _process_of(beat).end_sibling()

    def _awaited(self, kind: str, ranks: Collection[int]) -> Mapping[int, bytes]:
        """What these ranks tell of a kind, or those of them that do so in time."""
        end = time.monotonic() + _ANSWER_SECONDS
        while not set(ranks) <= (told := self._told(kind)).keys() and time.monotonic() < end:
            time.sleep(_ALARMED_SECONDS)
        return told

    def _follow(self, silent: Collection[int]) -> Collection[int]:
        """Wait for the report, leave it where this host's launcher finds it, and wait for the end.

        Returns the ranks that are lost: those that are silent, and those that did not answer.
        """
        report_key, end_key = self._shared("report"), self._shared("end")
        with contextlib.suppress(RuntimeError):  # who was to write it does not answer, either
            self._store.wait([report_key], timedelta(seconds=2 * _ANSWER_SECONDS))
            _record(self._store.get(report_key).decode())
            _let_out()
            self._store.set(self._key("leaving"), "")
            self._store.wait([end_key], timedelta(seconds=_ANSWER_SECONDS))
            lost: list[int] = json.loads(self._store.get(end_key))
            return lost
        return silent

    def _look_alone(self, error: Exception) -> None:
        """Where nobody can be asked, a wait that takes too long ends this rank all the same."""
        mine = self._beat()
        theirs = [self._asked[rank].patience for rank in mine.waits_for if rank in self._asked]
        if mine.waits_for and mine.stood_seconds > self._timeout * max(mine.patience, *theirs, 1):
            lost = Blame(mine.rank, tuple(mine.waits_for), silent=True)
            alone = Answer(mine, stacks_of(self._where.thread))
            text = report(lost, {mine.rank: mine}, {mine.rank: alone}, timeout_seconds=self._timeout)
            _let_out(f"{text}\nNobody could be asked through the launcher's store: {error}")
            os._exit(1)


def _process_of(beat: Beat) -> Process:
    return Process(beat.pid, beat.parent, beat.started)


def _record(text: str) -> None:
    """Leave the report where torch's launcher looks for the errors of its processes."""
    try:
        raise PeerError(text.partition("\n\n")[0])
    except PeerError:  # torchrun prints what is being handled, for each rank: not all of it
        with contextlib.suppress(OSError):
            get_error_handler().record_exception(PeerError(text))


def _end_later() -> NoReturn:
    time.sleep(_END_SECONDS)
    os._exit(1)


def _let_out(text: str = "") -> None:
    """Print this, and what the main thread has printed; for a reader that reads no more it does not wait."""

    def let_out() -> None:
        with contextlib.suppress(Exception):
            os.write(2, f"{text}\n".encode() if text else b"")
            sys.stdout.flush()
            sys.stderr.flush()

    letting_out = threading.Thread(target=let_out, daemon=True)
    letting_out.start()
    letting_out.join(_FLUSH_SECONDS)
