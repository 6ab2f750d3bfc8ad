"""Saved plans in other systems' words: as when they were planned, and refused where they cannot run."""

import itertools
import json
import re
from dataclasses import replace

import pytest
from test_targets import CASES, NUM_BLOCKS, within

from evenflow.errors import ConfigError
from evenflow.plan.choice import Degrees
from evenflow.plan.own_order import planned_schedule
from evenflow.plan.plan_file import read_plan, write_plan
from evenflow.plan.planner import plan
from evenflow.plan.request import Levers
from evenflow.plan.systems import targets
from evenflow.plan.systems.megatron_layout import parse_layout
from evenflow.plan.systems.target_settings import export_plan, settings
from evenflow.plan.systems.targets import TARGETS
from evenflow.schedule_file import format_rows, parse_schedule
from evenflow.schedules.zb_h1 import zb_h1


@pytest.fixture(scope="module")
def deep():
    """A plan for Megatron of four stages, and one for DeepSpeed, as their files have them."""
    names = "megatron", "deepspeed"
    return {name: read_plan(write_plan(within(name, "a long pipeline").plan)) for name in names}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("case", ["a long pipeline", "scarce", "no pipeline", "two and two"])
def test_a_saved_plan_has_the_settings_with_which_it_was_planned(name, case):
    found = within(name, case)
    assert export_plan(read_plan(write_plan(found.plan)), name) == settings(found) + "\n"


def test_the_layers_follow_a_cut_that_a_person_moved(deep):
    text = write_plan(deep["megatron"])
    first = deep["megatron"].stages[1].first
    later = deep["megatron"].layers[deep["megatron"].layers.index(first) + 1]
    before, after = (
        parse_layout(re.search('layout "(.*)"', export_plan(read_plan(each), "megatron"))[1])
        for each in (text, text.replace(f'first = "{first}"', f'first = "{later}"'))
    )
    assert len(after[0]) == len(before[0]) + 1
    assert "".join(after) == "".join(before) == "E" + "t" * NUM_BLOCKS + "L"


def test_the_parts_of_deepspeed_hold_every_layer(deep):
    made = deep["deepspeed"]
    text = export_plan(made, "deepspeed")
    parts = json.loads(re.search(r"# parts: (\[.*\]),", text)[1])
    found = targets.within(made, TARGETS["deepspeed"])
    assert (parts[0], parts[-1]) == (0, NUM_BLOCKS + 2)  # embedding and head are layers too
    sizes = [end - start for start, end in itertools.pairwise(parts)]
    blocks = list(found.blocks)
    blocks[0], blocks[-1] = blocks[0] + 1, blocks[-1] + 1
    assert sizes == blocks


def test_torch_gets_the_order_of_a_plan(deep):
    made = deep["megatron"]
    read = parse_schedule(export_plan(made, "torch"), name="1f1b")
    assert read.ranks == planned_schedule(made).ranks


def owning(made, method):
    """The plan with an order of its own."""
    order = tuple(format_rows(method(made.degrees.pipeline, 1, made.num_microbatches)))
    return replace(made, schedule="auto", order=order)


def test_torchtitan_reads_an_order_that_it_has_no_name_for(deep):
    own = owning(deep["megatron"], zb_h1)
    text = export_plan(own, "torchtitan")
    assert '    pipeline_parallel_schedule="PipelineScheduleMulti",\n' in text
    assert '    pipeline_parallel_schedule_csv="schedule.csv",\n' in text
    assert "evenflow export PLAN.toml --to torch -o schedule.csv" in text
    assert parse_schedule(export_plan(own, "torch"), name="auto").ranks == planned_schedule(own).ranks
    ranks = [replace(stage, rank=[1, 0, 2, 3][at]) for at, stage in enumerate(own.stages)]
    swapped = replace(own, stages=tuple(ranks), order=tuple(own.order[at] for at in (1, 0, 2, 3)))
    with pytest.raises(
        ConfigError, match=r"it places stages in loops or in a V, not on ranks \(1, 0, 2, 3\)"
    ):
        export_plan(swapped, "torchtitan")


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (
            ("0B0,0F0,0F1,0B1", "1F0,1B0,1F1,1B1", "2F0,2B0,2F1,2B1", "3F0,3B0,3F1,3B1"),
            "standstill: rank 0 stands before 0B0, which waits for 0F0 on rank 0",
        ),
        (
            ("0F0,0F1,0B1", "1F0,1B0,1F1,1B1", "2F0,2B0,2F1,2B1", "3F0,3B0,3F1,3B1"),
            "0B0 is missing: rank 0 must run it",
        ),
    ],
)
def test_an_order_that_nothing_can_run_is_refused_with_the_other_reasons(deep, order, message):
    stuck = replace(deep["megatron"], schedule="auto", num_microbatches=2, order=order, layers=())
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        export_plan(stuck, "torchtitan")
    assert str(raised.value).startswith("torchtitan cannot run this plan: ")
    assert "the plan names no whole layers" in str(raised.value)


