"""What an examination means: the advice, and the cluster."""

from dataclasses import replace

import pytest

from evenflow.cluster.presets import PRESETS
from evenflow.doctor.advice import advice
from evenflow.doctor.cluster_of import cluster_of
from evenflow.doctor.examine import Examination, Place, pairs
from evenflow.doctor.exchange import Exchange
from evenflow.doctor.run import run
from evenflow.doctor.worker import Fault
from evenflow.errors import ConfigError
from evenflow.ir.costs import Link

GIB = 2.0**30
GOOD = Exchange(1e-5, 20 * GIB, 20 * GIB, 15 * GIB, 0.9)
GPU = Place(
    host="box",
    device="cuda:0",
    device_name="NVIDIA GeForce RTX 4090",
    memory_bytes=24 * GIB,
    flops_per_second=5e13,
    peers=(1,),
    shared_memory_bytes=8 * GIB,
    interfaces=("lo", "eth0"),
    iommu=False,
    settings={},
)


def of(first, second, link):
    return Examination((first, second), {(0, 1): link})


def test_nothing_is_said_where_all_is_well():
    assert advice(of(GPU, GPU, GOOD)) == ()


@pytest.mark.parametrize(
    ("changed", "link", "words"),
    [
        ({}, Fault("no answer within 20 s"), "NCCL_P2P_DISABLE=1"),
        ({"iommu": True}, Fault("WrongDataError: of 7 bytes 1 arrived changed"), "ACS"),
        ({"shared_memory_bytes": 64 * 2.0**20}, GOOD, "--shm-size"),
        ({"peers": ()}, GOOD, "do not all reach each other's memory"),
        ({"settings": {"NCCL_SOCKET_IFNAME": "ens"}}, GOOD, "which has lo, eth0"),
        ({"settings": {"NCCL_SOCKET_IFNAME": "=eth"}}, GOOD, "which has lo, eth0"),
        ({}, replace(GOOD, back_bytes_per_second=GIB), "PCIe lanes"),
    ],
)
def test_each_trouble_has_its_advice(changed, link, words):
    place = replace(GPU, **changed)
    assert any(words in piece for piece in advice(of(place, place, link)))


@pytest.mark.parametrize("setting", ["eth", "=eth0", "^docker", "ib,eth"])
def test_interfaces_that_are_there(setting):
    place = replace(GPU, settings={"NCCL_SOCKET_IFNAME": setting})
    assert advice(of(place, place, GOOD)) == ()


def test_what_was_tried_is_not_advised_again():
    place = replace(GPU, settings={"NCCL_P2P_DISABLE": "1"})
    assert advice(of(place, place, Fault("no answer"))) == ()


def test_between_hosts():
    other = replace(GPU, host="other")
    assert any("firewall" in piece for piece in advice(of(GPU, other, Fault("no answer"))))
    slow = replace(GOOD, there_bytes_per_second=GIB)
    assert any("faster network" in piece for piece in advice(of(GPU, other, slow)))


def test_the_cluster_has_the_median_and_names_who_differs():
    slow = replace(GOOD, there_bytes_per_second=5 * GIB)
    far = replace(GOOD, latency_seconds=1e-4, there_bytes_per_second=3 * GIB, back_bytes_per_second=3 * GIB)
    places = (GPU, GPU, GPU, replace(GPU, host="other", device_name="NVIDIA Unheard-of"))
    links = {pair: far if pair[1] == 3 else GOOD for pair in pairs(4)} | {(0, 1): slow}
    cluster = cluster_of(Examination(places, links))
    assert [len(host.devices) for host in cluster.hosts] == [3, 1]
    assert cluster.devices[0] == PRESETS["RTX 4090"]
    assert cluster.devices[3].flops_per_second == {"float32": 5e13}
    assert cluster.network == Link(1e-4, 3 * GIB)
    assert cluster.link_between(1, 0) == Link(1e-5, 20 * GIB)
    assert cluster.measured == {(0, 1): Link(1e-5, 5 * GIB)}


def test_a_pair_that_failed_is_not_in_the_cluster():
    links = dict.fromkeys(pairs(3), GOOD) | {(0, 2): Fault("no answer")}
    assert cluster_of(Examination((GPU,) * 3, links)).measured == {}
    with pytest.raises(ConfigError, match="no link could be measured"):
        cluster_of(of(GPU, GPU, Fault("no answer")))
    mixed = (GPU, replace(GPU, host="other"), GPU)
    with pytest.raises(ConfigError, match="must be in a row"):
        cluster_of(Examination(mixed, dict.fromkeys(pairs(3), GOOD)))


@pytest.mark.parametrize(
    ("device", "num_ranks", "timeout_seconds", "message"),
    [
        ("cpu", 1, 1.0, "a link needs two ranks"),
        ("tpu", 2, 1.0, "choose cpu or cuda"),
        ("cpu", 2, 0.0, "leaves no time"),
        ("cuda", 99, 1.0, "need as many GPUs"),
    ],
)
def test_what_cannot_be_examined(device, num_ranks, timeout_seconds, message):
    with pytest.raises(ConfigError, match=message):
        run(device, num_ranks, timeout_seconds=timeout_seconds)
