"""What `evenflow schedule` was asked for, checked before anything starts."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from evenflow.cli.writing import unwritable
from evenflow.cost_table import CostTable, RankTimes, capped, price, read_cost_table
from evenflow.errors import ConfigError
from evenflow.ir.costs import Costs
from evenflow.ir.placement import Placement
from evenflow.ir.schedule import Schedule
from evenflow.ir.timeline import Objective
from evenflow.schedules import catalog
from evenflow.schedules.sizes import check_workable
from evenflow.view.figure import picture_format


@dataclass(frozen=True, slots=True)
class Flags:
    """What the command line said; None where it said nothing."""

    name: str | None = None
    num_ranks: int | None = None
    num_microbatches: int | None = None
    stages_per_rank: int | None = None
    costs: str | None = None
    latency_seconds: float | None = None
    cap: float | None = None
    file: Path | None = None
    draw: Path | None = None
    save: Path | None = None
    compare: bool = False
    objective: Objective | None = None
    budget_seconds: float | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much there is to schedule; without `stages_per_rank`, each method has its own."""

    num_ranks: int
    stages_per_rank: int | None
    num_microbatches: int


@dataclass(frozen=True, slots=True)
class AllRanks:
    """Seconds of one microbatch on a rank, the same on all: forward, input gradient, weight gradient."""

    forward: float = 1.0
    input_grad: float = 1.0
    weight_grad: float = 1.0

    def table(self, num_ranks: int) -> RankTimes:
        """Return them for so many ranks."""
        each = (self.forward, self.input_grad, self.weight_grad)
        forward, input_grad, weight_grad = ((seconds,) * num_ranks for seconds in each)
        return RankTimes(forward, input_grad, weight_grad)


@dataclass(frozen=True, slots=True)
class Prices:
    """What the costs are to be made from; `cap` counts microbatches."""

    times: CostTable | AllRanks
    latency_seconds: float
    cap: float | None

    @property
    def in_bytes(self) -> bool:
        """Whether sizes are in bytes, and not in some unit."""
        return not isinstance(self.times, AllRanks) and self.times.in_bytes

    def costs_on(self, placement: Placement) -> Costs:
        """Return the costs of each stage of a placement; `ConfigError` if they do not fit it."""
        table = self.times.table(placement.num_ranks) if isinstance(self.times, AllRanks) else self.times
        costs = price(table, placement, latency_seconds=self.latency_seconds)
        return costs if self.cap is None else capped(costs, placement, self.cap)


def check(flags: Flags) -> None:
    """Raise `ConfigError` with all that is wrong with the flags themselves."""
    faults = [*_wrong_choice(flags), *_wrong_numbers(flags), *_wrong_files(flags)]
    if faults:
        raise ConfigError("\n".join(faults))
    if flags.name:
        catalog.get(flags.name)  # an unknown one is refused here, with the nearest


def _wrong_choice(flags: Flags) -> Iterator[str]:
    if flags.compare:
        given = {f"the name {flags.name!r}": flags.name, "--draw": flags.draw, "--save": flags.save}
        for option, value in given.items():
            if value:
                yield f"--compare tabulates all methods, and {option} is for one: leave one of them out"
    elif flags.name and flags.file:
        yield f"two schedules are given, {flags.name!r} and --file {flags.file}: leave one out"
    elif not flags.name and not flags.file:
        names = ", ".join(catalog.NAMES)
        yield f"no schedule is given: name one ({names}), or give --file S.csv, or --compare"
    if flags.name != catalog.AUTO:
        searching = {"--objective": flags.objective, "--budget": flags.budget_seconds, "--seed": flags.seed}
        for option, wish in searching.items():
            if wish is not None:
                yield f"{option} is for the search: name the schedule 'auto', or leave {option} out"


def _wrong_numbers(flags: Flags) -> Iterator[str]:
    sizes = {
        "--ranks": flags.num_ranks,
        "--microbatches": flags.num_microbatches,
        "--stages-per-rank": flags.stages_per_rank,
    }
    for option, value in sizes.items():
        if value is None:
            continue
        if value < 1:
            yield f"{option} {value} must be at least 1"
        # Beside a file, the methods that it is compared with may have any number of stages a rank.
        if flags.file and not (flags.compare and option == "--stages-per-rank"):
            yield f"{option} is what --file {flags.file} says: leave {option} out"
    if flags.latency_seconds is not None and not _is_amount(flags.latency_seconds):
        yield f"--latency {flags.latency_seconds:g} must be finite and at least 0 seconds"
    if flags.budget_seconds is not None and not (
        _is_amount(flags.budget_seconds) and flags.budget_seconds > 0
    ):
        yield f"--budget {flags.budget_seconds:g} must be finite and above 0 seconds"
    if flags.cap is not None and not (_is_amount(flags.cap) and flags.cap > 0):
        yield f"--cap {flags.cap:g} must be finite and above 0: it counts microbatches"


