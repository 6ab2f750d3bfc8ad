"""Cluster files: what is written is read again, and what is wrong is said by its key."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenflow.cluster.cluster import Cluster, Host
from evenflow.cluster.device import Device
from evenflow.cluster.links import LINKS
from evenflow.cluster.presets import PRESETS
from evenflow.cluster.read import read_cluster
from evenflow.cluster.short import parse_cluster
from evenflow.cluster.sizes import parse_bytes, write_bytes
from evenflow.cluster.write import format_cluster, write_cluster
from evenflow.errors import ConfigError
from evenflow.ir.costs import Link

EXAMPLE = """
[[hosts]]
count = 2
devices = [{kind = "RTX 4090", count = 2}, {kind = "big", memory = "40GiB"}, {kind = "big"}]
memory = "20GiB"
link = "pcie 4.0 x16"

[[hosts]]
devices = [{kind = "H100"}]

[network]
link = "own"

[devices.big]
teraflops = {float32 = 20, bfloat16 = 150.5}
memory = "48GiB"
memory_gib_per_second = 900
efficiency = 0.6

[links.own]
latency_us = 20
gib_per_second = 11.5

[[measured]]
from = 0
to = 1
latency_us = 12.5
gib_per_second = 20
"""


def read(folder: Path, text: str) -> Cluster:
    path = folder / "cluster.toml"
    path.write_text(text)
    return read_cluster(path)


def test_an_example(tmp_path: Path) -> None:
    cluster = read(tmp_path, EXAMPLE)
    assert [device.name for device in cluster.devices] == ["RTX 4090", "RTX 4090", "big", "big"] * 2 + [
        "H100"
    ]
    gib = [device.memory_bytes / 2**30 for device in cluster.devices]
    assert gib == [20, 20, 40, 20] * 2 + [PRESETS["H100"].memory_bytes / 2**30]
    big = cluster.devices[2]
    assert big.flops_per_second == {"float32": 20e12, "bfloat16": 150.5e12}
    assert big.memory_bytes_per_second == 900 * 2**30
    assert cluster.link_between(0, 4) == Link(20e-6, 11.5 * 2**30)
    assert cluster.link_between(0, 1) == Link(12.5e-6, 20 * 2.0**30)
    assert cluster.link_between(1, 0) == LINKS["PCIe 4.0 x16"]
    assert cluster.hosts[2].link == LINKS["NVLink 4"]


def test_a_person_can_read_what_is_written() -> None:
    text = format_cluster(parse_cluster("4x8xH100"))
    assert "count = 4" in text
    assert '{kind = "H100", count = 8}' in text
    assert 'link = "InfiniBand NDR"' in text


def to_15_digits(value: float) -> float:
    return float(f"{value:.15g}")


rates = st.floats(1e-3, 1e18).map(to_15_digits)
links = st.one_of(
    st.sampled_from(list(LINKS.values())),
    st.builds(Link, st.floats(0, 10).map(to_15_digits), st.one_of(rates, st.just(float("inf")))),
)
own = st.builds(
    Device,
    name=st.sampled_from(["one", "a b", 'qu"ote', "H100"]),
    flops_per_second=st.dictionaries(st.sampled_from(["float32", "bfloat16"]), rates, min_size=1),
    memory_bytes=st.floats(1e9, 1e13),
    memory_bytes_per_second=rates,
    reserved_bytes=st.floats(0, 9e8),
    efficiency=st.floats(0.01, 1),
    source=st.text("abc é\"\\'#"),
    kernel_seconds=st.floats(0, 1e-3).map(to_15_digits),
    communicator_bytes=st.floats(0, 9e8),
)


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    kinds = draw(st.lists(own, min_size=1, max_size=3, unique_by=lambda device: device.name))
    names = {device.name for device in kinds}
    kinds += [device for device in PRESETS.values() if device.name not in names]
    devices = st.lists(st.sampled_from(kinds), min_size=1, max_size=5).map(tuple)
    hosts = draw(st.lists(st.builds(Host, devices, links), min_size=1, max_size=4))
    num_ranks = sum(len(host.devices) for host in hosts)
    ranks = st.integers(0, num_ranks - 1)
    pairs = st.tuples(ranks, ranks).filter(lambda pair: pair[0] != pair[1])
    measured = draw(st.dictionaries(pairs, links, max_size=3)) if num_ranks > 1 else {}
    cluster = Cluster(tuple(hosts), draw(links), measured)
    return cluster.with_memory(draw(st.floats(2e9, 1e13))) if draw(st.booleans()) else cluster


@settings(max_examples=50, deadline=None)
@given(clusters())
def test_what_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> None:
    path = tmp_path_factory.getbasetemp() / "cluster.toml"
    write_cluster(cluster, path)
    assert read_cluster(path) == cluster


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("count = 2\n", "cuont = 2\n", "unknown key 'hosts[0].cuont'; did you mean 'count'?"),
        ("[network]", "[netwrk]", "unknown key 'netwrk'; did you mean 'network'?"),
        ("count = 2\n", "count = 0\n", "hosts[0].count = 0 must be at least 1"),
        ("count = 2\n", "count = 2.5\n", "hosts[0].count = 2.5 must be a whole number"),
        ("count = 2\n", "count = true\n", "hosts[0].count = True must be a whole number"),
        ('"20GiB"', "20", "hosts[0].memory = 20 must be a string"),
        ('"20GiB"', '"20"', "hosts[0].memory: '20' is no size"),
        ('"20GiB"', '"20MiB"', "hosts[0].memory: device RTX 4090: reserved_bytes"),
        ('"H100"', '"H101"', "hosts[1].devices[0].kind: unknown device 'H101'; did you mean 'H100'?"),
        ('link = "own"', 'link = "owm"', "network.link: unknown link 'owm'; did you mean 'own'?"),
        ('link = "own"', "", "write [network]"),
        ("float32 = 20", "float31 = 20", "unknown key 'devices.big.teraflops.float31'"),
        ("efficiency = 0.6", "efficiency = 1.6", "device big: efficiency = 1.6"),
        ("efficiency = 0.6", "", "devices.big.efficiency is missing"),
        ("efficiency = 0.6", 'efficiency = "a"', "devices.big.efficiency = 'a' must be a number"),
        ("latency_us = 20", "latency_us = -20", "links.own.latency_us = -20 must be at least 0"),
        ("gib_per_second = 11.5", "gib_per_second = 0", "links.own.gib_per_second = 0 must be above 0"),
        ("gib_per_second = 11.5", "gib_per_second = nan", "links.own.gib_per_second = nan must be above 0"),
        ("latency_us = 20", "latency_us = inf", "latency must be finite"),
        ("to = 1", "to = 9", "there are ranks 0 to 8"),
        ("to = 1", "to = -1", "measured[0].to = -1 must be at least 0"),
        ("[[hosts]]", "[[host]]", "unknown key 'host'"),
        ("[[measured]]", "[measured]", "measured = {"),
        ("[links.own]", "[links]", "links.latency_us = 20 must be a table"),
        ("[[hosts]]", "[[hosts", "no valid TOML"),
        ("[links.own]", "[links]\nown = 3\n[devices.unused]", "links.own = 3 must be a table"),
        ('kind = "big"', 'kind = "b\\u0007g"', "must hold no control characters"),
        ("[links.own]", '[links."o\\u0007n"]', "under links has control characters"),
        ("latency_us = 20", "latency_us = 1e200", "must be at most 1e+100"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, before: str, after: str, message: str) -> None:
    assert before in EXAMPLE
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, EXAMPLE.replace(before, after))
    assert "cluster.toml" in str(caught.value)
    assert message in str(caught.value)


def test_a_pair_twice_and_no_host(tmp_path: Path) -> None:
    pair = EXAMPLE[EXAMPLE.index("[[measured]]") :]
    with pytest.raises(ConfigError, match="the link from 0 to 1 is there twice"):
        read(tmp_path, EXAMPLE + pair)
    with pytest.raises(ConfigError, match="there is no host"):
        read(tmp_path, "")
    with pytest.raises(ConfigError, match="names none"):
        read(tmp_path, "[[hosts]]\n")
    with pytest.raises(ConfigError, match="No such file"):
        read_cluster(tmp_path / "none.toml")


@given(st.one_of(st.integers(0, 2**60).map(float), st.floats(0, 1e18)))
def test_a_size_is_read_as_it_is_written(num_bytes: float) -> None:
    assert parse_bytes(write_bytes(num_bytes)) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "1", "1 XiB", "-1GiB", "1e3GiB", "1,5GiB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="is no size"):
        parse_bytes(text)


def test_several_hosts_over_a_network_that_costs_nothing(tmp_path: Path) -> None:
    host = parse_cluster("2xH100").hosts[0]
    cluster = Cluster((host, host))
    assert read(tmp_path, format_cluster(cluster)) == cluster
