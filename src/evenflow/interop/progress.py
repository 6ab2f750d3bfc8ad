"""Progress: what a person who watches a training run sees of it; a hook for `Pipeline.log_to`.

On a terminal a bar moves, with the numbers below it; elsewhere there is a line now and then instead.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

import evenflow
from evenflow.errors import ConfigError
from evenflow.pipe.given.refuse import check_whole
from evenflow.pipe.times.devices import fullness
from evenflow.view.units import format_bytes

# So many lines, evenly spread, stand in for the bar where output goes to a file.
_NUM_LINES = 10
_REDRAW_SECONDS = 0.1
_GAP = "  "
# A time left that is longer tells nobody anything.
_LONGEST_SECONDS = timedelta(days=365).total_seconds()


@contextlib.contextmanager
def progress(
    pipe: "evenflow.Pipeline", *, num_steps: int, every: int = 10, console: Console | None = None
) -> "Iterator[ProgressReport]":
    """Show a training loop's progress while inside: loss, speed, idle share, memory, and the time left.

    `num_steps` is the number of the last update (see `Pipeline.log_to`). The first, the last and each
    `every`th are looked at, which waits for the device and asks all ranks: so every rank enters this, and
    the main one shows it, on `console` or the standard output. `line(text)` of what it gives prints above.

    Raises `ConfigError` for no steps, and for `every` below 1.

    >>> import torch, evenflow
    >>> batch, model = torch.ones(8, 4), torch.nn.Linear(4, 1)
    >>> pipe = evenflow.pipeline(model, loss=lambda model, b: model(b).mean(), example=batch, stages=1)
    >>> with progress(pipe, num_steps=2, console=Console(quiet=True)):
    ...     for batch in pipe.feed([batch, batch]):
    ...         _ = pipe.step(batch)
    """
    check_whole(num_steps=num_steps, every=every)
    if min(num_steps, every) < 1:
        raise ConfigError(f"num_steps={num_steps} and every={every} must be at least 1")
    console = (console or Console()) if pipe.is_main else Console(quiet=True)
    with ProgressReport(console, num_steps=num_steps, num_made=pipe.num_updates) as report:
        remove = pipe.log_to(
            report, every=lambda number: number % every == 0 or number in (1, num_steps), all_ranks=True
        )
        try:
            yield report
        finally:
            remove()
            report.reached(pipe.num_updates)


class ProgressReport:
    """The moving part of the output, to be used in a `with` block around the training loop.

    `num_made` of the `num_steps` steps are made before.
    """

    def __init__(self, console: Console, *, num_steps: int, num_made: int = 0) -> None:
        self._console, self._num_steps = console, num_steps
        self._number, self._numbers = num_made, list[str]()
        self._step_seconds: float | None = None
        self._next_line, self._last_line = 1, num_made
        self._drawn = -math.inf
        self._live = Live(console=console, auto_refresh=False, get_renderable=self._bar)

    def __enter__(self) -> Self:
        if self._moves:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._moves:
            self._live.refresh()
            self._live.stop()
        elif self._number > self._last_line:
            self.line(self._title)

    @property
    def _moves(self) -> bool:
        return self._console.is_terminal and not self._console.quiet

    def __call__(self, step: int, numbers: Mapping[str, float]) -> None:
        """Show that `step` updates are done, with the last one's numbers."""
        self._number = step
        self._numbers = [*_told(numbers), *_gauged(numbers)]
        self._step_seconds = numbers.get("step_seconds", self._step_seconds)
        if self._moves:
            if time.monotonic() - self._drawn > _REDRAW_SECONDS:
                self._live.refresh()
                self._drawn = time.monotonic()
        elif step >= self._next_line:
            self.line(_GAP.join([self._title, *self._numbers, *self._left]))
            self._last_line = step
            lines_done = step * _NUM_LINES // self._num_steps
            self._next_line = math.ceil((lines_done + 1) * self._num_steps / _NUM_LINES)

    def reached(self, step: int) -> None:
        """So many are done, though the last ones may have no numbers (those left out have none)."""
        self._number = step

    @property
    def _title(self) -> str:
        return f"step {self._number}/{self._num_steps}"

    @property
    def _left(self) -> list[str]:
        """The time left, where it is known and can be told of in days."""
        seconds = math.inf
        if self._step_seconds is not None:
            seconds = max(0.0, (self._num_steps - self._number) * self._step_seconds)
        return [f"ETA {timedelta(seconds=round(seconds))}"] if seconds < _LONGEST_SECONDS else []

    def line(self, text: str) -> None:
        """Print a line of its own, above the bar."""
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def _bar(self) -> Group:
        """The bar and, below it, the numbers, none of them broken where the lines of the terminal end."""
        first = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None):
            first.add_column(ratio=ratio, no_wrap=True)
        bar = ProgressBar(total=self._num_steps, completed=min(self._number, self._num_steps))
        first.add_row(Text(self._title), bar, Text("".join(self._left)))
        return Group(first, *map(Text, _in_lines(self._numbers, self._console.width)))


def _told(numbers: Mapping[str, float]) -> Iterator[str]:
    """The loss; how fast it goes, where that is known: tokens where those are counted, else rows."""
    yield f"loss {numbers['loss']:.3f}"
    if "step_seconds" not in numbers:
        return
    name = "tokens" if "tokens_per_second" in numbers else "rows"
    milliseconds = 1000 * numbers["step_seconds"]
    yield f"{numbers[f'{name}_per_second']:,.0f} {name}/s"
    yield f"{milliseconds:.{0 if milliseconds >= 10 else 1}f} ms/step"


def _gauged(numbers: Mapping[str, float]) -> Iterator[str]:
    """The idle share of all ranks, or of the first; the memory of the rank that is fullest."""
    if "bubble" in numbers:
        yield f"bubble {numbers['bubble']:.1%}".replace("%", " %")
    elif "bubble/rank0" in numbers:
        yield f"bubble {numbers['bubble/rank0']:.1%} (rank 0)".replace("%", " %")
    peaks = {
        name.removeprefix("peak_bytes/"): held
        for name, held in numbers.items()
        if name.startswith("peak_bytes/")
    }
    if peaks:
        fullest = max(peaks, key=lambda rank: fullness(peaks[rank], numbers.get(f"cap_bytes/{rank}")))
        cap = numbers.get(f"cap_bytes/{fullest}")
        of = "" if cap is None else f" of {format_bytes(cap)}"
        yield f"memory {format_bytes(peaks[fullest])}{of} ({fullest.replace('rank', 'rank ')})"


def _in_lines(parts: Sequence[str], width: int) -> list[str]:
    """The parts, as many on each line as have room.

    >>> _in_lines(["loss 2.5", "3 ms/step", "bubble 5.0 %"], 20)
    ['loss 2.5  3 ms/step', 'bubble 5.0 %']
    """
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(_GAP) + len(part) <= width:
            lines[-1] += _GAP + part
        else:
            lines.append(part)
    return lines
