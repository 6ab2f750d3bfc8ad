"""The check on parameters alone: what it refuses can't be planned, and what it advises has room."""

import re

import pytest
from chains import language_model

from evenflow.cluster.cluster import Cluster
from evenflow.cluster.short import parse_cluster
from evenflow.plan.planner import NoPlanError, plan
from evenflow.plan.rank_memory import TrainingState
from evenflow.plan.request import Request
from evenflow.plan.shortage.weights import (
    Weights,
    WeightsDoNotFitError,
    check_weights,
    needed_bytes,
    room_bytes,
)

ADAMW_BF16 = TrainingState(optimizer_bytes=4.0, update_bytes=2.0)
LLAMA_70B = Weights(70_553_706_496, 141_107_412_992, 70_553_706_496, 141_107_412_992, 13_079_808)
GIB = 2.0**30


def refusal(weights: Weights, cluster: Cluster, state: TrainingState) -> WeightsDoNotFitError:
    with pytest.raises(WeightsDoNotFitError) as raised:
        check_weights(weights, cluster, state)
    return raised.value


def test_70_billion_parameters_on_one_card_are_told_in_numbers():
    told = refusal(LLAMA_70B, parse_cluster("1x RTX 4090"), ADAMW_BF16)
    assert told.needed_bytes == 70_553_706_496 * (2 + 2 + 4 + 2)
    assert told.room_bytes == (24_564 - 1024) * 2**20
    text = str(told)
    assert "parameters alone, each held once, need 657.1 GiB, and all devices together have 23.0 GiB" in text
    for line in (
        r"parameters +70,553,706,496 x 2 bytes +131\.4 GiB",
        r"gradients +70,553,706,496 x 2 bytes +131\.4 GiB",
        r"the optimizer's states +70,553,706,496 x 4 bytes +262\.8 GiB",
        r"RTX 4090 +1 x \(24\.0 GiB less 1\.0 GiB reserved\) +23\.0 GiB",
    ):
        assert re.search(line, text), line


def test_the_smallest_change_comes_first():
    text = str(refusal(LLAMA_70B, parse_cluster("1x RTX 4090"), ADAMW_BF16))
    changes = re.findall(r"^- (\w+).*?, (\d+) devices in all$", text, re.MULTILINE)
    # 131.4 GiB that are frozen and 209 million elements of 20 bytes; 262.8 GiB; 657.1 GiB: over 23 GiB each.
    assert changes == [("LoRA", "6"), ("SGD", "12"), ("as", "29")]


@pytest.mark.parametrize("devices", ["2x RTX 3090", "RTX 4090 + 2x A100 40GB"])
def test_so_many_more_devices_have_room_and_one_fewer_has_not(devices):
    cluster = parse_cluster(devices)
    text = str(refusal(LLAMA_70B, cluster, ADAMW_BF16))
    more, name, all_of_them = re.search(r"as it is.*takes (\d+) more (.+), (\d+) devices", text).groups()
    assert int(all_of_them) == cluster.num_ranks + int(more)
    check_weights(LLAMA_70B, parse_cluster(f"{devices} + {more}x {name}"), ADAMW_BF16)
    refusal(LLAMA_70B, parse_cluster(f"{devices} + {int(more) - 1}x {name}"), ADAMW_BF16)


def test_what_would_have_room_as_it_is_says_so():
    cluster = parse_cluster("8x RTX 4090")
    text = str(refusal(LLAMA_70B, cluster, ADAMW_BF16))
    assert re.search(r"- LoRA of rank 16 .* = 135\.3 GiB; the devices that are there have room", text)


def test_what_does_not_help_is_not_advised():
    adapted = Weights(10**10, 4 * 10**10, 10**6, 4 * 10**6, 10**6)
    text = str(refusal(adapted, parse_cluster("1x RTX 4090"), TrainingState()))
    assert "LoRA" not in text  # its adapters would be larger than what is trained now
    assert re.search(r"- SGD without momentum.* = 37\.3 GiB", text)
    half = Weights(10**11, 2 * 10**11, 10**11, 2 * 10**11)
    plain = TrainingState(optimizer_bytes=0.0, update_bytes=0.0)
    changes = re.findall("^- .*$", str(refusal(half, parse_cluster("1x RTX 4090"), plain)), re.MULTILINE)
    assert len(changes) == 1
    assert changes[0].startswith("- as it is")


def test_parameters_in_float32_may_be_halved():
    weights = Weights(10**10, 4 * 10**10, 10**10, 4 * 10**10)
    text = str(refusal(weights, parse_cluster("1x RTX 4090"), TrainingState()))
    halved = TrainingState(optimizer_bytes=4.0, update_bytes=2.0)
    expected = needed_bytes(Weights(10**10, 2 * 10**10, 10**10, 2 * 10**10), halved) / GIB
    assert re.search(rf"- parameters in bfloat16.* = {expected:.1f} GiB", text)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_what_is_refused_has_no_plan(share):
    cluster = parse_cluster("2x RTX 4090")
    state = TrainingState(optimizer_bytes=8.0, update_bytes=4.0)
    chain = language_model(cluster)(1)
    elements = sum(parameter.num_elements for parameter in chain.parameters)
    weights = Weights(elements, 4 * elements, elements, 4 * elements)
    reserved = cluster.devices[0].reserved_bytes
    small = cluster.with_memory(reserved + share * needed_bytes(weights, state) / 2)
    refusal(weights, small, state)
    with pytest.raises(NoPlanError):
        plan(Request(language_model(cluster), (1,), small, 4, 32.0, 0.05, state, dtype="float32"))
    assert room_bytes(small) == pytest.approx(share * needed_bytes(weights, state))
