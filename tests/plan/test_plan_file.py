"""Plan files: what is written is read as the very same plan, and what is wrong is said with its place."""

import dataclasses

import pytest
from chains import language_model

from evenflow.cluster.short import parse_cluster
from evenflow.errors import ConfigError
from evenflow.plan.choice import describe
from evenflow.plan.known_costs import known_costs
from evenflow.plan.plan import positions_in
from evenflow.plan.plan_file import read_plan, read_plan_file, write_plan
from evenflow.plan.planner import plan
from evenflow.plan.request import Levers, Request


@pytest.fixture(scope="module")
def made():
    cluster = parse_cluster("4x RTX 4090")
    levers = Levers(pipeline=4, stages_per_rank=1, recompute="full")
    asked = Request(language_model(cluster), (1, 2), cluster, 16, 32.0, 0.05, dtype="float32", levers=levers)
    return plan(asked), asked


def test_a_plan_is_read_as_it_was_written(made):
    found, _ = made
    assert read_plan(write_plan(found)) == found
    unknown = dataclasses.replace(found, prediction=dataclasses.replace(found.prediction, mfu=None))
    assert read_plan(write_plan(unknown)).prediction.mfu is None


def test_a_plan_tells_how_it_recomputes(made):
    choice = read_plan(write_plan(made[0])).choice
    assert choice.recompute == "full"
    assert describe(choice).endswith(", full recomputation")


def test_a_person_may_move_a_cut(made):
    found, asked = made
    names = asked.chain_of(1).names
    before = positions_in(found, names)
    moved = names[before[0] + 1]
    text = write_plan(found).replace(f'first = "{found.stages[1].first}"', f'first = "{moved}"')
    assert positions_in(read_plan(text), names) == (before[0] + 1, *before[1:])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("version = 1", "version = 2", "version = 2: this Evenflow reads plans of version 1"),
        ("schedule = ", "shedule = ", "unknown key 'shedule'; did you mean 'schedule'?"),
        ('schedule = "', "schedule = 3 # ", "schedule = 3 must be a string, in quotes"),
        (
            "num_microbatches = ",
            "num_microbatches = -",
            r"num_microbatches = -\d+ must be at least 1",
        ),
        ("num_microbatches = ", "num_microbatches = 0 # ", "num_microbatches = 0 must be at least 1"),
        ("num_microbatches = ", "num_microbatches = 1.5 # ", "num_microbatches = 1.5 must be a whole number"),
        ("step_seconds = ", "step_seconds = inf # ", "step_seconds = inf must be finite"),
        ("pipeline = 4", "pipeline = true", "pipeline = True must be a whole number"),
        ("pipeline = 4", "pipeline = 2", r"\[\[ranks\]\] names 4 pipeline ranks, and degrees.pipeline = 2"),
        (
            "stages_per_rank = 1",
            "stages_per_rank = 2",
            r"\[\[stages\]\] names 4 stages, and 4 ranks of 2 stages",
        ),
        ('sharding = "none"', 'sharding = "all"', "sharding = 'all' must be one of 'none', 'zero1', 'fsdp'"),
        ("recompute = [", "recompute = [3, ", r"stages\[0\].recompute\[0\] = 3 must be a string"),
        ("max_leaf_share = ", "max_leaf_share = 1.5 # ", "max_leaf_share = 1.5 is a share"),
        ('schedule = "', 'schedule = "no', "no schedule 'no"),
        ("[[stages]]\nrank = 0", "[[stages]]\nrank = 4", r"stages\[0\].rank = 4, and ranks are 0 to 3"),
        ("[[stages]]\nrank = 0", "[[stages]]\nrank = 1", "4 ranks, and the stages are on 3 of them"),
        (
            "[[links]]\nsource = 0\ntarget = 1",
            "[[links]]\nsource = 0\ntarget = 4",
            "leads from rank 0 to rank 4",
        ),
        ("[degrees]", "degrees = 3\n[other]", "unknown key 'other'"),
        ("version = 1", "version = ", "this is no valid TOML"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(made, old, new, message):
    text = write_plan(made[0])
    assert old in text
    with pytest.raises(ConfigError, match=message):
        read_plan(text.replace(old, new, 1))


def test_a_missing_key_and_a_missing_file(made, tmp_path):
    lines = write_plan(made[0]).splitlines()
    with pytest.raises(ConfigError, match="microbatch_size is missing"):
        read_plan("\n".join(line for line in lines if not line.startswith("microbatch_size")))
    with pytest.raises(ConfigError, match="cannot read the plan"):
        read_plan_file(tmp_path / "plan.toml")
    (tmp_path / "plan.toml").write_text(write_plan(made[0]))
    assert read_plan_file(tmp_path / "plan.toml") == made[0]
    (tmp_path / "plan.toml").write_text("version = 7")
    with pytest.raises(ConfigError, match=r"plan\.toml: version = 7"):
        read_plan_file(tmp_path / "plan.toml")
    (tmp_path / "plan.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"plan\.toml"):
        read_plan_file(tmp_path / "plan.toml")


def test_a_plan_knows_what_its_stages_and_links_cost(made):
    found = made[0]
    costs = known_costs(found)
    assert costs.forward_seconds == tuple(stage.forward_seconds for stage in found.stages)
    assert costs.sent_bytes[0, 1] == costs.sent_bytes[1, 0] == found.stages[1].received_bytes
    for link in found.links:
        taken = costs.links[link.source, link.target].transfer_seconds(1e6)
        assert taken == pytest.approx(link.latency_seconds + 1e6 * link.seconds_per_byte)
    by_hand = [
        dataclasses.replace(stage, forward_seconds=0.0, input_grad_seconds=0.0, weight_grad_seconds=0.0)
        for stage in found.stages
    ]
    assert known_costs(dataclasses.replace(found, stages=tuple(by_hand))) is None


def test_a_plan_for_another_model_is_refused(made):
    found, asked = made
    names = asked.chain_of(1).names
    with pytest.raises(ConfigError, match="which the recorded program does not have"):
        positions_in(found, [name.replace("block", "layer") for name in names])
    with pytest.raises(ConfigError, match="does not come after"):
        positions_in(dataclasses.replace(found, stages=found.stages[::-1]), names)
    with pytest.raises(ConfigError, match="must begin with the first node"):
        positions_in(dataclasses.replace(found, stages=found.stages[1:]), names)
