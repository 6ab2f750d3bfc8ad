"""What would help a run that ran out of memory: each remedy's figures are those of the run that it makes."""

from dataclasses import replace

import pytest

from evenflow.cluster.cluster import Cluster, Host
from evenflow.cluster.device import Device
from evenflow.ir.costs import Link
from evenflow.plan.chain import Chain, Held, Parameter, Seconds
from evenflow.plan.choice import Choice, Degrees
from evenflow.plan.request import Request
from evenflow.plan.scale import in_proportion
from evenflow.plan.search.fit import at_cuts, groups_of
from evenflow.plan.shortage.remedies import peak_bytes, remedies, step_seconds

NUM_NODES, RANKS, MICROBATCHES = 12, 4, 16
CPU = Device("cpu", {"float32": 1e12}, 1e9, 1e10, 0.0, 1.0, "made up")
ONES = (1.0,) * NUM_NODES
CHAIN = Chain(
    names=tuple(f"layer{at}" for at in range(NUM_NODES)),
    num_rows=4,
    flops=ONES,
    seconds={"cpu": Seconds(ONES, ONES, ONES)},
    saved=tuple(Held(100.0, (at,)) for at in range(NUM_NODES)),
    kept=tuple(Held(40.0, (at,)) for at in range(NUM_NODES)),
    parameters=tuple(Parameter(f"w{at}", 10, 40, True, (at,)) for at in range(NUM_NODES)),
    forward_transient_bytes=ONES,
    backward_transient_bytes=ONES,
    cut_bytes=ONES,
    legal=(True,) * NUM_NODES,
)
POSITIONS = (3, 6, 9)


def run(schedule="gpipe", positions=POSITIONS):
    request = Request(
        lambda _: CHAIN, (4,), Cluster((Host((CPU,) * RANKS, Link()),)), 4 * MICROBATCHES, 1.0, 1.0
    )
    choice = Choice(Degrees(RANKS), 1, schedule, 4, MICROBATCHES, "none")
    groups = groups_of(request.cluster, choice.degrees)
    return request, choice, at_cuts(request, choice, CHAIN, positions, groups)


def test_a_schedule_that_holds_less_is_found_with_what_it_takes():
    request, choice, now = run()
    found = {each.what: each for each in remedies(request, choice, now, 1e9)}
    (named,) = [what for what in found if what.startswith("schedule=")]
    other = run(named.removeprefix('schedule="').removesuffix('"'))[2]
    assert found[named].peak_bytes == peak_bytes(other) < peak_bytes(now) / 2
    assert found[named].step_seconds == step_seconds(other) <= step_seconds(now)


def test_what_fits_comes_first_and_the_fastest_of_it():
    request, choice, now = run("1f1b", positions=(9, 10, 11))
    every = remedies(request, choice, now, 1e9)
    assert len(every) > 3
    assert [each.step_seconds for each in every] == sorted(each.step_seconds for each in every)
    room = sorted(each.peak_bytes for each in every)[1]
    some = remedies(request, choice, now, room)
    fits = [each.peak_bytes <= room for each in some]
    assert fits == sorted(fits, reverse=True)
    assert sum(fits) >= 2


def test_cuts_that_hold_less_are_found():
    request, choice, now = run("1f1b", positions=(9, 10, 11))
    found = [each for each in remedies(request, choice, now, 1e9) if "cuts" in each.what]
    assert len(found) == 1
    assert found[0].peak_bytes < 0.7 * peak_bytes(now)
    assert found[0].what.startswith('other cuts, before "layer')


def test_one_row_is_not_parted():
    request, choice, now = run()
    one = replace(choice, microbatch_size=1)
    every = remedies(request, one, now, 1e9)
    assert not [each for each in every if "microbatch_size" in each.what]


def test_ranks_that_share_one_memory_are_added_up_and_nothing_is_moved():
    request, choice, now = run("1f1b", positions=(9, 10, 11))
    every = remedies(request, choice, now, 1e9, alone=True, offloads=True)
    assert peak_bytes(now, alone=True) == sum(each.allocated for each in now.memory)
    assert step_seconds(now, alone=True) == MICROBATCHES * 3 * NUM_NODES
    assert not [each for each in every if "cuts" in each.what or "ranks" in each.what]


def test_what_waits_on_the_host_is_there_for_one_microbatch():
    request, choice, now = run()
    saved = tuple(Held(2.0**17, held.nodes) for held in CHAIN.saved)
    large = replace(now, chain=replace(CHAIN, saved=saved))
    large = at_cuts(request, choice, large.chain, now.positions, now.groups)
    found = {each.what: each for each in remedies(request, choice, large, 1e9, offloads=True)}
    offloaded = found['offload="activations"']
    assert offloaded.step_seconds == step_seconds(large)
    assert offloaded.peak_bytes < 1.1 * peak_bytes(large) / MICROBATCHES


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_a_chain_in_proportion_has_its_parameters_whole(rows):
    scaled = in_proportion(CHAIN, rows)
    assert scaled.num_rows == rows
    assert [each.num_bytes for each in scaled.saved] == [25.0 * rows] * NUM_NODES
    assert scaled.seconds["cpu"].forward == (0.25 * rows,) * NUM_NODES
    assert scaled.parameters == CHAIN.parameters
