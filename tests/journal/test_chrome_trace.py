"""The trace of a step: the events that Perfetto reads, with the step's own times, sizes and names."""

import dataclasses
import json

from evenflow.journal.chrome_trace import chrome_trace
from evenflow.journal.last_step import LaneRecord
from small_runs import LAST_STEP


def events(last_step=LAST_STEP):
    return json.loads(chrome_trace(last_step))["traceEvents"]


def test_every_op_is_an_event_of_its_rank():
    found = [event for event in events() if event["ph"] == "X" and event["cat"] != "wait"]
    for process, lanes in ((1, LAST_STEP.measured), (2, LAST_STEP.predicted)):
        for rank, lane in enumerate(lanes):
            mine = [event for event in found if (event["pid"], event["tid"]) == (process, rank)]
            assert [event["name"] for event in mine] == list(lane.ops)
            assert [event["ts"] for event in mine] == [round(1e6 * each, 3) for each in lane.start_seconds]
            for event, start, end in zip(mine, lane.start_seconds, lane.end_seconds, strict=True):
                assert abs(event["dur"] - 1e6 * (end - start)) < 0.002


def test_waits_transfers_and_memory_carry_their_numbers():
    found = events()
    waits = [event for event in found if event.get("cat") == "wait"]
    lane = LAST_STEP.measured[1]
    assert next(event["name"] for event in waits if event["tid"] == 1) == "wait for 1F0"
    assert waits[0]["dur"] > 0
    assert all(event["pid"] == 1 for event in waits)
    sent = next(event for event in found if event.get("name") == "S0>1F2")
    assert sent["cat"] == "transfer"
    assert sent["args"] == {"from": 0, "to": 1, "microbatch": 2, "bytes": 4096}
    forward = next(event for event in found if event.get("name") == "1F3")
    assert forward["args"] == {"stage": 1, "microbatch": 3}
    held = [event["args"]["bytes"] for event in found if event["ph"] == "C" and event["tid"] == 1]
    assert held == list(lane.held_bytes)


def test_nothing_is_before_zero_which_perfetto_would_drop():
    early = LaneRecord(("R0>1F0", "1F0"), (-0.002, -0.001), (-0.002, 0.0), (-0.001, 0.01))
    found = events(dataclasses.replace(LAST_STEP, measured=(LAST_STEP.measured[0], early)))
    times = {
        event["name"]: event["ts"]
        for event in found
        if event.get("tid") == 1 and event["pid"] == 1 and "ts" in event
    }
    assert min(event["ts"] for event in found if "ts" in event) == 0
    assert times["R0>1F0"] == 0
    assert times["1F0"] == 2000


def test_a_step_in_which_no_rank_did_anything_is_a_trace_too():
    idle = LaneRecord((), (), (), ())
    found = events(dataclasses.replace(LAST_STEP, measured=(idle, idle)))
    assert {event["pid"] for event in found if event["ph"] == "X"} == {2}


def test_ranks_and_processes_are_named():
    names = [event["args"]["name"] for event in events() if event["ph"] == "M"]
    assert names == ["measured", "rank 0", "rank 1", "predicted", "rank 0", "rank 1"]


def test_each_kind_of_op_has_its_arguments():
    ops = ("0F0&1B0", "S0>1F0&R1>0B0", "H0>1F0", "G1", "U0", "0I0", "0W0")
    times = tuple(float(at) for at in range(len(ops)))
    lane = LaneRecord(ops, times, times, tuple(each + 1 for each in times))
    found = {event["name"]: event for event in events(dataclasses.replace(LAST_STEP, measured=(lane, lane)))}
    assert found["0F0&1B0"]["args"]["1B0"] == {"stage": 1, "microbatch": 0}
    assert found["S0>1F0&R1>0B0"]["args"]["R1>0B0"]["bytes"] == 4096
    assert found["G1"]["args"] == {"stage": 1}
    assert [found[op]["cat"] for op in ops] == [
        "Overlap",
        "transfer",
        "transfer",
        "collective",
        "collective",
        "InputGrad",
        "WeightGrad",
    ]


def test_a_step_without_ops_is_a_trace_without_them():
    idle = LaneRecord((), (), (), ())
    found = events(dataclasses.replace(LAST_STEP, measured=(idle, idle), predicted=(idle, idle)))
    assert {event["ph"] for event in found} == {"M"}
