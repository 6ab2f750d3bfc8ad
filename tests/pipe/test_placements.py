"""Several stages on a rank: where they live, what runs on them besides training, and what is refused."""

import re

import pytest
import torch
from torch import distributed as dist
from torch import nn

import evenflow
from evenflow.errors import ConfigError, ScheduleError
from evenflow.ir import Backward, Forward, InputGrad, Overlap, Placement, Schedule, Span, WeightGrad
from evenflow.pipe.given import cuts, places
from evenflow.pipe.times.times import costs_of
from evenflow.runtime.ranks.mesh import mesh_of
from evenflow.runtime.ranks.world import SingleProcess
from evenflow.schedules import catalog
from evenflow.schedules.gpipe import gpipe
from own_schedules import OWN
from unsplit import mean_square, mlp, regression, sgd

V = OWN["v, split"]


def build() -> nn.Sequential:
    """With a buffer that training changes, on a stage in the middle."""
    model = mlp(4, 8, 8, 8, 1)
    return nn.Sequential(*model[:3], nn.BatchNorm1d(8), *model[3:])


def make(model=None, **options):
    options = {
        "loss": mean_square,
        "example": regression(),
        "num_microbatches": 2,
        "optimizer": sgd,
        "schedule": V,
        "stages_per_rank": 2,
        "stages": 4,
        "max_leaf_share": 0,
    } | options
    return evenflow.pipeline(build() if model is None else model, **options)


# -- where stages live


def test_a_v_goes_down_the_ranks_and_back_up():
    assert [(stage.stage, stage.rank) for stage in make().cut] == [(0, 0), (1, 1), (2, 1), (3, 0)]


def test_a_schedule_of_the_catalog_brings_its_number_of_stages():
    assert [stage.rank for stage in make(schedule="interleaved-1f1b", stages_per_rank=None).cut] == [0, 1] * 2
    assert [stage.rank for stage in make(schedule="1f1b", stages_per_rank=None).cut] == [0, 1, 2, 3]
    assert len(make(schedule="interleaved-1f1b", stages=None, stages_per_rank=None).cut) == 2


def test_each_rank_is_one_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    devices = places.devices_of("cuda", Placement.v_shape(3), mesh_of(SingleProcess(), None))
    assert [device.index for device in devices] == [0, 1, 0, 0, 1, 0]
    assert cuts.stage_count(None, None, mesh_of(SingleProcess(), None), "cuda", stages_per_rank=2) == 4


def test_up_to_four_microbatches_for_each_rank():
    pipe = make(num_microbatches=None, example=regression(64))
    pipe.step(regression(64))
    predicted, _ = pipe.timelines()
    assert sum(str(span.op).startswith("0F") for span in predicted.spans) == 8


# -- evaluation


@pytest.mark.parametrize("schedule", OWN)
def test_evaluation_and_prediction_run_where_training_does(schedule):
    own = OWN[schedule]
    model, alone = build(), build()
    pipe = make(model, stages=2 * own.stages_per_rank, stages_per_rank=own.stages_per_rank, schedule=own)
    one = make(alone, stages=1, stages_per_rank=1, schedule="1f1b")
    for trained in (pipe, one):
        trained.step(regression())
    assert torch.equal(pipe.evaluate(regression()).loss, one.evaluate(regression()).loss)
    found = pipe.predict(regression(), lambda model, batch: model(batch["x"]))
    with torch.no_grad():
        assert torch.allclose(found, alone.eval()(regression()["x"]))
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(model.buffers(), alone.buffers(), strict=True)
    )


# -- times


TRAINABLE = [name for name in catalog.NAMES if name != "forward-only"]


@pytest.mark.parametrize("schedule", [*TRAINABLE, *OWN])
def test_every_schedule_has_a_prediction(schedule):
    own = OWN.get(schedule)
    on_each = own.stages_per_rank if own else catalog.default_stages_per_rank(schedule)
    pipe = make(stages=2 * on_each, stages_per_rank=on_each, schedule=own or schedule, num_microbatches=4)
    for _ in range(2):
        pipe.step(regression())
    predicted, measured = pipe.timelines()
    ops = [sorted(str(span.op) for span in line.spans if span.is_compute) for line in (predicted, measured)]
    assert ops[0] == ops[1]
    assert predicted.num_ranks == measured.num_ranks == 2
    assert 0 < predicted.makespan_seconds < 100 * measured.makespan_seconds


