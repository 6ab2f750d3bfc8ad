"""Log: when each op of a rank began to wait, started and ended."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from evenflow.ir.op import ComputeOp, Recv, SimpleOp
from evenflow.ir.timeline import Span
from evenflow.runtime.notes.clocks import Clock
from evenflow.runtime.notes.script import Line


@dataclass(slots=True)
class Log:
    """When each op of a rank began to wait, started and ended; of overlaps the parts too.

    `marks` and those `inside` are the clock's; they are read when somebody asks. For a watchdog it says in
    which op the rank is (`position[0]`) and for which arrival it waits. With a `gauge` the bytes that it
    tells after each op are noted too.
    """

    rank: int
    lines: Sequence[Line]
    clock: Clock
    marks: list[tuple[Any, Any, Any]] = field(default_factory=list)
    inside: list[tuple[SimpleOp, Any, Any]] = field(default_factory=list)
    position: memoryview = field(default_factory=lambda: memoryview(array("q", [0])))
    awaited: Recv | None = None
    gauge: Callable[[], int] | None = None
    held_bytes: list[int] = field(default_factory=list)

    @property
    def num_passed(self) -> int:
        """How many ops have really ended; a GPU may be far behind what the host has given it."""
        ends = (end for _, _, end in self.marks)
        return next((at for at, end in enumerate(ends) if not self.clock.has_passed(end)), len(self.marks))

    def times(self) -> list[tuple[float, float, float]]:
        """For each op that has ended when it began to wait, started and ended, in seconds."""
        read = self.clock.seconds
        return [(read(began), read(start), read(end)) for began, start, end in self.marks]

    @property
    def computed(self) -> list[tuple[float, float]]:
        """(start, end) of each op that computed, in seconds."""
        pairs = zip(self.lines, self.times(), strict=True)
        return [(start, end) for line, (_, start, end) in pairs if isinstance(line.op, ComputeOp)]

    def spans(self) -> list[Span]:
        """One for each op."""
        pairs = zip(self.lines, self.times(), strict=True)
        return [Span(self.rank, line.op, start, end) for line, (_, start, end) in pairs]

    def parts(self) -> list[Span]:
        """One for each simple op that computed, those of overlaps too."""
        read = self.clock.seconds
        inside = (Span(self.rank, op, read(start), read(end)) for op, start, end in self.inside)
        return [*(span for span in self.spans() if isinstance(span.op, SimpleOp)), *inside]
