"""Plans inside what other systems can express: each obeys their rules, and is never the faster one."""

import functools
import itertools
import json
import re
from dataclasses import replace

import pytest
from chains import language_model
from test_planner import all_prices, boxes, request

from evenflow.cluster.short import parse_cluster
from evenflow.errors import ConfigError
from evenflow.ir.costs import Link
from evenflow.plan.choice import Choice, Degrees
from evenflow.plan.layers import layers_of
from evenflow.plan.plan import Prediction
from evenflow.plan.planner import NoPlanError, plan
from evenflow.plan.request import Levers, Request
from evenflow.plan.search.choices import choices
from evenflow.plan.systems.target_settings import settings
from evenflow.plan.systems.targets import TARGETS, Within, plan_within, target_called, within_limits

NUM_BLOCKS = 6
NAMES = (
    "embedding",
    *(f"block.{n}{part}" for n in range(NUM_BLOCKS) for part in (".attention", ":add")),
    "norm",
    "head",
)
FAST, SLOW = Link(1e-6, 1e11), Link(1e-4, 1e8)


def fine(asked: Request) -> Request:
    """The request with a model of blocks of two nodes, an embedding, and a head of two nodes."""
    of = language_model(asked.cluster, num_blocks=2 * NUM_BLOCKS + 1)
    return replace(asked, chain_of=lambda rows: replace(of(rows), names=NAMES))


def four(memory: float | None = None, link: Link = FAST) -> Request:
    return fine(request(boxes(*["H100"] * 4, memory=memory, link=link)))


CASES = {
    "roomy": four(),
    "scarce": four(7e6),
    "scarcer": four(5.2e6),
    "slow links": four(link=SLOW),
    "a long pipeline": replace(four(), levers=Levers(pipeline=4)),
    "interleaved": replace(four(), levers=Levers(pipeline=2, stages_per_rank=2)),
    "two and two": replace(four(9e6), levers=Levers(pipeline=2, tensor=1, recompute="none")),
    "no pipeline": replace(four(12e6), levers=Levers(pipeline=1)),
    "few microbatches": replace(four(), batch_rows=6, levers=Levers(pipeline=4, num_microbatches=6)),
}
IMPOSSIBLE = {("deepspeed", "interleaved"), ("deepspeed", "scarcer")}  # told in a test of their own
PAIRS = [(name, case) for name in TARGETS for case in CASES if (name, case) not in IMPOSSIBLE]


@functools.cache
def within(name: str, case: str) -> Within:
    return plan_within(CASES[case], TARGETS[name])


@functools.cache
def without_limits(case: str) -> Prediction:
    return plan(CASES[case], search_seconds=0.0).prediction