def test_costs_are_medians_of_what_ran():
    spans = []
    now = 0.0
    for op, seconds in [
        *((Forward(0, at), seconds) for at, seconds in enumerate((1.0, 3.0, 2.0))),
        *((Backward(0, at), seconds) for at, seconds in enumerate((4.0, 4.0, 7.0))),
        (InputGrad(1, 0), 1.0),
        (WeightGrad(1, 0), 3.0),
        (InputGrad(1, 1), 1.0),
        (WeightGrad(1, 1), 3.0),
        (Backward(1, 2), 1.0),  # a third of the backwards takes a quarter of the time of the others
    ]:
        spans.append(Span(0, op, now, now + seconds))
        now += seconds
    costs = costs_of(3, spans)
    assert costs.forward_seconds == (2.0, 0.0, 0.0)
    assert costs.input_grad_seconds == (4.0, 0.75, 0.0)
    assert costs.weight_grad_seconds == (0.0, 2.25, 0.0)


def test_overlaps_are_priced_by_their_parts():
    pipe = make(schedule=OWN["v, mixed, overlapping"])
    pipe.step(regression())
    _, measured = pipe.timelines()
    assert any(isinstance(span.op, Overlap) for span in measured.spans)
    parts = [part for step in pipe._times._steps for log in step.logs for part in log.parts()]
    assert len(parts) > len(measured.lanes[0].ops)
    assert all(not isinstance(part.op, Overlap) for part in parts)


# -- what is refused


def refused(text: str, kind: type[Exception] = ConfigError):
    return pytest.raises(kind, match=f"^{re.escape(text)}")


def test_stages_that_cannot_be_dealt_out():
    with refused(
        "5 stages cannot be dealt out 2 to each rank; the nearest that can: 4 and 6 "
        "(or give stages_per_rank=)"
    ):
        make(stages=5)
    with refused("1 stages cannot be dealt out 2 to each rank; the nearest that can: 2 (or give"):
        make(stages=1, schedule="interleaved-1f1b", stages_per_rank=None)
    with refused("3 stages cannot be dealt out 2 to each rank"):
        make(stages=None, split=["2", "4"])


def test_stages_per_rank_of_the_wrong_kind():
    with refused("stages_per_rank=1.5 must be a whole number"):
        make(stages_per_rank=1.5)
    with refused("stages_per_rank=0 must be at least 1"):
        make(stages_per_rank=0)


SIZES = "with num_ranks=2, stages_per_rank=2, num_microbatches=2"


def test_a_function_that_fails():
    def broken(num_ranks, stages_per_rank, num_microbatches):
        return {}["queue"]

    with refused(f"schedule=broken {SIZES} raised KeyError: 'queue'") as caught:
        make(schedule=broken)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_function_of_other_arguments():
    def other(ranks, microbatches):
        raise AssertionError("never called")

    with refused(f"schedule=other {SIZES} raised TypeError: "):
        make(schedule=other)


def test_a_function_that_returns_no_schedule():
    def nothing(num_ranks, stages_per_rank, num_microbatches):
        return None

    with refused(f"schedule=nothing {SIZES} returned a NoneType; it must return an evenflow.ir.Schedule"):
        make(schedule=nothing)


def test_a_schedule_of_other_sizes():
    def narrow(num_ranks, stages_per_rank, num_microbatches):
        return gpipe(num_ranks, 1, num_microbatches + 1)

    with refused(
        f"schedule=narrow {SIZES} placed 2 stages on 2 ranks; it must place 4 on 2; "
        "returned a schedule of 3 microbatches"
    ):
        make(schedule=narrow)


def test_a_function_is_asked_once_for_each_number_of_microbatches():
    asked = []

    def counting(num_ranks, stages_per_rank, num_microbatches):
        asked.append(num_microbatches)
        return V(num_ranks, stages_per_rank, num_microbatches)

    pipe = make(schedule=counting, num_microbatches=None, microbatch_size=4)
    for size in (8, 12, 8, 12):
        pipe.step(regression(size))
    assert asked == [2, 3]


