"""The page of a run, one HTML file that opens from disk, with all that its folder tells; and its picture."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from os import PathLike

from evenflow.journal.deviation import Beside, rank_numbers, stage_numbers, step_numbers
from evenflow.journal.last_step import LaneRecord, LastStep
from evenflow.journal.run import Run, Step, first_and_last_loss
from evenflow.plan.plan import Plan
from evenflow.view.assets import self_contained
from evenflow.view.picture import draw_timelines
from evenflow.view.timeline_data import Data, lane_data, rank_data, timeline_data
from evenflow.view.units import format_seconds


def run_page(run: Run, steps: Sequence[Step], last_step: LastStep, plan: Plan | None) -> str:
    """Return the page: timeline, memory, bill, cut, the run beside its plan, curves of all steps.

    It asks nothing of a network. uPlot draws it (https://github.com/leeoniya/uPlot, MIT license).
    """
    data = {
        "name": run.name,
        "about": f"{run.started}, {run.machine}; evenflow {run.evenflow}",
        "figures": _figures(run, steps, last_step),
        "item": run.item,
        "timeline": _timeline(run, last_step),
        "bills": {
            "predicted": [asdict(bill) for bill in last_step.predicted_bills],
            "measured": [asdict(bill) for bill in last_step.measured_bills],
        },
        "cut": [
            {
                **asdict(held),
                "forward": measured.forward_seconds,
                "backward": measured.whole_backward_seconds,
            }
            for held, measured in zip(last_step.stages, run.stages, strict=True)
        ],
        "beside": _beside(run, plan),
        "steps": {
            "number": [step.number for step in steps],
            "loss": [step.loss for step in steps],
            "per_second": [run.throughput(step.seconds + step.feed_seconds) for step in steps],
        },
    }
    return self_contained("run", title=f"{run.name} · Evenflow", data=data)


def draw_last_step(path: str | PathLike[str], run: Run, last_step: LastStep) -> None:
    """Draw the last step, as it was predicted and as it was measured. Raises as `draw_timelines`."""
    draw_timelines(
        path,
        predicted=last_step.predicted_timeline,
        measured=last_step.measured_timeline,
        title=f"{run.name}: {run.schedule}, {len(run.stages)} stages",
    )


def _figures(run: Run, steps: Sequence[Step], last_step: LastStep) -> list[tuple[str, str]]:
    losses = first_and_last_loss(steps)
    measured = last_step.measured_timeline
    figures = [
        (run.schedule, f"{len(run.stages)} stages on {len(run.ranks)} ranks"),
        (f"{run.num_microbatches}", "microbatches"),
        (format_seconds(run.step.median), f"a step (median of {run.num_timed})"),
        (f"{run.items_per_second:,.0f}", f"{run.item}/s"),
        (f"{measured.bubble:.1%}", "idle in the last step"),
    ]
    if losses is not None:
        figures.append((f"{losses[0]:.3f} → {losses[1]:.3f}", f"loss, {run.num_steps:,} steps"))
    return figures


def _timeline(run: Run, last_step: LastStep) -> Data:
    ranks = []
    for rank, (measured, predicted) in enumerate(zip(last_step.measured, last_step.predicted, strict=True)):
        held = zip(measured.end_seconds, measured.held_bytes, strict=False)  # which may be empty
        ranks.append(
            rank_data(
                predicted=_lane(predicted),
                measured=_lane(measured),
                held=list(held),
                peak=run.ranks[rank].peak_bytes,
                cap=last_step.caps_bytes[rank] if last_step.caps_bytes else None,
            )
        )
    edges = [asdict(edge) for edge in last_step.edges]
    return timeline_data(ranks, num_microbatches=run.num_microbatches, edges=edges)


def _lane(lane: LaneRecord) -> Data:
    return lane_data(lane.ops, lane.came_seconds, lane.start_seconds, lane.end_seconds, lane.held_bytes)


def _beside(run: Run, plan: Plan | None) -> list[Data]:
    """What was planned and is measured too."""
    ranks = rank_numbers(run, plan)
    groups: tuple[tuple[str, Sequence[Beside]], ...] = (
        ("seconds", step_numbers(run, plan)),
        ("share", [idle for idle, _ in ranks]),
        ("bytes", [memory for _, memory in ranks]),
        ("seconds", list(chain.from_iterable(stage_numbers(run, plan)))),
    )
    return [
        {"what": each.what, "planned": each.planned, "measured": each.measured, "unit": unit}
        for unit, numbers in groups
        for each in numbers
        if each.planned is not None and each.measured is not None
    ]