def _wrong_files(flags: Flags) -> Iterator[str]:
    if flags.draw:
        try:
            picture_format(flags.draw)
        except ConfigError as error:
            yield f"--draw: {error}"
    for option, path in (("--draw", flags.draw), ("--save", flags.save)):
        if path is not None and (fault := unwritable(option, path)) is not None:
            yield fault
    if flags.save and flags.save.is_file():
        yield f"--save {flags.save}: it exists, perhaps edited by hand; name another file, or remove it first"
    if flags.draw and flags.save and flags.draw.absolute() == flags.save.absolute():
        yield f"--draw and --save both name {flags.draw}: give each its own file"


def _is_amount(number: float) -> bool:
    return math.isfinite(number) and number >= 0


def read_prices(flags: Flags) -> Prices:
    """Return what `--costs`, `--latency` and `--cap` say; by default all ops of a rank take a second.

    Raises `ConfigError` for costs that can't be read, and for options that contradict one another.

    >>> read_prices(Flags(costs="1,2,0.5,0.1")).latency_seconds
    0.1
    """
    if flags.costs is None:
        return Prices(AllRanks(), flags.latency_seconds or 0.0, flags.cap)
    if Path(flags.costs).is_file() or flags.costs.lower().endswith(".csv"):
        table = read_cost_table(Path(flags.costs))
        if flags.cap is not None and isinstance(table, RankTimes) and table.caps is not None:
            raise ConfigError(f"--cap {flags.cap:g} and the column cap of {flags.costs} contradict: drop one")
        return Prices(table, flags.latency_seconds or 0.0, flags.cap)
    numbers = _numbers(flags.costs)
    if len(numbers) > 3 and flags.latency_seconds is not None:
        raise ConfigError(
            f"--latency {flags.latency_seconds:g} and the fourth number of --costs {flags.costs} are the "
            "same thing: leave one out"
        )
    latency = numbers[3] if len(numbers) > 3 else flags.latency_seconds or 0.0
    return Prices(AllRanks(*numbers[:3]), latency, flags.cap)


def _numbers(text: str) -> list[float]:
    how = (
        "write a rank's seconds for one microbatch, F,I,W or F,I,W,COMM ('1,1,0.5,0.1'), or name a CSV of "
        "measured times"
    )
    words = text.split(",")
    numbers = []
    for word in words:
        try:
            numbers.append(float(word))
        except ValueError:
            what = (
                f"{word!r} is no number" if len(words) > 1 else "there is no such file, and it is no number"
            )
            raise ConfigError(f"--costs {text}: {what}; {how}") from None
    if wrong := [number for number in numbers if not _is_amount(number)]:
        raise ConfigError(f"--costs {text}: {wrong[0]:g} must be finite and at least 0")
    if len(numbers) not in {3, 4}:
        raise ConfigError(f"--costs {text} has {len(numbers)} numbers: {how}")
    return numbers


def read_sizes(flags: Flags, own: Schedule | None, prices: Prices) -> Sizes:
    """Return the sizes that the flags, a file's schedule and a table of ranks give.

    Raises `ConfigError` for sizes that are missing, and as `check_workable`.

    >>> read_sizes(Flags(num_ranks=4, num_microbatches=8), None, read_prices(Flags()))
    Sizes(num_ranks=4, stages_per_rank=None, num_microbatches=8)
    """
    if own is not None:
        check_workable(own.placement.num_ranks, own.placement.num_stages, own.num_microbatches)
        return Sizes(own.placement.num_ranks, flags.stages_per_rank, own.num_microbatches)
    num_ranks, num_microbatches = flags.num_ranks, flags.num_microbatches
    if num_ranks is None and isinstance(prices.times, RankTimes):
        num_ranks = len(prices.times.forward_seconds)
    faults = []
    if num_ranks is None:
        faults.append("--ranks is missing: say how many ranks there are")
    if num_microbatches is None:
        faults.append("--microbatches is missing: say into how many a batch is split")
    if num_ranks is None or num_microbatches is None:
        raise ConfigError("\n".join(faults))
    stages_per_rank = flags.stages_per_rank or catalog.default_stages_per_rank(flags.name or "")
    check_workable(num_ranks, num_ranks * stages_per_rank, num_microbatches)
    return Sizes(num_ranks, flags.stages_per_rank, num_microbatches)
