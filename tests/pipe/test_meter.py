"""The meter: seconds by stage and kind, and peaks of memory that can be counted by hand."""

from pathlib import Path

import pytest
import torch
from torch import nn

import evenflow
from evenflow.cost.storages import Made
from evenflow.errors import ConfigError
from evenflow.ir.op import Backward, Forward, InputGrad, WeightGrad
from forked import launched
from unsplit import mean_square, mlp, regression

WIDTH = 64
MATRIX = WIDTH * WIDTH * 4  # bytes


def adam(parameters):
    return torch.optim.AdamW(parameters, foreach=False)


def make(**options):
    torch.manual_seed(0)
    options = {"loss": mean_square, "example": regression(), "device": "cpu", "optimizer": adam} | options
    return evenflow.pipeline(options.pop("model", None) or mlp(4, 8, 8, 1), **options)


@pytest.mark.parametrize(("schedule", "kinds"), [("gpipe", {Backward}), ("zb-h1", {InputGrad, WeightGrad})])
def test_times_are_told_by_stage_and_kind(schedule, kinds):
    pipe = make(stages=2, num_microbatches=4, schedule=schedule)
    with pytest.raises(ConfigError, match="no step has run yet"):
        pipe.meter.times(1)
    for _ in range(4):
        pipe.step(regression())
    measured = pipe.meter.times(3)
    assert len(measured.timelines) == 3
    for stage in range(2):
        for kind in (Forward, Backward, InputGrad, WeightGrad):
            told = measured.seconds(kind, stage)
            assert (told is not None and told > 0) == (kind in {Forward, *kinds})
    last = pipe.timelines()[1]
    assert measured.timelines[-1] == last
    assert pipe.meter.times(1).seconds(Forward, 1) == pytest.approx(
        last.median_seconds(Forward, stage=1), abs=1e-4
    )
    assert len(pipe.meter.times(99).timelines) == 4
    # One process takes turns: the simulated step is all of its ops, one after the other.
    ops = [measured.seconds(kind, stage) for stage in range(2) for kind in (Forward, *kinds)]
    assert measured.simulated.makespan_seconds == pytest.approx(4 * sum(ops))


def linear_pipe():
    return make(
        model=nn.Linear(WIDTH, WIDTH, bias=False),
        loss=lambda model, batch: model(batch).sum(),
        example=torch.ones(2, WIDTH),
        stages=1,
        num_microbatches=1,
    )


def test_a_step_peaks_at_parameters_gradients_states_and_what_the_update_makes():
    pipe = linear_pipe()
    batch = torch.ones(2, WIDTH)
    pipe.step(batch)
    result, peak = pipe.meter.peak_bytes(lambda: pipe.step(batch))
    # The matrix, its gradient, two states, AdamW's two temporaries; activations are small.
    assert 6 * MATRIX <= peak < 6.1 * MATRIX
    assert torch.isfinite(result.loss)


def test_what_is_there_before_counts_while_it_is_there():
    pipe = linear_pipe()
    batch = torch.ones(2, WIDTH)
    assert MATRIX <= pipe.meter.peak_bytes(lambda: None)[1] < 1.1 * MATRIX
    pipe.step(batch)
    assert 4 * MATRIX <= pipe.meter.peak_bytes(lambda: None)[1] < 4.1 * MATRIX  # gradients and states too


def test_watching_changes_no_number():
    plain, watched = make(stages=2, num_microbatches=2), make(stages=2, num_microbatches=2)
    for _ in range(2):
        plain.step(regression())
        watched.meter.peak_bytes(lambda: watched.step(regression()))
    parameters = dict(watched.named_parameters())
    assert all(torch.equal(each, parameters[name]) for name, each in plain.named_parameters())


def test_a_peak_is_seen_though_memory_goes_and_comes():
    with Made(torch.device("cpu")) as made:
        held = [torch.ones(256)]
        for size in (512, 256, 1024, 128):
            held.append(torch.ones(size))  # dropped at once
            held.pop()
        held.append(torch.ones(256))
    assert made.peak_bytes == 4 * (256 + 1024)
    assert sum(memory.num_bytes for memory in made.alive()) == 4 * 512


def test_memory_that_a_tensor_is_handed_counts():
    """As what a link takes from memory that another process filled."""
    shared = bytearray(1024)
    with Made(torch.device("cpu")) as made:
        handed = torch.empty(0).set_(torch.frombuffer(shared, dtype=torch.float32).untyped_storage())
    assert (made.peak_bytes, handed.numel()) == (1024, 256)


def on_each_rank(folder):
    pipe = make(model=mlp(4, 64, 64, 1), stages=2, num_microbatches=2)
    for _ in range(3):
        pipe.step(regression())
    peak = pipe.meter.peak_bytes(lambda: pipe.step(regression()))[1]
    measured = pipe.meter.times(2)
    held = sum(parameter.numel() for _, parameter in pipe.named_parameters())
    return pipe.meter.gather((Path(folder).name, peak, held)), measured


def test_every_rank_knows_what_all_took(tmp_path):
    (first, measured), (second, again) = launched(on_each_rank, str(tmp_path), nproc=2)
    assert first == second
    assert [name for name, _, _ in first] == [tmp_path.name] * 2
    for _, peak, held in first:
        assert peak >= 4 * 4 * held  # each rank its own parameters, gradients and two states
    assert measured == again
    assert measured.seconds(Forward, 0) > 0
    assert measured.seconds(Backward, 1) > 0
    assert measured.timelines[0].num_ranks == 2
    # Simulated as two processes, whose forwards and backwards overlap.
    work = sum(
        seconds
        for stage in range(2)
        for seconds in (measured.op_seconds[kind, stage] for kind in (Forward, Backward))
    )
    assert measured.simulated.makespan_seconds < 2 * work
