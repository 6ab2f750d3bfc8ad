"""Span and makespan are two measures, and transfers count in neither."""

import pytest

from evenflow.errors import ConfigError
from evenflow.ir import Backward, Forward, Payload, Recv, Span, Timeline

TIMELINE = Timeline.of(
    2,
    (
        Span(0, Forward(0, 0), 1.0, 2.0),
        Span(1, Recv(0, 1, 0, Payload.ACTIVATION), 0.0, 2.0),
        Span(1, Forward(1, 0), 2.0, 3.0),
        Span(1, Backward(1, 0), 3.0, 5.0),
        Span(0, Backward(0, 0), 6.0, 9.0),
    ),
)


def test_makespan_is_of_all_ranks_and_span_of_the_longest() -> None:
    assert TIMELINE.makespan_seconds == 8.0
    assert TIMELINE.span_seconds == 8.0
    later = Timeline.of(2, (Span(0, Forward(0, 0), 0.0, 1.0), Span(1, Forward(1, 0), 1.0, 3.0)))
    assert (later.makespan_seconds, later.span_seconds) == (3.0, 2.0)


def test_only_compute_is_busy() -> None:
    assert [TIMELINE.busy_seconds(rank) for rank in range(2)] == [4.0, 3.0]
    assert TIMELINE.bubble == 1 - 3.5 / 8.0


def test_an_empty_timeline_idles_not() -> None:
    assert (Timeline.of(1, ()).makespan_seconds, Timeline.of(1, ()).bubble) == (0.0, 0.0)


def test_median_is_of_one_kind_and_stage() -> None:
    assert TIMELINE.median_seconds(Backward, stage=0) == 3.0
    with pytest.raises(ConfigError, match="no Forward of stage 7"):
        TIMELINE.median_seconds(Forward, stage=7)
