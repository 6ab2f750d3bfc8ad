"""What the playground is asked, and what it answers: one step, simulated, as its page draws it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from evenflow.bounds import Bound
from evenflow.cli.schedule import report_of
from evenflow.cli.schedule_report import Report, gap
from evenflow.cost_table import RankTimes, capped, price
from evenflow.errors import ConfigError
from evenflow.ir.costs import Costs
from evenflow.ir.placement import Placement
from evenflow.ir.schedule import Schedule
from evenflow.memory import memory_curve
from evenflow.schedules import catalog
from evenflow.view.assets import colours

_MAX_OPS = 60_000  # more take longer than a change of a lever may
_SEARCH_SECONDS = 2.0


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

    def costs_on(self, placement: Placement) -> Costs:
        """The costs of a placement's stages."""
        forward, input_grad, weight_grad = (
            given * self.num_ranks if len(given) == 1 else given
            for given in (self.forward_seconds, self.input_grad_seconds, self.weight_grad_seconds)
        )
        times = RankTimes(forward, input_grad, weight_grad)
        costs = price(times, placement, latency_seconds=self.transfer_seconds)
        return costs if self.cap is None else capped(costs, placement, self.cap)


def answer(question: Question) -> dict[str, Any]:  # what play.js takes
    """Simulate a step. Raises `EvenflowError` for what no schedule can serve.

    >>> asked = Question("gpipe", 2, 4, None, (1.0,), (1.0,), (1.0,), 0.0, None)
    >>> found = answer(asked)
    >>> found["makespan"], round(found["bubble"], 3), found["peaks"]
    (15.0, 0.2, [4.0, 4.0])
    """
    report = report_of(_made(question), question.costs_on)
    timeline, bounds = report.timeline, report.bounds
    limits = []
    if bounds is not None:
        for name, took, bound in (
            ("Span", timeline.span_seconds, bounds.span),
            ("Makespan", timeline.makespan_seconds, bounds.makespan),
        ):
            limits.append(_limit(name, took, bound))
    return {
        "makespan": timeline.makespan_seconds,
        "bubble": timeline.bubble,
        "span": timeline.span_seconds,
        "span_bubble": timeline.span_bubble,
        "peaks": list(report.peak_microbatches),
        "faults": list(report.memory_faults),
        "bounds": " ".join(limits),
        "command": _command(question),
        "timeline": _timeline(report),
    }


def _made(question: Question) -> Schedule:
    per_rank = question.stages_per_rank or catalog.default_stages_per_rank(question.schedule)
    sizes = (question.num_ranks, question.stages_per_rank, question.num_microbatches)
    if question.schedule == catalog.AUTO:
        from evenflow.schedules.auto import best

        found = best(*sizes, question.costs_on, time_budget_seconds=_SEARCH_SECONDS).schedule
        return replace(found, name=catalog.AUTO)
    return catalog.make(
        question.schedule,
        num_ranks=question.num_ranks,
        stages_per_rank=per_rank,
        num_microbatches=question.num_microbatches,
        costs_on=question.costs_on,
    )


def _limit(name: str, took: float, bound: Bound) -> str:
    return f"{name}: {gap(took, bound)}."


def _command(question: Question) -> str:
    """What shows the same in a shell; nothing where ranks differ, which takes a file of costs."""
    each = (question.forward_seconds, question.input_grad_seconds, question.weight_grad_seconds)
    if any(len(set(given)) > 1 for given in each):
        return ""
    costs = ",".join(f"{given:g}" for given in (*(given[0] for given in each), question.transfer_seconds))
    words = [
        f"evenflow schedule {question.schedule}",
        f"--ranks {question.num_ranks} --microbatches {question.num_microbatches} --costs {costs}",
    ]
    if question.stages_per_rank is not None:
        words.append(f"--stages-per-rank {question.stages_per_rank}")
    if question.cap is not None:
        words.append(f"--cap {question.cap:g}")
    return " ".join(words)


def _timeline(report: Report) -> dict[str, Any]:  # what timeline.js takes
    ranks = []
    for rank, lane in enumerate(report.timeline.lanes):
        whole = report.activations[rank] or 1.0
        curve = [(0.0, 0.0)]
        if report.schedule.trains:
            curve += memory_curve(report.timeline, report.costs, rank)
        ranks.append(
            {
                "predicted": {
                    "ops": [str(op) for op in lane.ops],
                    "came": _rounded(lane.start_seconds),
                    "start": _rounded(lane.start_seconds),
                    "end": _rounded(lane.end_seconds),
                },
                "held": {
                    "seconds": _rounded([seconds for seconds, _ in curve]),
                    "bytes": _rounded([held / whole for _, held in curve]),
                },
                "cap": _cap(report, rank, whole),
            }
        )
    return {
        "microbatches": report.schedule.num_microbatches,
        "colours": colours(),
        "edges": {},
        "countsMicrobatches": True,
        "ranks": ranks,
    }


def _cap(report: Report, rank: int, whole: float) -> float | None:
    caps = report.costs.memory_caps
    return None if caps is None or not math.isfinite(caps[rank]) else caps[rank] / whole


def _rounded(numbers: Sequence[float]) -> list[float]:
    return [round(number, 9) for number in numbers]
