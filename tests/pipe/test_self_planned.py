"""Runs that plan themselves: what is measured, what is given, and that the numbers stay the same."""

import logging
import re
from functools import cache

import pytest
import torch
from torch import distributed as dist

import evenflow
from evenflow.cost.cache import user_folder
from evenflow.cost.optimizer import optimizer_cost
from evenflow.errors import ConfigError, RecordError
from evenflow.ir.placement import Placement
from evenflow.pipe.building import auto
from evenflow.pipe.building.measured import Run, measured_request
from evenflow.pipe.building.probe import probe
from evenflow.pipe.given.places import world_of
from evenflow.plan.costs.overheads import Overheads, as_run
from evenflow.plan.costs.stages import StageCost
from evenflow.plan.costs.traffic import Traffic
from evenflow.runtime.links.choose import link_for
from evenflow.runtime.ranks.world import SingleProcess
from evenflow.runtime.recorded.microbatch import Microbatches
from unsplit import mean_square, mlp, regression, sgd

CPU = torch.device("cpu")


def make(**options):
    torch.manual_seed(0)
    options = {"loss": mean_square, "example": regression(), "optimizer": sgd, "device": "cpu"} | options
    return evenflow.pipeline(mlp(4, 64, 64, 64, 1), **options)


class Said(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        logger = logging.getLogger("evenflow")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record) -> None:
        self.lines.append(record.getMessage())


def adamw(named):
    return torch.optim.AdamW([parameter for _, parameter in named], foreach=False)


def refuses_to_measure(*_, **__):
    raise RecordError("no")


def on_two_ranks():
    said, found = Said(), {}
    for name, options in {
        "alone": {},
        "again": {},
        "asked": {"plan": "auto", "schedule": "zb-h1", "microbatch_size": 4},
        "said": {"num_microbatches": 4},
    }.items():
        said.lines.clear()
        pipe = make(**options)
        losses = [float(pipe.step(regression()).loss) for _ in range(3)]
        number = len({op.microbatch for op in pipe.timelines()[1].lanes[0].ops if hasattr(op, "microbatch")})
        found[name] = losses, number, list(said.lines)
        pipe.close()
    whole, auto.measured_request = auto.measured_request, refuses_to_measure
    try:
        said.lines.clear()
        make().close()
        found["unmeasurable"] = list(said.lines)
        try:
            make(plan="auto")
        except RecordError as error:
            found["asked for it"] = str(error)
    finally:
        auto.measured_request = whole
    wide, batch = mlp(64, 512, 512, 512, 512, 64), {"x": torch.randn(256, 64), "y": torch.randn(256, 64)}
    pipe = evenflow.pipeline(wide, loss=mean_square, example=batch, optimizer=adamw, plan="auto")
    pipe.step(batch)
    peak = pipe.meter.peak_bytes(lambda: pipe.step(batch))[1]
    found["peaks"] = pipe.plan.ranks[dist.get_rank()].memory.allocated, peak
    pipe.close()
    world = world_of("cpu")
    run = Run(mlp(4, 64, 1), mean_square, regression(16), sgd)
    request, again = (measured_request(run, world, CPU, cache=user_folder()) for _ in range(2))
    chains = [each.chain_of(1) for each in (request, again)]
    found["twice"] = [next(iter(chain.seconds.values())).total for chain in chains]
    found["links"] = probe(world, CPU, link_for(world, CPU, Placement.linear(2)))
    found["sizes"] = request.microbatch_sizes
    found["overheads"] = request.overheads
    return found


@cache
def results():
    return evenflow.launch(on_two_ranks, nproc=2)


def planned(lines):
    return [line for line in lines if line.startswith("planned: 2 pipeline ranks")]


def measurings(lines):
    return [line for line in lines if "in microbatches of" in line or "rehearsing" in line]


def losses_of(num_microbatches):
    pipe = make(stages=1, num_microbatches=num_microbatches)
    found = [float(pipe.step(regression()).loss) for _ in range(3)]
    pipe.close()
    return found


def test_a_run_that_is_told_nothing_plans_itself():
    (_, _, lines), other = results()[0]["alone"], results()[1]["alone"]
    assert len(planned(lines)) == 1
    assert "s a step expected" in planned(lines)[0]
    assert measurings(lines)
    assert not planned(other[2]), "the first rank tells"


@pytest.mark.parametrize("name", ["alone", "again", "asked", "said"])
def test_the_numbers_are_those_of_the_unsplit_model(name):
    (losses, number, _), other = results()[0][name], results()[1][name]
    assert losses == other[0] == losses_of(number)


def test_nothing_is_measured_twice():
    assert not measurings(results()[0]["again"][2])


def test_the_next_run_finds_what_all_ranks_measured_together():
    first, second = results()[0]["twice"]
    assert second == pytest.approx(first, rel=1e-9)


def test_what_is_given_is_kept():
    _, number, lines = results()[0]["asked"]
    assert number == 2
    assert planned(lines)[0].startswith("planned: 2 pipeline ranks, zb-h1, 2 microbatches of 4")


