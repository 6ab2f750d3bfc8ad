"""The page of a run, in a real browser: what it shows, what it says of an op, how it moves."""

import dataclasses
import re

import pytest

from browser import Window, window
from evenflow.journal.page import run_page
from small_runs import LAST_STEP, PLAN, RUN, STEPS


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(run_page(RUN, STEPS, LAST_STEP, PLAN), encoding="utf-8")
    with window() as opened:
        opened.page.goto(path.as_uri())
        yield opened


@pytest.fixture
def whole(shown):
    """The page, with all of the step in view."""
    shown.page.get_by_role("button", name="all").click()
    yield shown
    assert shown.faults == []
    assert all(url.startswith(("file:", "data:")) for url in shown.requests)


def test_it_tells_of_the_run(whole):
    text = whole.page.inner_text("body")
    for part in (
        "mine",
        "2 × CPU",
        "1f1b",
        "2 stages on 2 ranks",
        "embed, h.0",
        "4.000 KiB in 1 to 1",
        "4.000 KiB in 1 to 0 (gradients)",
        "10.00 ms",  # a stage's forward
        "200.0 ms",  # a step
        "waiting that the schedule asks for even of equal stages",
        "held, at most: rank 0: 1.953 KiB of 2.441 KiB",
    ):
        assert part in text
    rows = [row.split("\t") for row in whole.page.inner_text("#beside").splitlines()]
    assert ["step", "160.0 ms", "200.0 ms", "+25.0 %"] in rows
    assert ["stage 0, backward", "20.00 ms", "26.00 ms", "+30.0 %"] in rows
    assert whole.page.locator("#bill .row").count() == 4
    assert whole.page.locator("#curves canvas").count() == 2


def test_an_op_under_the_pointer_tells_its_numbers(whole):
    lane = LAST_STEP.measured[0]
    at = lane.ops.index("0F1")
    said = whole.hover((lane.start_seconds[at] + lane.end_seconds[at]) / 2, lane=0)
    assert "0F1 measured, rank 0" in said
    assert "forward of stage 0, microbatch 1" in said
    assert "14.00 ms, from 15.00 ms to 29.00 ms" in said
    assert "predicted: 10.00 ms" in said
    assert f"{lane.held_bytes[at] / 1024:.3f} KiB held after it" in said


def test_a_prediction_and_a_transfer_tell_theirs(whole):
    lane = LAST_STEP.predicted[1]
    said = whole.hover((lane.start_seconds[0] + lane.end_seconds[0]) / 2, lane=3)
    assert "1F0 predicted, rank 1" in said
    assert "10.00 ms, from 10.00 ms to 20.00 ms" in said
    lane = LAST_STEP.measured[0]
    at = lane.ops.index("S0>1F0")
    moment = (lane.start_seconds[at] + lane.end_seconds[at]) / 2
    said = whole.hover(moment, lane=0)
    assert "sends the activation from stage 0 to 1, microbatch 0" in said
    assert "4.000 KiB" in said


def test_where_nothing_is_nothing_is_said(whole):
    assert "stage" in whole.hover(0.005, lane=0)
    whole.page.mouse.move(5, 5)
    assert not whole.page.locator(".tip").is_visible()


def test_it_is_dragged_and_zoomed(whole):
    page = whole.page
    before = page.evaluate("drawn.view")
    page.locator('button[data-by="0.5"]').first.click()
    zoomed = page.evaluate("drawn.view")
    assert zoomed[1] - zoomed[0] == pytest.approx((before[1] - before[0]) / 2)
    x, y = whole.over_lane(sum(zoomed) / 2, 0)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 200, y, steps=4)
    page.mouse.up()
    dragged = page.evaluate("drawn.view")
    assert dragged[0] > zoomed[0]
    assert dragged[1] - dragged[0] == pytest.approx(zoomed[1] - zoomed[0])
    page.keyboard.down("Control")
    page.mouse.wheel(0, -200)
    page.keyboard.up("Control")
    page.wait_for_function("wide => drawn.view[1] - drawn.view[0] < wide", arg=zoomed[1] - zoomed[0])
    page.mouse.dblclick(x, y)
    assert page.evaluate("drawn.view") == pytest.approx(page.evaluate("drawn.extent"), abs=0.01)


def test_what_a_stranger_has_named_is_text(shown, tmp_path):
    evil = (
        "</script><script>document.title = 'caught'</script><img src=x onerror=\"document.title='caught'\">"
    )
    run = dataclasses.replace(RUN, name=evil, item=evil)
    stages = [dataclasses.replace(stage, modules=(evil, "${data}")) for stage in LAST_STEP.stages]
    last_step = dataclasses.replace(LAST_STEP, stages=tuple(stages))
    (tmp_path / "page.html").write_text(run_page(run, STEPS, last_step, None), encoding="utf-8")
    opened = Window(shown.page.context.browser.new_page())
    opened.page.goto((tmp_path / "page.html").as_uri())
    assert opened.page.inner_text("h1") == evil
    assert opened.page.title() == f"{evil} · Evenflow"
    assert opened.page.locator("img").count() == 0
    assert not opened.page.locator("#beside-title").is_visible()  # there is no plan
    assert opened.faults == []


def test_it_names_nothing_of_a_network():
    page = run_page(RUN, STEPS, LAST_STEP, PLAN)
    named = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'>]*)""", page.partition("<script>")[0])
    assert named == ["data:,"]
    assert "import(" not in page
    assert "MIT license" in page
