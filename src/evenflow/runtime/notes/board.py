"""Board: a page of memory in which a rank keeps where its program is, for others to read when it is stopped.

A process that is stopped answers nobody, and what it last told may be some ops old. Its memory is still
there: another process of the same user and host reads it through /proc. It is a file without a name, so that
whatever ends the process, nothing is left behind.
"""

import contextlib
import mmap
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_NUM_BYTES = 2**18
_NUMBERS = 8  # of 64 bits, at the beginning
_OP, _STEP, _RUNS, _DOING_BYTES, _OPS_BYTES = range(5)  # what each is
_DOING, _OPS = 64, 1024  # where the texts begin
_NUM_BEFORE = 4


@dataclass(frozen=True, slots=True)
class Position:
    """Where a rank is: in which op ("" where in none), which came before it, or what else it does.

    `doing` is "" where the rank runs nothing of Evenflow's beside its ops; `step` is the last one begun.
    """

    step: int
    op: str
    before: Sequence[str]
    doing: str

    @property
    def text(self) -> str:
        """In a few words.

        >>> Position(3, "2F7", ["2F6"], "").text
        'in 2F7 of step 3'
        """
        if self.op:
            return f"in {self.op} of step {self.step}"
        return (
            f"{self.doing} (step {self.step})"
            if self.doing
            else f"outside of a step (the last was step {self.step})"
        )


class Board:
    """One rank's page. `numbers[0]` is the index of the op that it runs: its executor writes that.

    >>> board = Board()
    >>> board.begin(3, ("0F0", "0F1", "0B0"))
    >>> board.numbers[0] = 1
    >>> board.read().text
    'in 0F1 of step 3'
    """

    def __init__(self) -> None:
        self.file = -1  # of no file: for this process alone
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # a system that forbids it, or has no more open files
                self.file = _file()
        self._memory = memoryview(mmap.mmap(self.file, _NUM_BYTES))
        self.numbers = self._memory[: 8 * _NUMBERS].cast("q")
        self._written: Sequence[str] | None = None

    def say(self, step: int, doing: str) -> None:
        """Write what is done beside the ops."""
        told = doing.encode()[: _OPS - _DOING]
        self._memory[_DOING : _DOING + len(told)] = told
        self.numbers[_DOING_BYTES], self.numbers[_STEP] = len(told), step

    def begin(self, step: int, ops: Sequence[str]) -> None:
        """Write that a program of these ops begins; the same object says that they are the same."""
        if ops is not self._written:
            told = "\n".join(ops).encode()[: _NUM_BYTES - _OPS]
            self._memory[_OPS : _OPS + len(told)] = told
            self.numbers[_OPS_BYTES], self._written = len(told), ops
        self.numbers[_OP], self.numbers[_STEP], self.numbers[_RUNS] = 0, step, 1

    def end(self) -> None:
        """Write that no program is under way."""
        self.numbers[_RUNS] = 0

    def read(self) -> Position:
        """Where this rank is."""
        return _read(self._memory)

    def close(self) -> None:
        """Let go of the file; nobody else can read it from now on."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


def _file() -> int:
    file = os.memfd_create("evenflow")
    try:
        os.ftruncate(file, _NUM_BYTES)
    except OSError:
        os.close(file)
        raise
    return file


def board_of(pid: int, file: int) -> Position | None:
    """Where another process of this host is, by its board, an open file; None where that cannot be read."""
    with contextlib.suppress(OSError, ValueError), Path(f"/proc/{pid}/fd/{file}").open("rb") as opened:
        memory = opened.read(_NUM_BYTES)
        if len(memory) == _NUM_BYTES:
            return _read(memoryview(memory))
    return None


def _read(memory: memoryview) -> Position:
    numbers = memory[: 8 * _NUMBERS].cast("q")
    at, step = numbers[_OP], numbers[_STEP]
    doing = bytes(memory[_DOING : _DOING + numbers[_DOING_BYTES]]).decode(errors="replace")
    ops = bytes(memory[_OPS : _OPS + numbers[_OPS_BYTES]]).decode(errors="replace").splitlines()
    before = ops[max(0, at - _NUM_BEFORE) : at]
    if not numbers[_RUNS]:
        return Position(step, "", ops[-_NUM_BEFORE:], doing)
    if at >= len(ops):
        return Position(step, "", before, doing or "waiting until what it sent has left")
    return Position(step, ops[at], before, doing)
