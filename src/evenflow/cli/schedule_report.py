"""What the user sees of a schedule: its drawing and its numbers, or the table that compares methods."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from evenflow.bounds import Bound, Bounds
from evenflow.cli.printing import print_lanes, print_line, print_whole
from evenflow.cli.schedule_flags import Sizes
from evenflow.ir.costs import ROUNDING, Costs
from evenflow.ir.schedule import Schedule
from evenflow.ir.timeline import Span, Timeline
from evenflow.transfers import Transfers
from evenflow.view.schedule_picture import MICROBATCHES, format_sizes
from evenflow.view.units import Unit, format_bytes, format_count, format_seconds, time_unit

_NUM_NAMED = 8  # ranks that a line tells of one by one


@dataclass(frozen=True, slots=True)
class Report:
    """All that is known of a schedule at some costs.

    `peaks` and `activations` are per rank, in the unit of the costs: the most that it holds, and what one
    microbatch holds in all of its stages. `bounds` is None for a schedule that does not train.
    """

    schedule: Schedule
    timeline: Timeline
    costs: Costs
    bounds: Bounds | None
    peaks: tuple[float, ...]
    activations: tuple[float, ...]
    memory_faults: tuple[str, ...]
    transfers: Transfers
    path: tuple[Span, ...]

    @property
    def peak_microbatches(self) -> tuple[float, ...]:
        """The most that each rank holds, in microbatches of all of its stages."""
        pairs = zip(self.peaks, self.activations, strict=True)
        return tuple(peak / whole if whole > 0 else 0.0 for peak, whole in pairs)


def print_report(console: Console, report: Report, memory_unit: Unit, *, in_bytes: bool) -> None:
    """Draw a schedule and tell its numbers; `in_bytes` tells whether sizes are in bytes or in some unit."""
    made = report.schedule
    print_line(console, Text.assemble((made.name, "bold"), f": {format_sizes(made)}"))
    print_lanes(console, report.timeline)
    timeline, bounds = report.timeline, report.bounds
    span, makespan = (None, None) if bounds is None else (bounds.span, bounds.makespan)
    for name, seconds, idle, bound in (
        ("span", timeline.span_seconds, timeline.span_bubble, span),
        ("makespan", timeline.makespan_seconds, timeline.bubble, makespan),
    ):
        limit = "" if bound is None else f", {gap(seconds, bound)}"
        _item(console, name, f"{format_seconds(seconds)}, idle {100 * idle:.1f} %{limit}")
    _item(console, "peak held", _peaks(report, memory_unit))
    _item(console, "transfers", _transfers(report.transfers, in_bytes=in_bytes))
    _item(console, "critical path", _path(report.path, made.placement.num_ranks))


def gap(seconds: float, bound: Bound) -> str:
    """How far a time is from the least that it could be, in words."""
    least = f"at least {format_seconds(bound.seconds)} (because {bound.reason})"
    if seconds <= bound.seconds * (1 + ROUNDING):
        return f"{least}, so optimal for this placement"
    if bound.seconds == 0:
        return least
    # Rounded up: "within" must be true.
    percent = math.ceil(1000 * (seconds / bound.seconds - 1) - 1e-6) / 10
    return f"{least}, so within {percent:.1f} % of the best for this placement"


def _peaks(report: Report, unit: Unit) -> str:
    if not report.schedule.trains:
        return "nothing: it keeps no activations"
    text = f"activations of {_each(report.peak_microbatches, '{:.4g}')} microbatches"
    caps = report.costs.memory_caps
    if caps is not None:
        pairs = zip(caps, report.activations, strict=True)
        in_microbatches = [cap / whole if whole > 0 else math.inf for cap, whole in pairs]
        text += f" (cap {_each(in_microbatches, '{:.4g}')})"
    if unit is not MICROBATCHES:
        text += f", {_each([peak / unit.size for peak in report.peaks], '{:.4g}')} {unit.name}"
        if caps is not None:
            text += f" (cap {_each([cap / unit.size for cap in caps], '{:.4g}')})"
    return text


def _each(values: Iterable[float], form: str) -> str:
    """Tell the value of each rank; of many, the highest and the lowest."""
    values = [round(value, 9) for value in values]
    if len(set(values)) == 1:
        return form.format(values[0])
    if len(values) <= _NUM_NAMED:
        return ", ".join(form.format(value) for value in values)
    low, high = min(values), max(values)
    return f"{form.format(low)} (rank {values.index(low)}) to {form.format(high)} (rank {values.index(high)})"


def _transfers(transfers: Transfers, *, in_bytes: bool) -> str:
    if transfers.num == 0:
        return "none"
    text = (
        f"{transfers.num:,}: {transfers.num_activations:,} activations, {transfers.num_gradients:,} gradients"
    )
    if transfers.num_bytes is None:
        return f"{text}; their bytes are not known"
    return f"{text}; {format_bytes(transfers.num_bytes) if in_bytes else f'{transfers.num_bytes:g} in all'}"


def _path(path: tuple[Span, ...], num_ranks: int) -> str:
    compute = [0.0] * num_ranks
    for span in path:
        compute[span.rank] += span.seconds
    gaps = [later.start_seconds - earlier.end_seconds for earlier, later in pairwise(path)]
    waits = sum(gap > 0 for gap in gaps)
    ranks = sorted(range(num_ranks), key=lambda rank: -compute[rank])
    shown = [f"rank {rank} {format_seconds(compute[rank])}" for rank in ranks if compute[rank] > 0]
    if len(shown) > _NUM_NAMED:
        shown = [*shown[:3], f"and {len(shown) - 3} more"]
    text = f"{format_seconds(sum(compute))} compute" + (f" ({', '.join(shown)})" if shown else "")
    return f"{text}, {format_seconds(sum(gaps))} in {format_count(waits, 'transfer')}" if waits else text


def print_comparison(
    console: Console, sizes: Sizes, reports: Iterable[Report], left_out: Mapping[str, str]
) -> None:
    """Tabulate schedules, the shortest span first, those over their cap last; then say what is left out."""
    reports = sorted(
        reports,
        key=lambda each: (
            bool(each.memory_faults),
            # Sums in another order differ in the last digits, and must not decide.
            float(f"{each.timeline.span_seconds:.9g}"),
            float(f"{each.timeline.makespan_seconds:.9g}"),
            max(each.peak_microbatches),
        ),
    )
    microbatches = format_count(sizes.num_microbatches, "microbatch", "es")
    title = f"{format_count(sizes.num_ranks, 'rank')}, {microbatches}"
    if reports:
        has_caps = any(each.costs.memory_caps is not None for each in reports)
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        table.add_column("schedule", no_wrap=True)
        unit = time_unit(min(each.timeline.span_seconds for each in reports))
        times = (f"span\n({unit.name})", "idle", f"makespan\n({unit.name})", "idle")
        for heading in ("stages\nper rank", *times, "peak\nheld"):
            table.add_column(heading, justify="right")
        if has_caps:
            table.add_column("cap", justify="center")
        table.add_column("transfers", justify="right")
        for each in reports:
            table.add_row(*_cells(each, unit, has_caps=has_caps), style="dim" if each.memory_faults else None)
        print_whole(console, table)
        print_line(console, "peak held: the most of any rank, in microbatches' activations", "dim")
    else:
        print_line(console, f"{title}: no schedule can serve them", "bold")
    for name, reason in left_out.items():
        print_line(console, Text.assemble((name, "bold"), f": {reason.removeprefix(f'schedule {name!r} ')}"))


def _cells(report: Report, unit: Unit, *, has_caps: bool) -> list[str]:
    placement, timeline = report.schedule.placement, report.timeline
    cells = [
        report.schedule.name,
        f"{placement.num_stages / placement.num_ranks:g}",
        f"{timeline.span_seconds / unit.size:.2f}",
        f"{100 * timeline.span_bubble:.1f} %",
        f"{timeline.makespan_seconds / unit.size:.2f}",
        f"{100 * timeline.bubble:.1f} %",
        f"{max(report.peak_microbatches):.4g}",
    ]
    if has_caps:
        cells.append("over" if report.memory_faults else "fits")
    return [*cells, f"{report.transfers.num:,}"]


def _item(console: Console, name: str, text: str) -> None:
    print_line(console, Text.assemble((f"{name:<13} ", "bold"), text))
