"""Lanes: where boxes lie, what is written on them, and how thousands are drawn."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from evenflow.ir import Backward, Costs, Flow, Forward, InputGrad, Overlap, Span, Timeline, WeightGrad
from evenflow.schedules.catalog import get
from evenflow.simulate import simulate
from evenflow.view.lanes import draw_lanes, legend_patches, write_names
from evenflow.view.palette import IDLE, colour_of
from evenflow.view.units import Unit

SECONDS = Unit("s", 1.0)


def drawn(timeline: Timeline):
    figure = Figure(figsize=(12, 3), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xlim(0.0, timeline.makespan_seconds)
    draw_lanes(axes, timeline, SECONDS)
    return axes


def bars_of(axes) -> list[PolyCollection]:
    return [bar for bar in axes.collections if isinstance(bar, PolyCollection)]


def gpipe(num_microbatches: int, stages_per_rank: int = 1) -> Timeline:
    schedule = get("gpipe")(2, stages_per_rank, num_microbatches)
    num_stages = schedule.placement.num_stages
    return simulate(schedule, Flow.chain(num_stages), Costs.uniform(num_stages))


def test_each_kind_has_its_colour() -> None:
    ops = [Forward(0, 0), InputGrad(0, 0), WeightGrad(0, 0), Backward(0, 1)]
    axes = drawn(Timeline.of(1, [Span(0, op, at, at + 1.0) for at, op in enumerate(ops)]))
    _, bar = bars_of(axes)
    assert np.allclose(bar.get_facecolors()[:, :3], [colour_of(op, 2) for op in ops])


def test_an_overlap_shows_both_of_its_ops() -> None:
    both = (Forward(0, 1), InputGrad(0, 0))
    axes = drawn(Timeline.of(1, [Span(0, Overlap(*both), 2.0, 5.0)]))
    _, upper, lower = bars_of(axes)
    extents = [bar.get_paths()[0].get_extents() for bar in (upper, lower)]
    assert [(box.x0, box.x1) for box in extents] == [(0.0, 3.0), (0.0, 3.0)]
    assert (extents[0].y0, extents[0].y1, extents[1].y1) == pytest.approx((-0.4, 0.0, 0.4))
    tones = [tuple(bar.get_facecolors()[0][:3]) for bar in (upper, lower)]
    assert np.allclose(tones, [colour_of(op, 2) for op in both])
    write_names(axes, Timeline.of(1, [Span(0, Overlap(*both), 2.0, 5.0)]), SECONDS)
    assert [text.get_text() for text in axes.texts[1:]] == ["1", "0"]


@pytest.mark.parametrize(("num_microbatches", "are_named"), [(4, True), (150, False)])
def test_names_are_written_where_there_is_room(num_microbatches: int, are_named: bool) -> None:
    timeline = gpipe(num_microbatches)
    axes = drawn(timeline)
    num_texts = len(axes.texts)
    write_names(axes, timeline, SECONDS)
    assert len(axes.texts) - num_texts == (len(timeline.spans) if are_named else 0)


def test_of_several_stages_the_whole_op_is_written() -> None:
    timeline = gpipe(2, stages_per_rank=2)
    axes = drawn(timeline)
    write_names(axes, timeline, SECONDS)
    assert {str(span.op) for span in timeline.spans} == {text.get_text() for text in axes.texts[2:]}


@pytest.mark.parametrize(
    ("stages_per_rank", "num_microbatches", "said"),
    [
        (1, 3, "a number is a microbatch"),
        (2, 2, "2F0: stage 2, forward, microbatch 0"),
        (2, 12, "microbatch, and beneath it the stage"),
    ],
)
def test_the_names_are_explained(stages_per_rank: int, num_microbatches: int, said: str) -> None:
    timeline = gpipe(num_microbatches, stages_per_rank)
    axes = drawn(timeline)
    write_names(axes, timeline, SECONDS)
    assert axes.get_title(loc="right") == said


def test_a_stage_stands_small_beneath_its_microbatch() -> None:
    timeline = gpipe(8, stages_per_rank=2)
    axes = drawn(timeline)
    num_texts = len(axes.texts)
    write_names(axes, timeline, SECONDS)
    upper, lower = axes.texts[num_texts:][::2], axes.texts[num_texts:][1::2]
    ops = [span.op for rank in range(2) for span in timeline.compute_on(rank)]
    assert [(text.get_text(), below.get_text()) for text, below in zip(upper, lower, strict=True)] == [
        (str(op.microbatch), str(op.stage)) for op in ops
    ]
    assert all(text.xy == below.xy for text, below in zip(upper, lower, strict=True))
    assert all(text.xyann[1] > 0 > below.xyann[1] for text, below in zip(upper, lower, strict=True))
    assert lower[0].get_fontsize() < upper[0].get_fontsize()


@pytest.mark.parametrize(
    ("stages_per_rank", "labels"),
    [
        (1, ["rank 0", "rank 1"]),
        (2, ["rank 0\nstages 0, 2", "rank 1\nstages 1, 3"]),
        (5, ["rank 0", "rank 1"]),
    ],
)
def test_several_stages_of_a_rank_stand_beside_its_lane(stages_per_rank: int, labels: list[str]) -> None:
    axes = drawn(gpipe(2, stages_per_rank))
    assert [label.get_text() for label in axes.get_yticklabels()] == labels


def test_thousands_of_ops_are_an_image_of_their_mixed_colours() -> None:
    spans = [Span(0, Forward(0, 0), at * 1.0, at * 1.0 + 0.5) for at in range(8000)]
    axes = drawn(Timeline.of(1, spans))
    assert len(bars_of(axes)) == 1
    (image,) = axes.images
    middle = np.asarray(image.get_array())[:, 800]
    mixed = [(one + other) / 2 for one, other in zip(colour_of(Forward(0, 0), 1), IDLE, strict=True)]
    assert middle[0] == pytest.approx(mixed, abs=0.02)
    assert (middle[0] == middle[1]).all()
    assert image.get_extent() == pytest.approx((0.0, 7999.5, 0.4, -0.4))


def test_the_legend_shows_what_occurs() -> None:
    overlap = Timeline.of(1, [Span(0, Overlap(Forward(0, 1), WeightGrad(0, 0)), 0.0, 1.0)])
    assert [patch.get_label() for patch in legend_patches(overlap)] == [
        "forward",
        "weight gradient",
        "overlap (both ops)",
        "idle",
    ]
    assert [patch.get_label() for patch in legend_patches(gpipe(1))] == ["forward", "backward", "idle"]


def test_thousands_of_overlaps_show_both_of_their_ops() -> None:
    both = (Forward(0, 0), InputGrad(0, 0))
    axes = drawn(Timeline.of(1, [Span(0, Overlap(*both), at, at + 1.0) for at in range(8000)]))
    middle = np.asarray(axes.images[0].get_array())[:, 800]
    assert np.allclose(middle, [colour_of(op, 1) for op in both])
