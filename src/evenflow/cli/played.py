"""What the playground is asked, and what it answers: one step, simulated, as its page draws it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from evenflow.cli.schedule import make, report_of
from evenflow.cli.schedule_flags import Prices, Sizes
from evenflow.cli.schedule_report import Report, gap
from evenflow.cost_table import RankTimes
from evenflow.errors import ConfigError
from evenflow.ir.schedule import Schedule
from evenflow.memory import memory_curve
from evenflow.schedules import catalog
from evenflow.view.timeline_data import Data, lane_data, rank_data, timeline_data

_MAX_OPS = 60_000  # more take longer than a change of a lever may
_MAX_RANKS = 128  # more lanes are no picture
_SEARCH_SECONDS = 2.0
_DIGITS = 9


@dataclass(frozen=True, slots=True)
class Question:
    """A step: a schedule, its sizes, and seconds of one microbatch on a rank, for each rank or for all.

    `cap`: how many microbatches' activations a rank can hold at most; None: any. `stages_per_rank` None: the
    schedule's own.
    """

    schedule: str
    num_ranks: int
    num_microbatches: int
    stages_per_rank: int | None
    forward_seconds: tuple[float, ...]
    input_grad_seconds: tuple[float, ...]
    weight_grad_seconds: tuple[float, ...]
    transfer_seconds: float
    cap: float | None

    def __post_init__(self) -> None:
        if self.num_ranks > _MAX_RANKS:
            raise ConfigError(f"num_ranks = {self.num_ranks}: the playground draws {_MAX_RANKS} at most")
        if self.cap == 0:
            raise ConfigError("cap = 0 must be above 0: it counts microbatches")
        per_rank = self.stages_per_rank or catalog.default_stages_per_rank(self.schedule)
        num_ops = 3 * self.num_ranks * per_rank * self.num_microbatches
        if num_ops > _MAX_OPS:
            raise ConfigError(
                f"{self.num_ranks * per_rank} stages × {self.num_microbatches} microbatches are up to "
                f"{num_ops:,} ops, and the playground draws {_MAX_OPS:,}: lower one of them"
            )
        for name in ("forward_seconds", "input_grad_seconds", "weight_grad_seconds"):
            if len(getattr(self, name)) not in (1, self.num_ranks):
                raise ConfigError(
                    f"{name} has {len(getattr(self, name))} numbers: give one for all ranks, or one for each "
                    f"of the {self.num_ranks}"
                )

    @property
    def prices(self) -> Prices:
        """What the costs of a placement are made from."""
        forward, input_grad, weight_grad = (
            given * self.num_ranks if len(given) == 1 else given
            for given in (self.forward_seconds, self.input_grad_seconds, self.weight_grad_seconds)
        )
        table = RankTimes(forward, input_grad, weight_grad)
        return Prices(table, self.transfer_seconds, self.cap)


def answer(question: Question) -> Data:
    """Simulate a step. Raises `EvenflowError` for what no schedule can serve.

    >>> asked = Question("gpipe", 2, 4, None, (1.0,), (1.0,), (1.0,), 0.0, None)
    >>> found = answer(asked)
    >>> found["makespan"], round(found["bubble"], 3), found["peaks"]
    (15.0, 0.2, [4.0, 4.0])
    """
    report = report_of(_made(question), question.prices.costs_on)
    timeline, bounds = report.timeline, report.bounds
    limits = ""
    if bounds is not None:
        span = gap(timeline.span_seconds, bounds.span)
        makespan = gap(timeline.makespan_seconds, bounds.makespan)
        limits = f"Span: {span}. Makespan: {makespan}."
    return {
        "makespan": timeline.makespan_seconds,
        "bubble": timeline.bubble,
        "span": timeline.span_seconds,
        "span_bubble": timeline.span_bubble,
        "peaks": list(report.peak_microbatches),
        "faults": list(report.memory_faults),
        "bounds": limits,
        "command": _command(question),
        "timeline": _timeline(report),
    }


def _made(question: Question) -> Schedule:
    sizes = Sizes(question.num_ranks, question.stages_per_rank, question.num_microbatches)
    if question.schedule != catalog.AUTO:
        return make(question.schedule, sizes, question.prices)
    from evenflow.schedules.auto import best

    return best(
        sizes.num_ranks,
        sizes.stages_per_rank,
        sizes.num_microbatches,
        question.prices.costs_on,
        time_budget_seconds=_SEARCH_SECONDS,
    ).schedule


def _command(question: Question) -> str:
    """What shows the same in a shell; nothing where ranks differ, which takes a file of costs."""
    each = (question.forward_seconds, question.input_grad_seconds, question.weight_grad_seconds)
    if any(len(set(given)) > 1 for given in each):
        return ""
    numbers = (*(given[0] for given in each), question.transfer_seconds)
    costs = ",".join(map(_written, numbers))
    words = [
        f"evenflow schedule {question.schedule}",
        f"--ranks {question.num_ranks} --microbatches {question.num_microbatches} --costs {costs}",
    ]
    if question.stages_per_rank is not None:
        words.append(f"--stages-per-rank {question.stages_per_rank}")
    if question.cap is not None:
        words.append(f"--cap {_written(question.cap)}")
    if question.schedule == catalog.AUTO:
        words.append(f"--budget {_written(_SEARCH_SECONDS)}")
    return " ".join(words)


def _written(number: float) -> str:
    return repr(number).removesuffix(".0")


def _timeline(report: Report) -> Data:
    ranks = []
    for rank, lane in enumerate(report.timeline.lanes):
        start, end = map(_rounded, (lane.start_seconds, lane.end_seconds))
        whole = report.activations[rank] or 1.0
        curve = memory_curve(report.timeline, report.costs, rank) if report.schedule.trains else ()
        cap = math.inf if report.costs.memory_caps is None else report.costs.memory_caps[rank]
        ranks.append(
            rank_data(
                predicted=lane_data([str(op) for op in lane.ops], start, start, end),
                held=[(0.0, 0.0), *((round(at, _DIGITS), held / whole) for at, held in curve)],
                cap=cap / whole if math.isfinite(cap) else None,
            )
        )
    return timeline_data(ranks, num_microbatches=report.schedule.num_microbatches, counts_microbatches=True)


def _rounded(numbers: Sequence[float]) -> list[float]:
    return [round(number, _DIGITS) for number in numbers]
