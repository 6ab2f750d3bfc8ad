"""The last step of a pipeline as a record: the cut, what each op took and held, bytes over each cut."""

import pytest
import torch

import evenflow
from evenflow.errors import ConfigError
from evenflow.ir.op import ComputeOp, parse_op
from unsplit import mean_square, mlp, regression, sgd


def trained(**options):
    pipe = evenflow.pipeline(
        mlp(4, 8, 8, 1),
        loss=mean_square,
        example=regression(),
        optimizer=sgd,
        num_microbatches=4,
        device="cpu",
        **options,
    )
    pipe.step(regression())
    return pipe


def test_it_is_the_step_that_was_measured():
    pipe = trained(stages=2)
    pipe.step(regression())
    found = pipe.last_step()
    _, measured = pipe.timelines()
    for record, lane in zip(found.measured, measured.lanes, strict=True):
        assert [parse_op(op) for op in record.ops] == list(lane.ops)
        assert record.start_seconds == pytest.approx(lane.start_seconds, abs=1e-7)
        assert record.end_seconds == pytest.approx(lane.end_seconds, abs=1e-7)
    predicted, _ = pipe.timelines()
    assert found.predicted_timeline.makespan_seconds == pytest.approx(predicted.makespan_seconds, abs=1e-6)
    assert found.measured_bills == pipe.bills()[1]
    pipe.close()


def test_the_cut_says_what_is_where_and_what_is_sent():
    pipe = trained(stages=2)
    found = pipe.last_step()
    assert [stage.num_parameters for stage in found.stages] == [each.num_parameters for each in pipe.cut]
    names = [name for stage in found.stages for name in stage.modules]
    assert names[0] == "0"
    assert len(set(names)) == len(names)
    rows, width = 2, 8  # of a microbatch over the cut
    (forward,) = [edge for edge in found.edges if edge.payload == "F"]
    (backward,) = [edge for edge in found.edges if edge.payload == "B"]
    assert (forward.source, forward.target, forward.num_tensors) == (0, 1, 1)
    assert (backward.source, backward.target) == (1, 0)
    assert forward.num_bytes == backward.num_bytes == rows * width * torch.float32.itemsize
    pipe.close()


def test_edges_are_those_of_the_last_step():
    pipe = trained(stages=2)
    before = pipe.last_step().edges[0].num_bytes
    longer = {name: torch.cat([part, part]) for name, part in regression().items()}
    pipe.step(longer)
    assert pipe.last_step().edges[0].num_bytes == 2 * before
    pipe.close()


def test_what_is_held_is_known_once_a_step_was_watched():
    pipe = trained(stages=2, schedule="gpipe")
    assert all(lane.held_bytes == () for lane in pipe.last_step().measured)
    _, peak = pipe.meter.peak_bytes(lambda: pipe.step(regression()))
    pipe.step(regression())
    for lane in pipe.last_step().measured:
        assert len(lane.held_bytes) == len(lane.ops)
        assert 0 < max(lane.held_bytes) <= peak
        computes = [at for at, op in enumerate(lane.ops) if isinstance(parse_op(op), ComputeOp)]
        forwards = [lane.held_bytes[at] for at in computes[:4]]
        assert forwards == sorted(forwards)  # GPipe holds more with each forward
        assert forwards[0] < forwards[-1] > lane.held_bytes[computes[-1]] - 4 * 8 * 8 * 4
    pipe.close()


def test_before_the_first_step_there_is_none():
    pipe = evenflow.pipeline(mlp(4, 8, 1), loss=mean_square, example=regression(), stages=1, device="cpu")
    with pytest.raises(ConfigError, match="no step has run yet"):
        pipe.last_step()
    pipe.close()
