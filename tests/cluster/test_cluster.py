"""Clusters: whose link is whose, short forms, and devices one can name."""

import time

import pytest

from evenflow.cluster.cluster import Cluster, Host
from evenflow.cluster.device import Device, calibrated
from evenflow.cluster.links import LINKS, link_called
from evenflow.cluster.presets import PRESETS, USUAL_LINK, device_called
from evenflow.cluster.short import parse_cluster, usual_link
from evenflow.errors import ConfigError
from evenflow.ir.costs import Link

TOY = Device("toy", {"float32": 1e12}, 2.0**30, 1e11, 0.0, 0.5, "made up")
FAST, SLOW, KNOWN = Link(1e-5, 1e11), Link(1e-4, 1e9), Link(1e-3, 5e8)


def test_the_link_between_two_ranks() -> None:
    cluster = Cluster((Host((TOY,) * 2, FAST), Host((TOY,) * 3, KNOWN)), SLOW, {(0, 1): KNOWN})
    assert cluster.host_of == (0, 0, 1, 1, 1)
    assert cluster.link_between(0, 1) == KNOWN
    assert cluster.link_between(1, 0) == FAST
    assert cluster.link_between(1, 2) == cluster.link_between(4, 0) == SLOW
    assert cluster.link_between(4, 2) == KNOWN


def test_two_thousand_ranks_are_cheap() -> None:
    start = time.perf_counter()
    cluster = parse_cluster("256x8xH100")
    links = {cluster.link_between(rank, rank + 1) for rank in range(cluster.num_ranks - 1)}
    assert time.perf_counter() - start < 10  # milliseconds on a machine that does nothing else
    assert links == {LINKS["NVLink 4"], LINKS["InfiniBand NDR"]}


@pytest.mark.parametrize("measured", [(0, 2), (-1, 0), (1, 1)])
def test_a_measured_pair_must_be_two_ranks(measured: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="there are ranks 0 to 1"):
        Cluster((Host((TOY,) * 2, FAST),), measured={measured: SLOW})


def test_two_kinds_may_not_share_a_name_but_may_differ_in_memory() -> None:
    other = calibrated(TOY, flops=1e12, seconds=4.0, dtype="float32")
    with pytest.raises(ConfigError, match="two different kinds of device are called 'toy'"):
        Cluster((Host((TOY, other), FAST),))
    cluster = Cluster((Host((TOY,), FAST), Cluster((Host((TOY,), FAST),)).with_memory(2.0**31).hosts[0]))
    assert [device.memory_bytes for device in cluster.devices] == [2.0**30, 2.0**31]


def test_no_hosts_and_no_devices() -> None:
    with pytest.raises(ConfigError, match="at least one host"):
        Cluster(())
    with pytest.raises(ConfigError, match="without a device"):
        Host((), FAST)


@pytest.mark.parametrize(
    ("text", "names", "num_hosts"),
    [
        ("8xH100", ["H100"] * 8, 1),
        ("h200", ["H200"], 1),
        ("2x RTX 4090 + 2x rtx3090", ["RTX 4090"] * 2 + ["RTX 3090"] * 2, 1),
        ("2 × 2 × A100 + L40S", ["L40S"] + ["A100 80GB"] * 4, 3),
    ],
)
def test_short_forms(text: str, names: list[str], num_hosts: int) -> None:
    cluster = parse_cluster(text)
    assert [device.name for device in cluster.devices] == names
    assert len(cluster.hosts) == num_hosts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8xH10O", "unknown device 'H10O'; did you mean 'H100'"),
        ("8x", "unknown device '8x'"),
        ("H100 +", "names no device"),
        ("0xH100", "no devices"),
        ("0x8xH100", "no devices"),
    ],
)
def test_wrong_short_forms(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_cluster(text)


def test_the_slowest_link_of_a_host_counts() -> None:
    assert usual_link([PRESETS["H100"], PRESETS["RTX 3090"]]) == LINKS["PCIe 4.0 x16"]
    with pytest.raises(ConfigError, match="how the devices 'toy'"):
        usual_link([TOY])


def test_presets_are_whole() -> None:
    assert set(USUAL_LINK) == set(PRESETS)
    assert all(link_called(name) for name in USUAL_LINK.values())
    assert all(device.source for device in PRESETS.values())


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA L40S", "L40S"),
    ],
)
def test_devices_under_the_names_that_drivers_give(driver: str, name: str) -> None:
    assert device_called(driver).name == name


@pytest.mark.parametrize(
    ("flops", "seconds", "dtype", "message"),
    [
        (2e12, 1.0, "float32", "2.00 times its peak"),
        (1e12, 0.0, "float32", "takes time"),
        (0.0, 1.0, "float32", "takes time"),
        (1e11, 1.0, "bfloat16", "no rate for bfloat16; it has float32"),
    ],
)
def test_impossible_measurements(flops: float, seconds: float, dtype: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        calibrated(TOY, flops=flops, seconds=seconds, dtype=dtype)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"flops_per_second": {}}, "flops_per_second is empty"),
        ({"flops_per_second": {"float32": -1.0}}, "flops_per_second of float32 = -1 must be above 0"),
        ({"memory_bytes": float("nan")}, "memory_bytes = nan"),
        ({"reserved_bytes": 2.0**31}, "less than memory_bytes"),
        ({"efficiency": 0.0}, "efficiency = 0"),
        ({"kernel_seconds": -1.0}, "kernel_seconds = -1"),
        ({"communicator_bytes": -1.0}, "communicator_bytes = -1"),
    ],
)
def test_impossible_devices(changed: dict[str, object], message: str) -> None:
    right = {
        "name": "toy",
        "flops_per_second": {"float32": 1e12},
        "memory_bytes": 2.0**30,
        "memory_bytes_per_second": 1e11,
        "reserved_bytes": 0.0,
        "efficiency": 0.5,
        "source": "made up",
    }
    with pytest.raises(ConfigError, match=message):
        Device(**{**right, **changed})