def test_a_schedule_that_moves_its_stages():
    def moving(num_ranks, stages_per_rank, num_microbatches):
        made = V(num_ranks, stages_per_rank, num_microbatches)
        return made if num_microbatches == 2 else OWN["upside down"](2, 2, num_microbatches)

    pipe = make(schedule=moving, num_microbatches=None, microbatch_size=4)
    pipe.step(regression())
    before = [parameter.clone() for _, parameter in pipe.named_parameters()]
    with refused(
        "schedule=moving with num_ranks=2, stages_per_rank=2, num_microbatches=3 placed the stages on ranks "
        "(1, 0, 1, 0), and before, for other microbatches, on (0, 1, 1, 0); a stage cannot move"
    ):
        pipe.step(regression(12))
    after = [parameter for _, parameter in pipe.named_parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_wrong_schedule_is_refused_before_anything_runs():
    def torn(num_ranks, stages_per_rank, num_microbatches):
        made = V(num_ranks, stages_per_rank, num_microbatches)
        return Schedule("torn", made.placement, num_microbatches, (made.ranks[0][1:], made.ranks[1][:-1]))

    with refused("schedule 'torn' has 2 faults:\n  - 0F0 is missing: rank 0 must run it", ScheduleError):
        make(schedule=torn)


def test_a_schedule_that_stands_still():
    def backwards_first(num_ranks, stages_per_rank, num_microbatches):
        made = V(num_ranks, stages_per_rank, num_microbatches)
        return Schedule(
            "standing", made.placement, num_microbatches, (made.ranks[0][::-1], made.ranks[1][::-1])
        )

    with refused("schedule 'standing' has 2 faults:\n  - standstill: rank 0 stands before", ScheduleError):
        make(schedule=backwards_first)


# -- on processes


def on_two_ranks():
    """A V on two processes: what each owns, is fed, evaluates and predicts; and what is refused."""
    dist.init_process_group("gloo")
    first = dist.get_rank() == 0
    model = build()
    pipe = make(model, stages=None)
    losses = [float(pipe.step(batch).loss) for batch in pipe.feed([regression()] * 2 if first else [])]
    evaluated = float(pipe.evaluate(regression()).loss)
    predicted = pipe.predict(regression(), lambda model, batch: model(batch["x"]))
    lines = [sorted(str(span.op) for span in line.spans if span.is_compute) for line in pipe.timelines()]
    here = [name for name, _ in pipe.named_parameters()]
    elsewhere = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    text = ""
    try:
        make(stages=6)
    except ConfigError as error:
        text = str(error)

    def other_on_each(num_ranks, stages_per_rank, num_microbatches):
        own = OWN["v, split"] if first else OWN["v, split, overlapping"]
        return own(num_ranks, stages_per_rank, num_microbatches)

    unlike = ""
    try:
        make(stages=None, schedule=other_on_each)
    except ConfigError as error:
        unlike = str(error)
    return losses, evaluated, predicted, lines, here, elsewhere, sorted(pipe._parts.buffers), text, unlike


def test_a_v_on_two_processes():
    ranks = evenflow.launch(on_two_ranks, nproc=2)
    alone = build()
    one = make(alone, stages=1, stages_per_rank=1, schedule="1f1b")
    losses = [float(one.step(regression()).loss) for _ in range(2)]
    evaluated = float(one.evaluate(regression()).loss)
    names = [name for name, _ in alone.named_parameters()]
    for found in ranks:
        assert found[0] == losses
        assert found[1] == evaluated
        assert torch.equal(found[2], ranks[0][2])
        assert found[3][0] == found[3][1]
        assert sorted(found[4] + found[5]) == sorted(names)
        assert found[7] == (
            "6 stages, 2 on each rank, need 3 processes, but 2 are running; start with torchrun "
            "--nproc-per-node 3, or ask for stages=4"
        )
        assert "ranks 0 and 1 recorded different programs" in found[8]
    assert names[0] in ranks[0][4], "the first stage"
    assert names[-1] in ranks[0][4], "and the last are on the first rank"
    assert sorted(ranks[0][4] + ranks[1][4]) == sorted(names)
    assert sorted(ranks[0][6] + ranks[1][6]) == sorted(name for name, _ in alone.named_buffers())
