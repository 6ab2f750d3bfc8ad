"""What the threads of this process do: their stacks, and the line of the user's that the main one is in."""

import linecache
import sys
import sysconfig
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from types import FrameType

import torch

_READ_SECONDS = 0.5
_MOST_LINES = 30  # of each stack, the innermost
_OTHERS = (
    str(Path(__file__).parents[2]),
    str(Path(torch.__file__).parent),
    sysconfig.get_path("stdlib"),
    "<frozen",
)
_LAUNCHER = str(Path(__file__).parents[2] / "launcher.py")


def place_of(thread: int) -> str:
    """The innermost line of a thread that is neither Evenflow's, nor torch's, nor Python's own.

    >>> place_of(-1)
    ''
    """
    frames = list(_frames(sys._current_frames().get(thread)))  # noqa: SLF001 (so documented)
    theirs = (frame for frame in frames if _is_users(frame.f_code.co_filename))
    frame = next(theirs, frames[0] if frames else None)
    if frame is None:
        return ""
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"


def _is_users(file: str) -> bool:
    return not file.startswith(_OTHERS) or ("site-packages" in file and not file.startswith(_OTHERS[:2]))


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def stacks_of(main: int) -> str:
    """The stacks of all threads of Python but the one that asks, the main one first.

    >>> "in stacks_of" in stacks_of(threading.get_ident())
    False
    """
    frames = sys._current_frames()  # noqa: SLF001 (so documented)
    _read_sources({each.f_code.co_filename for frame in frames.values() for each in _frames(frame)})
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    order = sorted(
        (ident for ident in frames if ident != threading.get_ident()), key=lambda each: each != main
    )
    return "\n".join(f"thread {names.get(ident, ident)}:\n{_stack(frames[ident])}" for ident in order)


def _read_sources(files: Collection[str]) -> None:
    """Read these files, as far as that can be done in time: some may lie on a disk that hangs."""

    def read() -> None:
        for file in files:
            linecache.getlines(file)

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    reading.join(_READ_SECONDS)


def _line_of(file: str, number: int) -> str:
    """A line that has been read, or ""; reads nothing."""
    known = linecache.cache.get(file, ())
    lines = known[2] if len(known) == 4 else ()  # some are yet to be read: (a function,)
    return lines[number - 1].strip() if 0 < number <= len(lines) else ""


def _stack(frame: FrameType) -> str:
    """A line for each frame, without those that started the thread, the innermost last."""
    frames = list(_frames(frame))[:_MOST_LINES]
    while len(frames) > 1 and _starts(frames[-1].f_code.co_filename):
        frames.pop()
    return "\n".join(f"  {_told(each)}" for each in reversed(frames))


def _starts(file: str) -> bool:
    return file.startswith("<") or file == _LAUNCHER or (file.startswith(_OTHERS[1:]) and not _is_users(file))


def _told(frame: FrameType) -> str:
    file, line = frame.f_code.co_filename, frame.f_lineno
    text = _line_of(file, line)
    short = "/".join(Path(file).parts[-3:]).removeprefix("//")
    return f"{short}:{line} in {frame.f_code.co_name}" + (f": {text}" if text else "")