@pytest.mark.parametrize("name", [*TARGETS, "torch"])
@pytest.mark.parametrize("method", ["1f1b", "zb-h1"])
def test_more_ops_than_can_be_worked_out_are_refused(deep, name, method):
    huge = replace(deep["megatron"], schedule=method, num_microbatches=10**9)
    with pytest.raises(ConfigError, match=r"4 stages × 1000000000 microbatches are up to 12,000,000,000 ops"):
        export_plan(huge, name)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("num_stages", [1, 2])
def test_one_name_tells_no_layer(deep, name, num_stages):
    made = deep["megatron"]
    firsts = ("embedding", "norm")[:num_stages]
    short = replace(
        made,
        degrees=replace(made.degrees, pipeline=num_stages),
        stages=tuple(replace(made.stages[at], first=first) for at, first in enumerate(firsts)),
        ranks=made.ranks[:num_stages],
        links=(),
        layers=("norm",),
    )
    with pytest.raises(ConfigError, match=r"the plan's layers are 'norm' alone"):
        export_plan(read_plan(write_plan(short)), name)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("megatron", {"recompute": "selective"}, "it recomputes each layer or none, and the plan some nodes"),
        ("megatron", {"recompute": "full"}, "its stages contradict recompute = 'full'"),
        ("megatron", {"layers": ()}, "the plan names no whole layers"),
        ("megatron", {"schedule": "zb-h1"}, "it has 1f1b, interleaved-1f1b, and the plan's is zb-h1"),
        ("deepspeed", {"degrees": Degrees(4, tensor=2)}, "no tensor, context or expert ranks beside them"),
        (
            "deepspeed",
            {"degrees": Degrees(4, data=2, sharding="fsdp")},
            "of 2 such data ranks it shares none or zero1, and the plan fsdp",
        ),
        ("deepspeed", {"schedule": "eager-1f1b"}, "it has 1f1b, and the plan's is eager-1f1b"),
        ("torchtitan", {"degrees": Degrees(4, data=2)}, "it shares fsdp, and the plan none"),
    ],
)
def test_what_a_system_cannot_run_is_refused_with_the_reason(deep, name, change, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        export_plan(replace(deep["megatron"], **change), name)
    assert str(raised.value).startswith(f"{name} cannot run this plan: ")
    assert str(raised.value).endswith(f". Plan for it: evenflow plan ... --target {name}")


def test_a_cut_within_a_layer_is_refused():
    asked = replace(CASES["a long pipeline"], levers=Levers(pipeline=4, data=1))
    made = plan(asked, search_seconds=0.0)
    inside = next(name for name in asked.chain_of(1).names if name.endswith(":add"))
    cut = replace(made.stages[1], first=inside)
    with pytest.raises(ConfigError, match=re.escape(f"its stage 1 begins with '{inside}', within a layer")):
        export_plan(replace(made, stages=(made.stages[0], cut, *made.stages[2:])), "megatron")


def test_deepspeed_refuses_cuts_that_it_has_no_name_for(deep):
    made, layers = deep["deepspeed"], deep["deepspeed"].layers
    firsts = [made.stages[0].first, *layers[1:4]]
    stages = tuple(replace(stage, first=first) for stage, first in zip(made.stages, firsts, strict=True))
    with pytest.raises(ConfigError, match=r"cuts by uniform or type: .* neither puts 1, 1, 1, 3 blocks"):
        export_plan(replace(made, stages=stages), "deepspeed")


def test_unknown_systems_are_refused(deep):
    with pytest.raises(ConfigError, match="there are torchtitan, megatron, deepspeed"):
        export_plan(deep["megatron"], "colossal")
