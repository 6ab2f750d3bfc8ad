"""`evenflow show`: what a run's steps took, beside what its plan expected; its page and its pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from evenflow.cli.printing import print_lanes, print_line, print_whole
from evenflow.cli.writing import refusing_to_write, unwritable, write
from evenflow.errors import ConfigError
from evenflow.journal.chrome_trace import chrome_trace
from evenflow.journal.deviation import Beside, fits, furthest, rank_numbers, stage_numbers, step_numbers
from evenflow.journal.folder import PAGE, is_record, read_last_step, read_plan_of, read_run, read_steps
from evenflow.journal.page import draw_last_step, run_page
from evenflow.journal.run import Run, Step, first_and_last_loss
from evenflow.plan.plan import Plan
from evenflow.view.figure import picture_format
from evenflow.view.units import Unit, byte_unit, format_count, format_seconds, time_unit

_LARGE = 0.1  # a deviation that is worth a colour
_PERCENT = Unit("%", 0.01)
_MISSING = "-"


@dataclass(frozen=True, slots=True)
class Files:
    """Where to write what was asked for: the page, a picture and a trace of the last step."""

    page: Path | None = None
    picture: Path | None = None
    trace: Path | None = None

    def check(self) -> None:
        """Raise `ConfigError` for what can take no picture, and for files that would replace one another."""
        if self.picture is not None:
            picture_format(self.picture)
        named = {"--page": self.page, "--picture": self.picture, "--trace": self.trace}
        taken: dict[Path, str] = {}
        for option, path in named.items():
            if path is None:
                continue
            if (fault := unwritable(option, path)) is not None:
                raise ConfigError(fault)
            if is_record(path):
                raise ConfigError(
                    f"{option} {path}: a run keeps its records under this name; name another file"
                )
            other = taken.setdefault(path.absolute(), option)
            if other != option:
                raise ConfigError(f"{other} and {option} both name {path}: give each its own file")


def show(folder: Path, files: Files) -> None:
    """Print the run of a folder, and write its page, by default into the folder, and other files.

    Files that are there are replaced. Raises `ConfigError` where the folder holds no run, or what it holds is
    broken, and for a file that cannot be written.
    """
    run, steps = read_run(folder), read_steps(folder)
    last_step, plan = read_last_step(folder, run), read_plan_of(folder, run)
    files.check()
    console = Console()
    print_run(console, run, steps, plan)
    console.print()
    print_line(console, "The last step, as it was measured", "bold")
    print_lanes(console, last_step.measured_timeline)
    page = run_page(run, steps, last_step, plan)
    try:
        write(console, files.page or folder / PAGE, page)
    except ConfigError as error:
        if files.page is not None:
            raise
        print_line(console, f"{error}: --page FILE.html", "yellow")  # the folder may be somebody else's
    if files.trace is not None:
        write(console, files.trace, chrome_trace(last_step))
    if files.picture is not None:
        with refusing_to_write(files.picture):
            draw_last_step(files.picture, run, last_step)
        print_line(console, f"drew {files.picture}")


def print_run(console: Console, run: Run, steps: Sequence[Step], plan: Plan | None) -> None:
    """Print what a run was, its step, its ranks and its stages; beside its plan, where there is one."""
    print_line(console, Text.assemble((run.name, "bold"), f": {_sizes(run)}"))
    print_line(console, f"{run.started}, {run.machine}; evenflow {run.evenflow}", "dim")
    print_line(console, _learnt(run, steps))
    if plan is not None and not fits(run, plan):
        warning = (
            f"The plan is of steps of {plan.num_microbatches} microbatches, and these had "
            f"{run.num_microbatches}: only what one microbatch takes can be compared."
        )
        print_line(console, warning, "yellow")
    step, ranks, stages = step_numbers(run, plan), rank_numbers(run, plan), stage_numbers(run, plan)
    for table in (_step_table(run, step), _rank_table(run, ranks), _stage_table(run, stages)):
        console.print()
        print_whole(console, table)
    console.print()
    print_line(console, _simulated(run))
    if (worst := furthest(each for stage in stages for each in stage)) is not None:
        print_line(console, f"Furthest from the plan: {_told(worst)}", "bold")


def _sizes(run: Run) -> str:
    stages, ranks = format_count(len(run.stages), "stage"), format_count(len(run.ranks), "rank")
    return f"{run.schedule}, {stages}, {ranks}, microbatches: {run.num_microbatches}"


def _learnt(run: Run, steps: Sequence[Step]) -> str:
    losses = first_and_last_loss(steps)
    told = f"{format_count(run.num_steps, 'step')}, {run.items_per_second:,.0f} {run.item}/s"
    if losses is None:
        return told
    first, last = losses
    return f"{told}, loss {first:.3f} -> {last:.3f}"


def _step_table(run: Run, numbers: Sequence[Beside]) -> Table:
    unit = time_unit(run.step.median)
    group = _Group(("", ""), unit, numbers)
    table = _table(f"A step, in {unit.name} (medians of {format_count(run.num_timed, 'step')})", "")
    group.head(table)
    table.add_column("least", justify="right", vertical="bottom")
    table.add_column("most", justify="right", vertical="bottom")
    for row, spread in enumerate((run.step, run.pipeline, None)):
        range_ = (spread.least, spread.most) if spread is not None else (None, None)
        table.add_row(numbers[row].what, *group.row(row), *(_number(each, unit) for each in range_))
    return table


def _rank_table(run: Run, numbers: Sequence[tuple[Beside, Beside]]) -> Table:
    idle, memory = zip(*numbers, strict=True)
    unit = byte_unit(max(each.measured or each.planned or 0.0 for each in memory))
    groups = [_Group(("idle", "(%)"), _PERCENT, idle, has_deviation=False)]
    if any(each.planned is not None or each.measured is not None for each in memory):
        groups.append(_Group(("memory", f"({unit.name})"), unit, memory))
    table = _table("Ranks", "rank", "stages")
    for group in groups:
        group.head(table)
    for rank in range(len(run.ranks)):
        stages = (str(number) for number, stage in enumerate(run.stages) if stage.rank == rank)
        table.add_row(str(rank), ", ".join(stages), *(cell for group in groups for cell in group.row(rank)))
    return table


def _stage_table(run: Run, numbers: Sequence[tuple[Beside, ...]]) -> Table:
    """Backwards whole or in halves, as the run had them."""
    forward, backward, input_grad, weight_grad = zip(*numbers, strict=True)
    unit = time_unit(max(each.measured or 0.0 for each in (*forward, *backward)))
    groups = [_Group(("forward", ""), unit, forward)]
    if all(each.measured is not None for each in input_grad):
        groups.append(_Group(("input", "gradient"), unit, input_grad))
        groups.append(_Group(("weight", "gradient"), unit, weight_grad))
    else:
        groups.append(_Group(("backward", ""), unit, backward))
    table = _table(f"Stages, in {unit.name} for one microbatch", "stage")
    table.add_column(
        "begins with", overflow="ellipsis", no_wrap=True, max_width=38 - 8 * len(groups), vertical="bottom"
    )
    for group in groups:
        group.head(table)
    for number, stage in enumerate(run.stages):
        cells = (cell for group in groups for cell in group.row(number))
        table.add_row(str(number), Text(stage.first), *cells)
    return table


@dataclass(frozen=True, slots=True)
class _Group:
    """Columns of numbers: planned, measured and the deviation, or, where nothing was planned, measured.

    `heading` stands above them, as much of it above the first as above the second.
    """

    heading: tuple[str, str]
    unit: Unit
    numbers: Sequence[Beside]
    has_deviation: bool = True

    @property
    def _is_planned(self) -> bool:
        return any(each.planned is not None for each in self.numbers)

    def head(self, table: Table) -> None:
        first, second = self.heading
        headings = [f"{first} {second}\nmeasured"]
        if self._is_planned:
            headings = [f"{first}\nplanned", f"{second}\nmeasured", *(["±"] if self.has_deviation else [])]
        for heading in headings:
            table.add_column(heading.strip(), justify="right", no_wrap=True, vertical="bottom")

    def row(self, row: int) -> list[Text]:
        number = self.numbers[row]
        cells = [_number(number.measured, self.unit)]
        if self._is_planned:
            cells.insert(0, _number(number.planned, self.unit))
            cells += [Text(_deviation(number), _style(number))] if self.has_deviation else []
        return cells


def _number(value: float | None, unit: Unit) -> Text:
    if value is None:
        return Text(_MISSING)
    return Text(f"{value / unit.size:.{1 if unit is _PERCENT else 2}f}")


def _deviation(number: Beside) -> str:
    share = number.deviation
    if share is None:
        return _MISSING
    return f"{share:+.1%}" if share < 1 else f"×{share + 1:.1f}"


def _style(number: Beside) -> str:
    return "bold" if number.deviation is not None and abs(number.deviation) > _LARGE else ""


def _simulated(run: Run) -> str:
    """How much of the pipeline's time its ops explain."""
    simulated, took = map(format_seconds, (run.simulated_seconds, run.pipeline.median))
    return (
        f"Simulated from these times the pipeline takes {simulated}; it took {took}. Between them lie "
        "transfers, waits, and ops slower than their medians."
    )


def _told(number: Beside) -> str:
    assert number.planned is not None, "only a planned number is off"
    assert number.measured is not None, "as above"
    return (
        f"{number.what}, planned {format_seconds(number.planned)} and measured "
        f"{format_seconds(number.measured)} a microbatch ({_deviation(number)})"
    )


def _table(title: str, *headings: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        collapse_padding=True,
        pad_edge=False,
    )
    for heading in headings:
        table.add_column(heading, vertical="bottom")
    return table
