"""`pipeline(plan=…)`: the plan decides, and the numbers stay those of the unsplit model."""

import dataclasses
import re

import pytest
import torch

import evenflow
from evenflow.cluster.short import parse_cluster
from evenflow.cost.estimate import estimate
from evenflow.errors import ConfigError
from evenflow.ir.flow import Flow
from evenflow.ir.placement import Placement
from evenflow.lower import lower
from evenflow.pipe.building.recorded import recorded
from evenflow.pipe.given import places
from evenflow.pipe.given.splitter import Splitter
from evenflow.plan.known_costs import known_costs
from evenflow.plan.plan_file import write_plan
from evenflow.plan.planner import plan
from evenflow.plan.request import Levers, Request
from evenflow.plan.scale import scaled
from evenflow.runtime.ranks.mesh import mesh_of
from evenflow.runtime.ranks.world import SingleProcess
from unsplit import mean_square, mlp, regression, sgd

SHARE = 0.0


TWO_RANKS = Levers(pipeline=2, stages_per_rank=1, microbatch_size=2)


def planned(levers=TWO_RANKS):
    """A plan for the model of `make`."""
    machine = parse_cluster("2xRTX 4090")

    def of(rows: int):
        found = recorded(
            mlp(4, 8, 8, 1),
            loss=mean_square,
            example=regression(rows),
            splitter=Splitter(1, 1, None, None),
            max_leaf_share=SHARE,
            device=torch.device("cpu"),
        )
        return estimate(found.graph, found.model, machine.devices, num_rows=rows)

    small, large = of(2), of(4)
    sizes = {"batch_rows": 8, "row_tokens": 1.0, "max_leaf_share": SHARE, "dtype": "float32"}
    asked = Request(lambda rows: scaled(small, large, rows), (1, 2, 4), machine, **sizes, levers=levers)
    return plan(asked)


def make(**options):
    torch.manual_seed(0)
    options = {"loss": mean_square, "example": regression(), "device": "cpu", "optimizer": sgd} | options
    return evenflow.pipeline(mlp(4, 8, 8, 1), **options)


def refused(text: str):
    return pytest.raises(ConfigError, match=re.escape(text))


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "zb-v"])
def test_a_planned_pipeline_trains_as_the_unsplit_model(schedule, tmp_path):
    per_rank = 2 if schedule == "zb-v" else 1
    made = planned(Levers(pipeline=2, stages_per_rank=per_rank, schedule=schedule, microbatch_size=2))
    (tmp_path / "plan.toml").write_text(write_plan(made))
    losses = []
    for options in ({"stages": 1, "microbatch_size": 2}, {"plan": made}, {"plan": tmp_path / "plan.toml"}):
        pipe = make(**options)
        losses.append([float(pipe.step(regression()).loss) for _ in range(3)])
        pipe.close()
    assert losses[0] == losses[1] == losses[2]


def test_an_order_of_the_plan_s_own_runs_for_any_number_of_microbatches():
    order = ("0F0,0F1,0F2,0B0,0F3,0B1,0I2,0B3,0W2", "1F0,1B0,1F1,1I1,1F2,1B2,1W1,1F3,1B3")
    made = dataclasses.replace(planned(), schedule="auto", order=order)
    losses = []
    for options in ({"stages": 1, "microbatch_size": 2}, {"plan": made}):
        pipe = make(**options)
        losses.append([float(pipe.step(regression(rows)).loss) for rows in (8, 6, 10, 8)])
        _, measured = pipe.timelines()
        pipe.close()
    assert losses[0] == losses[1]
    assert [",".join(str(span.op) for span in measured.compute_on(rank)) for rank in (0, 1)] == [*order]


def test_transfers_stand_where_the_plan_s_links_want_them():
    made = planned(dataclasses.replace(TWO_RANKS, schedule="1f1b"))
    far = tuple(dataclasses.replace(link, latency_seconds=1.0) for link in made.links)
    assert {(link.source, link.target) for link in far} == {(0, 1), (1, 0)}
    programs = []
    for given in (dataclasses.replace(made, links=()), dataclasses.replace(made, links=far)):
        pipe = make(plan=given)
        own, flow = pipe._parts.programs, Flow.chain(2)
        program = own.training(4, flow).program
        assert program == lower(own.example, flow, known_costs(given))
        programs.append(program.ranks)
        pipe.close()
    assert programs[0] != programs[1]


def test_the_cut_is_the_plan_s():
    made = planned()
    pipe = make(plan=made)
    assert [cut.num_nodes for cut in pipe.cut] == [stage.num_nodes for stage in made.stages]
    assert [cut.first for cut in pipe.cut] == [stage.first for stage in made.stages]
    pipe.close()


@pytest.mark.parametrize(
    ("option", "value"),
    [("stages", 2), ("schedule", "gpipe"), ("split", ["2"]), ("num_microbatches", 2), ("recompute", "full")],
)
def test_what_a_plan_decides_is_not_given_besides(option, value):
    with refused(f"{option}= and plan= are both given"):
        make(plan=planned(), **{option: value})


def test_what_a_pipeline_cannot_do_is_refused():
    made = planned()
    data = dataclasses.replace(made, degrees=dataclasses.replace(made.degrees, data=2))
    with refused("4 processes are needed (pp 2 x dp 2 x tp 1), but 1 is running"):
        make(plan=data)
    sharded = dataclasses.replace(made.degrees, pipeline=1, data=2, sharding="fsdp")
    with refused("the plan gathers parameters node by node (fsdp without a pipeline)"):
        make(plan=dataclasses.replace(made, degrees=sharded))
    experts = dataclasses.replace(made.degrees, data=2, expert=2)
    with refused("the plan takes 1 context and 2 expert ranks, which pipeline() cannot run yet"):
        make(plan=dataclasses.replace(made, degrees=experts))
    again = dataclasses.replace(made.stages[1], recompute=("head",))
    with refused("the plan's stage 1 recomputes 'head', which the recorded program does not have"):
        make(plan=dataclasses.replace(made, stages=(made.stages[0], again)))
    other = dataclasses.replace(made.stages[1], first="head")
    with refused("the plan's stage 1 begins with 'head', which the recorded program does not have"):
        make(plan=dataclasses.replace(made, stages=(made.stages[0], other)))
    crossed = tuple(dataclasses.replace(stage, rank=1 - stage.rank) for stage in made.stages)
    with refused("the plan's stages are on ranks (1, 0), and its schedule"):
        make(plan=dataclasses.replace(made, schedule="1f1b", order=(), stages=crossed))
    with refused("cannot read the plan no_such.toml"):
        make(plan="no_such.toml")


def test_ranks_take_the_devices_that_the_plan_gives_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    devices = places.devices_of("cuda", Placement.v_shape(2), mesh_of(SingleProcess(), None), [1, 0])
    assert [device.index for device in devices] == [1, 0, 0, 1]
