"""Advice where nothing fits: what is short is true, and what is said to fit can be planned."""

import functools
from dataclasses import replace

import pytest
from chains import language_model
from test_planner import boxes, request

from evenflow.cluster.cluster import Cluster
from evenflow.plan.cuts.problem import DoesNotFitError
from evenflow.plan.parallel import Peers, tensor_parallel
from evenflow.plan.planner import NoPlanError, plan
from evenflow.plan.request import Levers, Request
from evenflow.plan.search.choices import choices
from evenflow.plan.search.price import chain_for, price
from evenflow.plan.shortage.advice import NothingFitsError, advised, fitting, too_large

PIPELINE_ONLY = replace(Levers().pipeline_only(), recompute="none")


def advised_of(asked: Request) -> NothingFitsError:
    with pytest.raises(NoPlanError) as raised:
        plan(asked)
    return advised(asked, raised.value)


CASES = {
    "two ranks": request(boxes("H100", "H100", memory=5e6)),
    "pipeline only": request(boxes("H100", "H100", memory=8e6), levers=PIPELINE_ONLY),
    "large microbatches": request(
        boxes("H100", "H100", memory=9e6), levers=Levers(tensor=1, microbatch_size=4, recompute="none")
    ),
    "mixed": request(boxes("H100", "A100", "H100", memory=3e6), levers=PIPELINE_ONLY, num_blocks=12),
    "hosts": request(
        Cluster(boxes("H100", memory=5e6).hosts * 2),
        levers=PIPELINE_ONLY,
    ),
}


@functools.cache
def advice(case: str) -> NothingFitsError:
    return advised_of(CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_what_is_said_to_fit_can_be_planned(case):
    changes = advice(case).changes
    assert changes
    for change in changes:
        found = plan(change.request, budget_seconds=0.0, search_seconds=0.0)
        assert all(rank.memory.allocated <= rank.cap_bytes for rank in found.ranks), change.what
        # What was priced is one of the changed request's own choices, and no faster than a plan may be.
        assert change.priced.step_seconds >= found.prediction.bound_seconds


@pytest.mark.parametrize("case", CASES)
def test_what_is_short_is_told_by_category(case):
    asked = CASES[case]
    told = advice(case)
    short = told.short
    assert short.memory.allocated > short.cap_bytes
    assert short.cap_bytes in [
        pytest.approx(device.memory_bytes - device.reserved_bytes) for device in asked.cluster.devices
    ]
    with pytest.raises(DoesNotFitError):
        price(asked, short.choice, chain_for(asked, short.choice))
    for name in ("parameters", "gradients", "optimizer", "activations"):
        assert f"{name} " in str(told)


def whats(told: NothingFitsError) -> list[str]:
    return [change.what for change in told.changes]


def test_what_was_given_is_taken_back_first():
    told = advice("pipeline only")
    assert whats(told)[:2] == ["recomputation left open", "tensor parallelism left open"]
    assert told.changes[0].priced.choice.recompute == "full"
    assert told.changes[1].priced.choice.degrees.tensor == 2
    assert "recomputation left open: 2 pipeline ranks, 1f1b, 16 microbatches of 1, full recomp" in str(told)


def test_what_was_given_may_be_left_open_together():
    told = advised_of(request(boxes(*["H100"] * 4, memory=3.8e6), levers=PIPELINE_ONLY))
    assert "all levers left open" in whats(told)
    assert "tensor parallelism left open" not in whats(told)  # it would need recomputation too


def test_the_size_of_a_microbatch_is_one_of_the_changes():
    smaller = advice("large microbatches").changes
    assert "the size of a microbatch left open" in [change.what for change in smaller]


def test_the_fewest_more_devices_are_told():
    asked = CASES["two ranks"]
    more = next(change for change in advice("two ranks").changes if " more " in change.what)
    assert more.what == "2 more H100, 4 devices in all"
    assert more.request.cluster.num_ranks == 4
    with pytest.raises(NoPlanError):
        plan(replace(asked, cluster=boxes("H100", "H100", "H100", memory=5e6)))

    fewer = next(what for what in whats(advice("pipeline only")) if " more " in what)
    assert fewer == "1 more H100, 3 devices in all"  # though 4 were tried before


def test_several_hosts_grow_by_whole_hosts():
    more = next(change for change in advice("hosts").changes if " more " in change.what)
    assert more.what == "2 more hosts of 1, 4 devices in all"
    assert [len(host.devices) for host in more.request.cluster.hosts] == [1] * 4


def test_the_least_memory_is_told():
    asked = CASES["two ranks"]
    roomier = advice("two ranks").changes[-1]
    assert roomier.what.startswith("devices with ")
    room = roomier.priced.fit.groups[0].cap_bytes
    plan(replace(asked, cluster=boxes("H100", "H100", memory=room)))
    assert fitting(replace(asked, cluster=boxes("H100", "H100", memory=room / 1.05))) is None


def test_adapters_train_less():
    asked = CASES["two ranks"]
    adapted = next(change for change in advice("two ranks").changes if "LoRA" in change.what)
    chain = adapted.request.chain_of(1)
    assert sum(each.num_bytes for each in chain.parameters if not each.trains) == sum(
        each.num_bytes for each in asked.chain_of(1).parameters
    )
    least = sum(need.allocated for need in adapted.priced.fit.memory)
    assert least < sum(each.num_elements for each in asked.chain_of(1).parameters) * 16


def only_a_head_too_large() -> Cluster:
    return boxes("H100", "H100", memory=3.5e6)


def test_a_layer_that_no_device_holds_is_named_with_the_degree_that_parts_it():
    asked = request(only_a_head_too_large(), levers=PIPELINE_ONLY)
    told = str(advised_of(asked))
    # 4096 x 64 elements of 16 bytes, with 32 rows of 64 floats out and twice that besides; as the head.
    assert "embedding alone needs 4.0 MiB for a microbatch of 1, and no device has more than 3.3 MiB" in told
    assert "tensor parallelism over 2 makes it" in told
    assert too_large(request(boxes("H100", memory=5e6))) is None


@pytest.mark.parametrize("memory", [3.5e6, 1.2e6, 0.8e6])
def test_that_degree_is_the_least(memory):
    asked = request(boxes("H100", memory=memory))
    degree = int(too_large(asked).split("parallelism over ")[1].split()[0])
    assert degree > 1
    for parts, fits in ((degree, True), (degree - 1, False)):
        parted = replace(
            asked,
            chain_of=lambda rows, n=parts: tensor_parallel(language_model(asked.cluster)(rows), Peers(n)),
        )
        assert (too_large(parted) is None) == fits


def test_what_fits_is_one_of_the_choices():
    asked = request(boxes("H100", "H100", memory=9e6))
    found = fitting(asked)
    plain = replace(found.choice, recompute="none", degrees=replace(found.choice.degrees, sharding="none"))
    assert plain in list(choices(asked))
    assert all(need.allocated <= 9e6 for need in found.fit.memory)
