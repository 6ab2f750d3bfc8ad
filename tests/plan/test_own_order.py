"""A plan's own order: read as it was written, and run for any number of microbatches."""

import dataclasses
import random

import pytest
from chains import language_model

from evenflow.cluster.short import parse_cluster
from evenflow.errors import ConfigError
from evenflow.ir.flow import Flow
from evenflow.lower import lower
from evenflow.plan.own_order import OwnOrder, own_schedule
from evenflow.plan.planner import plan
from evenflow.plan.request import Levers, Request
from evenflow.schedule_file import format_rows
from evenflow.schedules import catalog
from evenflow.validate import prove

NAMES = ("gpipe", "zb-h1", "eager-1f1b", "zb-v", "dualpipe-v", "interleaved-zb")


@pytest.mark.parametrize("name", ["zb-h1", "dualpipe-v"])
def test_a_schedule_is_read_as_it_was_written(name):
    cluster, per_rank = parse_cluster("2x RTX 4090"), catalog.default_stages_per_rank(name)
    asked = Request(language_model(cluster), (2,), cluster, 8, 32.0, 0.05, levers=Levers(pipeline=2))
    made = plan(asked, search_seconds=0.0)
    own = dataclasses.replace(catalog.get(name)(2, per_rank, 4), name="auto")
    stages = tuple(dataclasses.replace(made.stages[0], rank=rank) for rank in own.placement.rank_of)
    changed = {"stages": stages, "stages_per_rank": per_rank, "num_microbatches": 4, "schedule": "auto"}
    assert own_schedule(dataclasses.replace(made, **changed, order=tuple(format_rows(own)))) == own


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_an_order_serves_any_number_of_microbatches(name, seed):
    num_ranks, per_rank = random.Random(f"{name} {seed}").randint(1, 4), catalog.default_stages_per_rank(name)
    own = catalog.get(name)(num_ranks, per_rank, 2 * num_ranks)
    method = OwnOrder(own)
    assert method(num_ranks, per_rank, own.num_microbatches) is own
    for number in range(1, 5 * num_ranks):
        made = method(num_ranks, per_rank, number)
        assert (made.num_microbatches, made.placement) == (number, own.placement)
        prove(lower(made, Flow.chain(own.placement.num_stages)))
    with pytest.raises(ConfigError, match="cannot serve"):
        method(num_ranks + 1, per_rank, 4)