def test_a_run_that_is_told_anything_is_not_planned():
    _, number, lines = results()[0]["said"]
    assert number == 4
    assert not planned(lines)
    assert not measurings(lines)


def test_what_cannot_be_measured_is_cut_by_estimates():
    assert "not planned, and cut by estimates: no" in results()[0]["unmeasurable"]
    assert results()[0]["asked for it"] == "no"


def test_links_and_the_runtime_are_measured():
    (pair,) = results()[0]["links"]
    found = results()[0]["links"][pair]
    assert pair == (0, 1)
    assert results()[1]["links"] == results()[0]["links"]
    # Differences of medians: on a busy machine noise may hide them (see test_probe for what is exact).
    assert 0 <= found.link.latency_seconds < 1
    assert found.link.bytes_per_second > 1e6
    assert 0 <= found.parcel_seconds < 1
    assert 0 <= found.seconds_per_byte < 1e-6
    overheads = results()[0]["overheads"]
    assert 0 < overheads.op_seconds < 0.1
    assert overheads.receives_ahead == 0, "memory that is shared is no rank's own"
    assert results()[0]["sizes"] == (1, 2, 4, 8), "each rank has at least one microbatch"


@pytest.mark.parametrize("rank", [0, 1])
def test_the_promised_peak_is_kept(rank):
    promised, measured = results()[rank]["peaks"]
    assert promised == pytest.approx(measured, rel=0.1)


def test_one_process_has_nothing_to_plan():
    pipe = make(plan="auto", stages=None)
    assert len(pipe.cut) == 1
    pipe.close()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"split": ["2"]}, 'split= and plan="auto" are both given'),
        ({"stages": 2}, 'stages= and plan="auto" are both given'),
        ({"exact": True}, 'plan="auto" cannot plan exact=True'),
        ({"example": Microbatches([regression()])}, 'plan="auto" cannot plan'),
    ],
)
def test_what_a_plan_cannot_take_is_refused(options, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        make(plan="auto", **options)


def test_a_single_process_asks_the_same_question():
    request = measured_request(Run(mlp(4, 64, 1), mean_square, regression(8), None), SingleProcess(), CPU)
    chain = request.chain_of(8)
    assert request.batch_rows == chain.num_rows == 8
    assert request.state.optimizer_bytes == 0
    assert sum(next(iter(chain.seconds.values())).forward) > 0


def test_the_optimizer_is_measured():
    weights = {"a": torch.nn.Parameter(torch.ones(256, 256, device="meta"))}
    momentum = optimizer_cost(
        lambda named: torch.optim.SGD([each for _, each in named], lr=0.1, momentum=0.9), weights, CPU
    )
    adam = optimizer_cost(lambda named: torch.optim.AdamW([each for _, each in named]), weights, CPU)
    assert (momentum.state.optimizer_bytes, adam.state.optimizer_bytes) == (4.0, 8.0)
    assert 0 < momentum.seconds_per_byte < adam.seconds_per_byte
    assert weights["a"].is_meta


def test_parameters_that_do_not_train_cost_no_state():
    frozen = {"a": torch.nn.Parameter(torch.ones(4, 4), requires_grad=False)}
    assert optimizer_cost(sgd, frozen, CPU).state.optimizer_bytes == 0


def stage(number, first=1.0, rest=1.0):
    return StageCost(
        number, number + 1, 1.0, first, rest, 4.0, 2.0, 0.0, 0.0, 8.0 * (number > 0), 8.0, 0, 0, 0
    )


HANDED = Traffic({(0, 1): 8.0}, {(1, 0): 8.0})


def test_a_whole_backward_is_walked_once():
    found = as_run([stage(0), stage(1)], HANDED.parcels((0, 1)), Overheads(), splits=False)
    assert [each.seconds for each in found] == [3.0, 3.0]


def test_the_first_stage_of_a_split_backward_leaves_all_to_the_weight_gradient():
    first, second = as_run([stage(0), stage(1)], HANDED.parcels((0, 1)), Overheads(), splits=True)
    assert (first.input_grad_seconds, first.weight_grad_seconds) == (0.0, 2.0)
    assert (second.input_grad_seconds, second.weight_grad_seconds) == (1.0, 1.0)
    assert (first.kept_bytes, second.kept_bytes) == (4.0, 2.0)
    last = as_run([stage(0), stage(1, rest=0.0)], HANDED.parcels((0, 1)), Overheads(), splits=True)[1]
    assert (last.input_grad_seconds, last.weight_grad_seconds) == (1.0, 0.0), "without weights: all at once"


def test_only_what_leaves_a_rank_is_handled():
    overheads = Overheads(op_seconds=1.0, parcel_seconds=0.5, seconds_per_byte=0.25)
    apart = as_run([stage(0), stage(1)], HANDED.parcels((0, 1)), overheads, splits=False)
    together = as_run([stage(0), stage(1)], HANDED.parcels((0, 0)), overheads, splits=False)
    assert [each.forward_seconds for each in apart] == [1 + 1 + 0.5 + 2, 1 + 1 + 0.5 + 2]
    assert [each.forward_seconds for each in together] == [2.0, 2.0]
