"""`evenflow schedule`: draw a schedule, price it, hold it against the best possible. No model, no torch."""

import math
from collections.abc import Callable
from dataclasses import replace

from rich.console import Console

from evenflow.bounds_of import bounds_of
from evenflow.cli.printing import print_line
from evenflow.cli.schedule_flags import AllRanks, Flags, Prices, Sizes, check, read_prices, read_sizes
from evenflow.cli.schedule_report import Report, print_comparison, print_report
from evenflow.cli.writing import refusing_to_write, write
from evenflow.cost_table import rank_activations
from evenflow.critical_path import critical_path
from evenflow.errors import EvenflowError, ScheduleError
from evenflow.ir.costs import Costs
from evenflow.ir.flow import Flow
from evenflow.ir.placement import Placement
from evenflow.ir.schedule import Schedule
from evenflow.memory import memory_faults, peak_bytes
from evenflow.schedule_file import format_schedule, read_schedule_file
from evenflow.schedules import catalog
from evenflow.simulate import simulate
from evenflow.soundness import refusal
from evenflow.transfers import count_transfers
from evenflow.view.schedule_picture import MICROBATCHES, draw_schedule_picture
from evenflow.view.units import Unit, byte_unit, format_seconds

# Of output that goes to no terminal, so that it is the same everywhere.
PLAIN_WIDTH = 100


def schedule(flags: Flags, console: Console | None = None) -> None:
    """Draw, price, save or compare, as the flags say.

    Raises `ConfigError` for flags, sizes, costs or files that cannot work, before anything is written, and
    `ScheduleError` for a schedule that cannot be executed or holds more than the cap.

    >>> schedule(Flags("gpipe", num_ranks=2, num_microbatches=2))  # doctest: +SKIP
    gpipe: 2 stages on 2 ranks, 2 microbatches
    """
    check(flags)
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=PLAIN_WIDTH, no_color=True)
    own = read_schedule_file(flags.file) if flags.file else None
    prices = read_prices(flags)
    sizes = read_sizes(flags, own, prices)
    if flags.compare:
        _compare(console, sizes, own, prices)
    else:
        _show(console, flags, own or _named(console, flags, sizes, prices), prices)


def _named(console: Console, flags: Flags, sizes: Sizes, prices: Prices) -> Schedule:
    name = flags.name or ""
    return _search(console, flags, sizes, prices) if name == catalog.AUTO else make(name, sizes, prices)


def _search(console: Console, flags: Flags, sizes: Sizes, prices: Prices) -> Schedule:
    """Return the best that is found, and show how the search goes on where somebody watches."""
    from evenflow.schedules.auto import DEFAULT_BUDGET_SECONDS, best

    objective = flags.objective or "makespan"
    with console.status("searching (the first time, its compiler takes half a minute)") as status:

        def show(step: str, seconds: float) -> None:
            shortest = f", {objective} {format_seconds(seconds)}" if seconds < math.inf else ""
            status.update(f"searching: {step}{shortest}")

        found = best(
            sizes.num_ranks,
            sizes.stages_per_rank,
            sizes.num_microbatches,
            prices.costs_on,
            objective=objective,
            time_budget_seconds=flags.budget_seconds or DEFAULT_BUDGET_SECONDS,
            seed=flags.seed or 0,
            progress=show,
        )
    name = found.schedule.name
    return (
        found.schedule if name == catalog.AUTO else replace(found.schedule, name=f"{catalog.AUTO} ({name})")
    )


def make(name: str, sizes: Sizes, prices: Prices) -> Schedule:
    """Return a method's schedule, fitted to the costs where the method can be."""
    return catalog.make(
        name,
        num_ranks=sizes.num_ranks,
        stages_per_rank=sizes.stages_per_rank or catalog.default_stages_per_rank(name),
        num_microbatches=sizes.num_microbatches,
        costs_on=prices.costs_on,
    )


def report_of(made: Schedule, costs_on: Callable[[Placement], Costs]) -> Report:
    """Price a schedule whose stages are a chain; `ScheduleError` if it cannot be executed."""
    costs = costs_on(made.placement)
    flow = Flow.chain(made.placement.num_stages)
    timeline = simulate(made, flow, costs)
    # An evaluation keeps no activations, so that no cap is too low for it.
    faults = memory_faults(made, costs) if made.trains else []
    return Report(
        schedule=made,
        timeline=timeline,
        costs=costs,
        # Where a rank can't hold one microbatch there is nothing to be bound.
        bounds=None if faults else bounds_of(made, costs),
        peaks=peak_bytes(made, costs),
        activations=rank_activations(costs, made.placement),
        memory_faults=tuple(faults),
        transfers=count_transfers(made, flow, costs),
        path=critical_path(timeline, made, flow, costs),
    )


def _show(console: Console, flags: Flags, made: Schedule, prices: Prices) -> None:
    report = report_of(made, prices.costs_on)
    if report.memory_faults:
        raise _over_the_cap(report)
    unit = _memory_unit(prices, report)
    print_report(console, report, unit, in_bytes=prices.in_bytes)
    if flags.save:
        write(console, flags.save, format_schedule(made), told="saved to")
    if flags.draw:
        with refusing_to_write(flags.draw):
            draw_schedule_picture(flags.draw, made, report.timeline, report.costs, memory_unit=unit)
        print_line(console, f"drawn to {flags.draw}")


def _over_the_cap(report: Report) -> ScheduleError:
    queues = report.schedule.ranks
    error = refusal(report.schedule.name, report.memory_faults, queues, [0] * len(queues))
    error.add_note("Raise --cap, or name a method that holds less: evenflow schedule --compare tells which.")
    return error


def _memory_unit(prices: Prices, report: Report) -> Unit:
    if isinstance(prices.times, AllRanks) or prices.times.activation is None:
        return MICROBATCHES
    return byte_unit(max(report.peaks)) if prices.in_bytes else Unit("in the unit of the costs", 1.0)


def _compare(console: Console, sizes: Sizes, own: Schedule | None, prices: Prices) -> None:
    reports = [] if own is None else [report_of(own, prices.costs_on)]
    left_out = {}
    for name in catalog.SCHEDULES:
        try:
            made = make(name, sizes, prices)
            if made.trains:
                reports.append(report_of(made, prices.costs_on))
            else:
                left_out[name] = "it evaluates, and does not train"
        except EvenflowError as error:
            left_out[name] = str(error).splitlines()[0]
    left_out[catalog.AUTO] = f"it searches, for some time: evenflow schedule {catalog.AUTO}"
    print_comparison(console, sizes, reports, left_out)
