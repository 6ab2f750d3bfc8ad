"""What the threads of this process do: their stacks, and the line of the user's that the main one is in."""

import linecache
import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch

_MOST_LINES = 30  # of each stack, the innermost
_OTHERS = (
    str(Path(__file__).parents[1]),
    str(Path(torch.__file__).parent),
    sysconfig.get_path("stdlib"),
    "<frozen",
)
_LAUNCHER = str(Path(__file__).parents[1] / "launcher.py")


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
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    order = sorted(
        (ident for ident in frames if ident != threading.get_ident()), key=lambda each: each != main
    )
    return "\n".join(f"thread {names.get(ident, ident)}:\n{_stack(frames[ident])}" for ident in order)


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
    text = linecache.getline(file, line).strip()
    short = "/".join(Path(file).parts[-3:]).removeprefix("//")
    return f"{short}:{line} in {frame.f_code.co_name}" + (f": {text}" if text else "")