@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_a_plan_obeys_each_rule_and_is_never_faster(name, case):
    found = within(name, case)
    degrees, made = found.plan.degrees, found.plan
    firsts = [stage.first for stage in made.stages[1:]]
    assert all(first.endswith(".attention") or first == "norm" for first in firsts)
    again = {label for stage in made.stages for label in stage.recompute}
    assert again in (set(), {*NAMES[1:-1]}), "each layer that keeps anything of its own, or none"
    assert sum(found.blocks) == NUM_BLOCKS
    number = made.num_microbatches
    match name:
        case "torchtitan":
            assert degrees.sharding == "fsdp" or degrees.data in {1, degrees.num_devices}
            assert degrees.pipeline == 1 or made.schedule in {
                "1f1b",
                "interleaved-1f1b",
                "interleaved-zb",
                "zb-v",
            }
            if degrees.pipeline > 1 and made.schedule == "1f1b":
                assert number >= degrees.pipeline
            if made.schedule.startswith("interleaved"):
                assert number % max(1, number // degrees.pipeline) == 0
        case "megatron":
            assert degrees.sharding != "fsdp" or degrees.num_devices == degrees.data
            assert made.schedule in {"1f1b", "interleaved-1f1b"}
            assert made.schedule == "1f1b" or number % degrees.pipeline == 0
        case "deepspeed":
            assert (degrees.tensor, degrees.context, degrees.expert) == (1, 1, 1)
            assert degrees.sharding != "fsdp" or degrees.pipeline == 1
            assert degrees.pipeline == 1 or made.schedule == "1f1b"
            assert made.stages_per_rank == 1
            # Embedding and head are one layer each; one more goes to the first stages.
            layers = list(found.blocks)
            layers[0], layers[-1] = layers[0] + 1, layers[-1] + 1
            alike = sorted(layers, reverse=True) == layers and layers[0] - layers[-1] <= 1
            assert alike if found.way_to_cut == "uniform" else len(set(found.blocks)) == 1
    # A plan may be that much above the best that there is.
    assert made.prediction.step_seconds * 1.02 >= without_limits(case).step_seconds


@pytest.mark.parametrize("name", ["torchtitan", "megatron"])
@pytest.mark.parametrize("case", ["roomy", "scarce", "slow links"])
def test_a_plan_within_is_the_best_of_what_is_allowed(name, case):
    limited = within_limits(CASES[case], TARGETS[name])
    prices = all_prices(limited, lambda choice: choice.recompute != "selective" and limited.allows(choice))
    best = min(each.step_seconds for each in prices)
    found = within(name, case).plan.prediction.step_seconds
    assert best * (1 - 1e-9) <= found <= best * 1.02


def test_too_few_microbatches_for_a_schedule_are_not_chosen():
    few = replace(CASES["a long pipeline"], batch_rows=2)  # at most 2 microbatches for 4 stages
    assert plan_within(few, TARGETS["megatron"]).plan.schedule == "1f1b"
    titan = within_limits(few, TARGETS["torchtitan"])
    assert {choice.schedule for choice in choices(titan)} == {"zb-v", "interleaved-1f1b", "interleaved-zb"}
    six = within_limits(CASES["few microbatches"], TARGETS["megatron"])
    assert {choice.schedule for choice in choices(six)} == {"1f1b"}  # 6 are no multiple of 4
    seven = Choice(Degrees(4), 2, "interleaved-1f1b", 1, 9, "none")
    assert not TARGETS["torchtitan"].lays_out(seven)  # two rounds of 4 and a half
    assert TARGETS["torchtitan"].lays_out(replace(seven, num_microbatches=10))


def test_what_a_target_cannot_share_may_leave_nothing():
    with pytest.raises(NoPlanError):
        within("deepspeed", "scarcer")
    with pytest.raises(ConfigError, match="the limits of the system that is planned for"):
        within("deepspeed", "interleaved")


def test_tensor_ranks_divide_the_heads():
    asked = replace(CASES["roomy"], cluster=boxes(*["H100"] * 4), levers=Levers(pipeline=1, data=1))
    assert plan_within(asked, TARGETS["torchtitan"], heads=8).plan.degrees.tensor == 4
    assert plan_within(asked, TARGETS["torchtitan"], heads=6).plan.degrees.tensor == 1


@pytest.mark.parametrize("case", ["a long pipeline", "interleaved", "scarcer", "no pipeline"])
def test_settings_for_torchtitan_name_each_layer_once(case):
    found = within("torchtitan", case)
    text, degrees = settings(found), found.plan.degrees
    given = dict(re.findall(r"^    (\w+)=(.*),$", text, re.MULTILINE))
    assert int(given["pipeline_parallel_degree"]) == degrees.pipeline
    ranks = [int(given[f"data_parallel_{kind}_degree"]) for kind in ("shard", "replicate")]
    assert ranks == ([degrees.data, 1] if degrees.sharding == "fsdp" else [1, degrees.data])
    assert f"local_batch_size = {found.plan.microbatch_size * found.plan.num_microbatches}" in text
    assert ('mode = "full"' in text) == any(stage.recompute for stage in found.plan.stages)
    if degrees.pipeline > 1:
        stages = json.loads(given["pipeline_parallel_module_fqns_per_model_part"])
        assert len(stages) == degrees.pipeline * found.plan.stages_per_rank
        assert list(itertools.chain(*stages)) == [
            "tok_embeddings",
            *(f"layers.{n}" for n in range(NUM_BLOCKS)),
            "norm",
            "lm_head",
        ]
        assert int(given["num_pp_microbatches"]) == found.plan.num_microbatches


@pytest.mark.parametrize("case", ["a long pipeline", "interleaved", "scarce", "no pipeline"])
def test_settings_for_megatron_lay_out_each_layer_once(case):
    found = within("megatron", case)
    text, degrees = settings(found), found.plan.degrees
    assert f"--pipeline-model-parallel-size {degrees.pipeline}\n" in text
    assert f"--micro-batch-size {found.plan.microbatch_size} --global-batch-size 16" in text
    assert ("--use-distributed-optimizer" in text) == (degrees.sharding == "zero1")
    assert ("--sequence-parallel" in text) == (degrees.tensor > 1)
    if degrees.pipeline > 1:
        layout = re.search(r'layout "(.*)"', text)[1]
        stages = [re.sub(r"t\*(\d+)", lambda m: "t" * int(m[1]), stage) for stage in layout.split("|")]
        assert len(stages) == degrees.pipeline * found.plan.stages_per_rank
        assert "".join(stages) == "E" + "t" * NUM_BLOCKS + "L"
        assert [stage.count("t") for stage in stages] == list(found.blocks)


@pytest.mark.parametrize("case", ["a long pipeline", "roomy", "two and two", "no pipeline"])
def test_settings_for_deepspeed_add_up(case):
    found = within("deepspeed", case)
    text, degrees = settings(found), found.plan.degrees
    config = json.loads(text[text.index("{") :])
    rows = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
    assert config["train_batch_size"] == rows * degrees.data == 16
    assert config["zero_optimization"]["stage"] == {"none": 0, "zero1": 1, "fsdp": 3}[degrees.sharding]
    assert ("num_stages=" in text) == (degrees.pipeline > 1)
    assert case != "two and two" or degrees.sharding == "zero1"


def test_deepspeed_takes_the_better_way_to_cut():
    asked = replace(CASES["roomy"], levers=Levers(pipeline=3, data=1), cluster=boxes(*["H100"] * 3))
    ways = {}
    for way in ("uniform", "type:"):
        target = replace(TARGETS["deepspeed"], cuts={way: TARGETS["deepspeed"].cuts[way]})
        ways[way] = plan_within(asked, target).plan.prediction.step_seconds
    found = plan_within(asked, TARGETS["deepspeed"])
    assert found.plan.prediction.step_seconds == min(ways.values())
    assert ways[found.way_to_cut] == min(ways.values())
    assert ways["uniform"] != ways["type:"]
    assert ('partition_method="type:BLOCK"' in settings(found)) == (found.way_to_cut == "type:")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("embed", "body", "head"), "no numbered layers"),
        (("embed", "h.0", "pool", "h.1", "head"), "pool stands between two"),
        (("embed", "h.0", "h.1"), "nothing stands behind the last"),
    ],
)
def test_programs_that_do_not_fit_are_refused(names, message):
    with pytest.raises(ConfigError, match=message):
        layers_of(names)


