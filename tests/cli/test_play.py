"""The playground: what it answers, and, in a real browser, that moving a lever draws another step."""

import http.client
import json
import threading

import pytest

from browser import window
from evenflow.cli.main import main
from evenflow.cli.play import address_of, serving
from evenflow.cli.played import Question, answer
from evenflow.errors import ConfigError
from evenflow.ir.costs import Costs
from evenflow.ir.flow import Flow
from evenflow.schedules.one_f_one_b import one_f_one_b
from evenflow.simulate import simulate


@pytest.fixture
def server():
    served = serving(0)
    thread = threading.Thread(target=served.serve_forever, args=(0.02,))
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


def question(**changed):
    given = {
        "schedule": "1f1b",
        "num_ranks": 2,
        "num_microbatches": 4,
        "stages_per_rank": None,
        "forward_seconds": [1.0],
        "input_grad_seconds": [1.0],
        "weight_grad_seconds": [1.0],
        "transfer_seconds": 0.0,
        "cap": None,
    }
    return given | changed


def asked(server, body, *, path="/simulate", kind="application/json", host=None, method="POST", length=None):
    """(status, what came back) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    try:
        headers = {"Content-Type": kind, "Host": host or f"127.0.0.1:{server.server_address[1]}"}
        if length is not None:
            headers["Content-Length"] = length.encode("utf-8")
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def test_it_answers_what_the_simulator_says(server):
    status, text = asked(server, json.dumps(question(transfer_seconds=0.25)))
    assert status == 200
    found = json.loads(text)
    costs = Costs.uniform(2, latency_seconds=0.25)
    timeline = simulate(one_f_one_b(2, 1, 4), Flow.chain(2), costs)
    assert found["makespan"] == timeline.makespan_seconds
    assert found["bubble"] == timeline.bubble
    assert found["peaks"] == [2.0, 1.0]
    assert "so optimal" in found["bounds"] or "within" in found["bounds"]
    assert found["command"] == "evenflow schedule 1f1b --ranks 2 --microbatches 4 --costs 1,1,1,0.25"
    lane = found["timeline"]["ranks"][1]["predicted"]
    assert lane["ops"] == [str(op) for op in timeline.lanes[1].ops]
    assert lane["end"] == pytest.approx(timeline.lanes[1].end_seconds)


def test_each_rank_has_its_own_costs():
    slow = Question("1f1b", 2, 4, None, (1.0, 2.0), (1.0, 2.0), (1.0, 2.0), 0.0, None)
    found = answer(slow)
    assert found["makespan"] == 27.0  # four microbatches of 6 s on the slow rank, after 1 s and before 2 s
    assert found["command"] == ""


def test_over_the_cap_says_who():
    found = answer(Question("gpipe", 2, 4, None, (1.0,), (1.0,), (1.0,), 0.0, 2.0))
    assert found["faults"][0].startswith("rank 0 holds 3")
    assert found["bounds"] == ""
    assert found["timeline"]["ranks"][0]["cap"] == 2.0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_ranks": 0}, "num_ranks = 0 must be at least 1"),
        ({"num_ranks": None}, "num_ranks = None must be a whole number"),
        (
            {"num_ranks": 64, "num_microbatches": 4096},
            "are up to 786,432 ops, and the playground draws 60,000",
        ),
        ({"forward_seconds": [1.0, 2.0, 3.0]}, "forward_seconds has 3 numbers: give one for all ranks"),
        ({"forward_seconds": [-1.0]}, r"forward_seconds[0] = -1.0 must be at least 0"),
        ({"schedule": "1f2b"}, "no schedule '1f2b'; did you mean '1f1b'?"),
        ({"schedule": "zb-v", "stages_per_rank": 3}, "stages"),
        ({"cap": "much"}, "cap = 'much' must be a number"),
        ({"cap": 0}, "cap = 0 must be above 0"),
        ({"num_ranks": 129, "num_microbatches": 1}, "num_ranks = 129: the playground draws 128 at most"),
        ({"what": 1}, "unknown key 'what'"),
    ],
)
def test_a_question_that_cannot_be_answered_is_told_why(server, changed, message):
    status, text = asked(server, json.dumps(question(**changed)))
    assert status == 200
    assert message in json.loads(text)["error"]


@pytest.mark.parametrize("body", ["", "{", "[]", "\xff", "null"])
def test_what_is_no_question_is_told(server, body):
    status, text = asked(server, body.encode("latin-1"))
    assert status == 200
    assert json.loads(text)["error"]


def test_others_are_not_served(server):
    assert asked(server, "{}", host="evil.example:80")[0] == 403
    assert asked(server, None, host="evil.example", method="GET", path="/")[0] == 403
    assert asked(server, "{}", kind="text/plain")[0] == 404  # what a page of another site may send unasked
    assert asked(server, None, path="/../etc/passwd", method="GET")[0] == 404
    assert asked(server, "x" * 70_000)[0] == 400
    for length in ("9" * 5000, "-1", "many", "²"):
        assert asked(server, "{}", length=length)[0] == 400
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:80", "LOCALHOST:1234", "localhost"])
def test_this_machine_is_served_by_any_of_its_names(server, host):
    assert asked(server, json.dumps(question()), host=host)[0] == 200


def test_the_command_shows_the_same():
    found = answer(Question("1f1b", 2, 4, None, (1.23456789,), (1.0,), (1.0,), 0.0, 2.5))
    assert (
        found["command"]
        == "evenflow schedule 1f1b --ranks 2 --microbatches 4 --costs 1.23456789,1,1,0 --cap 2.5"
    )


def test_a_port_that_is_taken_is_refused(server, capsys):
    with pytest.raises(ConfigError, match="name another one, or 0"):
        serving(server.server_address[1])
    with pytest.raises(SystemExit) as exited:
        main(["play", "--port", "70000", "--no-open"])
    assert exited.value.code == 2
    assert "--port 70000: there are 1 to 65535" in capsys.readouterr().err


def test_levers_draw_another_step(server):
    with window() as opened:
        page = opened.page
        page.goto(address_of(server))

        def settled():
            page.wait_for_function("document.body.dataset.answered === document.body.dataset.asked")
            canvas = page.locator(".lanes canvas")
            return page.inner_text("#figures"), canvas.evaluate("canvas => canvas.toDataURL()")

        def change(name, value):
            before = page.evaluate("document.body.dataset.asked")
            page.fill(f"[name={name}]", value)
            page.wait_for_function("before => document.body.dataset.asked !== before", arg=before)
            return settled()

        page.wait_for_function("document.body.dataset.answered")
        free = settled()
        capped = change("cap", "2")
        assert capped != free
        assert capped[1] != free[1]  # the timeline is another one
        assert "8, 8, 8, 8" in free[0]
        assert "2, 2, 1, 1" in capped[0]
        assert "--cap 2" in page.inner_text("#command")
        said = opened.hover(0.5, lane=0)
        assert "0F0 predicted, rank 0" in said
        assert "1 s, from 0 s to 1 s" in said
        page.select_option("[name=schedule]", "gpipe")
        page.wait_for_function("document.getElementById('command').textContent.includes('gpipe')")
        settled()
        assert "over its cap of 2" in page.inner_text("#error")
        change("cap", "2,5")
        assert "cap = '2,5' must be a number" in page.inner_text("#error")
        change("cap", "2")
        slower = change("forward", "1, 1, 3, 1")
        assert page.inner_text("#command") == ""
        assert slower[1] != capped[1]
        change("num_ranks", "0")
        assert "num_ranks = 0 must be at least 1" in page.inner_text("#error")
        assert opened.faults == []
        assert all(url.startswith((address_of(server), "data:")) for url in opened.requests)
