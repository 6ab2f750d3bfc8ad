"""Slots: pieces of memory that two processes have mapped, and how the tensors of a parcel lie in one.

They stand in files without a name, several to a file, so that whatever ends a process, nothing is left.
"""

import contextlib
import errno
import math
import mmap
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from evenflow.errors import ConfigError
from evenflow.runtime.links.layout import Layout, unpack
from evenflow.runtime.links.link import Parcel

_ALIGNMENT_BYTES = 64  # each tensor begins where torch's own would
_SLOTS_PER_FILE = 16  # a process may have a thousand files open; what nobody has written takes no memory
_FORMS_KEPT = 4  # of each slot


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor of so many elements lies in a slot: its first byte."""

    layout: Layout
    start: int
    number: int

    def in_slot(self, slot: memoryview) -> tuple[torch.Tensor, tuple[int, ...] | None] | None:
        """Where its elements go, and the order of dimensions in which they do (None: as they are)."""
        layout = self.layout
        if not self.number:
            return None
        block = self._block(slot)
        if layout.is_dense:
            return block.as_strided(layout.shape, layout.stride), None
        return block.view([layout.shape[d] for d in layout.order]), layout.order

    def opened(self, slot: memoryview) -> torch.Tensor:
        """The tensor that lies there."""
        if not self.number:
            return unpack(torch.empty(0, dtype=self.layout.dtype, device="cpu"), self.layout)
        return unpack(self._block(slot), self.layout)

    def _block(self, slot: memoryview) -> torch.Tensor:
        return torch.frombuffer(slot, dtype=self.layout.dtype, count=self.number, offset=self.start)


class Form:
    """How the tensors of a parcel lie in a slot."""

    def __init__(self, layouts: tuple[Layout | None, ...]) -> None:
        self.layouts = layouts
        self._places: list[_Place | None] = []
        end = 0
        for layout in layouts:
            number = 0 if layout is None else math.prod(layout.shape)
            self._places.append(None if layout is None else _Place(layout, end, number))
            size = 0 if layout is None else number * layout.dtype.itemsize
            end += -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self.num_bytes = end
        # Sizes of slots are powers of two, so that parcels of like sizes share them.
        self.slot_bytes = max(mmap.PAGESIZE, 1 << (end - 1).bit_length()) if end else 0

    def fits(self, parcel: Parcel) -> bool:
        """Whether the tensors of a parcel lie so."""
        return len(parcel) == len(self.layouts) and all(map(_lies_as, parcel, self.layouts))

    def filled(self, slot: memoryview) -> Callable[[Parcel], None]:
        """What copies the tensors of a parcel into this slot."""
        with torch.inference_mode(mode=False):  # they are used in whatever mode a later parcel is sent
            places = [None if place is None else place.in_slot(slot) for place in self._places]

        def fill(parcel: Parcel) -> None:
            for tensor, place in zip(parcel, places, strict=True):
                if place is not None and tensor is not None:
                    block, order = place
                    given = tensor.detach()
                    block.copy_(given if order is None else given.permute(order))

        return fill

    def opened(self, slot: memoryview) -> Parcel:
        """The tensors that lie in a slot, as long as they need it."""
        return tuple(None if place is None else place.opened(slot) for place in self._places)


def _lies_as(tensor: torch.Tensor | None, layout: Layout | None) -> bool:
    if tensor is None or layout is None:
        return tensor is None and layout is None
    return tensor.shape == layout.shape and tensor.stride() == layout.stride and tensor.dtype is layout.dtype


@dataclass
class Slot:
    """A piece of shared memory, and the flag beside it: 1 from its sender's filling on, 0 when it is free."""

    memory: memoryview
    flags: memoryview
    number: int
    fill: dict[Form, Callable[[Parcel], None]] = field(default_factory=dict)  # of the last forms
    held: "weakref.ref[memoryview] | None" = None  # as last taken
    process: int = field(default_factory=os.getpid)

    def filled(self, form: Form) -> Callable[[Parcel], None]:
        """What copies the tensors of a parcel of this form into the slot."""
        if form not in self.fill:
            if len(self.fill) == _FORMS_KEPT:
                self.fill.clear()
            self.fill[form] = form.filled(self.memory)
        return self.fill[form]

    def let_go(self, _: object) -> None:
        """Its last tensor is gone: the sender may fill it again."""
        if os.getpid() == self.process:  # not a copy of this in a forked child
            self.flags[self.number] = 0


def board_in(file: int) -> memoryview:
    """A file's page of counters."""
    return memoryview(_mapped(file, mmap.PAGESIZE)).cast("Q")


def _mapped(file: int, num_bytes: int) -> mmap.mmap:
    with _enough_files():
        return mmap.mmap(file, num_bytes)


def memory_file(num_bytes: int) -> int:
    """An open file without a name, in memory; to be closed."""
    with _enough_files():
        file = os.memfd_create("evenflow")
    try:
        os.ftruncate(file, num_bytes)
    except BaseException:
        os.close(file)
        raise
    return file


@contextlib.contextmanager
def _enough_files() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise too_many_files() if error.errno == errno.EMFILE else error from None


@contextlib.contextmanager
def closing(file: int) -> Iterator[None]:
    """Close an open file in the end."""
    try:
        yield
    finally:
        os.close(file)


@contextlib.contextmanager
def file_of_slots(size: int) -> Iterator[tuple[int, list[Slot]]]:
    """A new file of slots of a size, open meanwhile, and the slots in it, which stay."""
    file = memory_file(mmap.PAGESIZE + _SLOTS_PER_FILE * size)
    with closing(file):
        yield file, slots_in(file, size)


def slots_in(file: int, size: int) -> list[Slot]:
    """The slots of a file: a page of flags, and the slots behind it."""
    whole = memoryview(_mapped(file, mmap.PAGESIZE + _SLOTS_PER_FILE * size))
    flags = whole[:_SLOTS_PER_FILE]
    starts = (mmap.PAGESIZE + number * size for number in range(_SLOTS_PER_FILE))
    return [Slot(whole[start : start + size], flags, number) for number, start in enumerate(starts)]


def too_many_files() -> ConfigError:
    """What is said when a process may open no more files."""
    return ConfigError(
        "this process may have no more files open, and sixteen parcels in flight between two ranks need one: "
        "raise the limit (ulimit -n), or use fewer microbatches"
    )