def test_layers_are_the_outermost_numbered_modules():
    layers = layers_of(["wte", "h.0.mlp.0", "h.0.mlp.1", "h.1.mlp.0", "h.1:add#2", "ln"])
    assert (layers.begins, layers.end, layers.places) == ((1, 3), 5, (1, 3, 5))
    assert layers_of(["0", "1", "loss"]).places == (1, 2)


def test_unknown_targets_are_refused():
    with pytest.raises(ConfigError, match="there are torchtitan, megatron, deepspeed"):
        target_called("colossal")


def test_a_large_cluster_can_be_planned_for():
    asked = fine(request(parse_cluster("2x8xH100"), rows=64))
    assert plan_within(asked, TARGETS["megatron"]).plan.degrees.num_devices in {1, 16}


@pytest.mark.parametrize(
    ("name", "degrees", "recompute", "allowed"),
    [
        ("torchtitan", Degrees(2, data=2, sharding="fsdp"), "full", True),
        ("torchtitan", Degrees(2, data=2, sharding="zero1"), "none", False),
        ("torchtitan", Degrees(2, data=2), "none", False),
        ("torchtitan", Degrees(1, data=4), "none", True),
        ("torchtitan", Degrees(4), "selective", False),
        ("megatron", Degrees(2, data=2, sharding="zero1"), "full", True),
        ("megatron", Degrees(2, data=2, sharding="fsdp"), "none", False),
        ("megatron", Degrees(1, data=4, sharding="fsdp"), "none", True),
        ("deepspeed", Degrees(2, data=2, sharding="zero1"), "full", True),
        ("deepspeed", Degrees(2, data=2, sharding="fsdp"), "none", False),
        ("deepspeed", Degrees(1, data=4, sharding="fsdp"), "none", True),
        ("deepspeed", Degrees(2, tensor=2), "none", False),
        ("megatron", Degrees(1, data=4, expert=4), "none", True),
        ("deepspeed", Degrees(1, data=4, expert=4), "none", False),
    ],
)
def test_what_each_may_share_and_recompute(name, degrees, recompute, allowed):
    choice = Choice(degrees, 1, "1f1b", 1, 8, recompute)
    assert TARGETS[name].limits().allows(choice) == allowed


def test_deepspeed_spreads_layers_as_it_says():
    layers = layers_of(["embed", *(f"h.{n}" for n in range(7)), "head"])
    cuts = TARGETS["deepspeed"].cuts
    assert cuts["uniform"](layers, 4) == (3, 5, 7)  # 9 layers: 3, 2, 2 and 2
    assert cuts["uniform"](layers, 10) is None
    assert cuts["type:"](layers, 7) == (2, 3, 4, 5, 6, 7)  # blocks alone count
    assert cuts["type:"](layers, 2) is None
