"""Cluster files: a cluster as TOML that a person can write, read and edit.

[[hosts]]
count = 2                                     # two hosts alike; 1 where it is not said
devices = [{kind = "RTX 4090", count = 2}, {kind = "big", memory = "40GiB"}]
link = "PCIe 4.0 x16"                         # between the devices of a host

[network]
link = "25 Gb Ethernet"                       # between hosts

[devices.big]                                 # a device that is no preset
teraflops = {float32 = 20, bfloat16 = 150}    # dense peaks
memory = "48GiB"
memory_gib_per_second = 900
efficiency = 0.6                              # the share of the peak that large matrix products reach

[links.own]                                   # a link that is no preset
latency_us = 20
gib_per_second = 11.5

[[measured]]                                  # one pair of ranks that differs
from = 0
to = 1
latency_us = 12
gib_per_second = 20
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from evenflow.cluster.cluster import MOST_RANKS, Cluster, Host, check_size
from evenflow.cluster.device import Device
from evenflow.cluster.links import link_called
from evenflow.cluster.presets import device_called
from evenflow.cluster.short import usual_link
from evenflow.cluster.table import Table
from evenflow.errors import ConfigError
from evenflow.foreign import read_toml
from evenflow.ir.costs import Link

_TOP = ("hosts", "network", "devices", "links", "measured")
_HOST = ("count", "devices", "memory", "link")
_PART = ("kind", "count", "memory")
_RATES = ("latency_us", "gib_per_second")
_DEVICE = (
    *("teraflops", "memory", "memory_gib_per_second", "reserved"),
    *("efficiency", "kernel_us", "communicator", "source"),
)
_DTYPES = ("float64", "float32", "bfloat16", "float16", "float8")
_GIB = 2.0**30


def read_cluster(path: Path) -> Cluster:
    r"""Read a cluster file; `ConfigError` says which key is wrong, and how.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "cluster.toml"
    ...     _ = path.write_text('[[hosts]]\ndevices = [{kind = "H100", count = 8}]')
    ...     read_cluster(path).num_ranks
    8
    """
    content = read_toml(path, "cluster")
    try:
        return _cluster(Table(content, "", _TOP))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _cluster(top: Table) -> Cluster:
    links = {name: _link(table) for name, table in top.named_tables("links", _RATES).items()}
    own = {name: _device(name, table) for name, table in top.named_tables("devices", _DEVICE).items()}
    hosts: list[Host] = []
    num_devices = 0
    for table in top.tables("hosts", _HOST):
        host, count = _host(table, own, links), _count(table)
        num_devices += count * len(host.devices)
        check_size(num_devices)
        hosts += [host] * count
    if not hosts:
        raise ConfigError("there is no host: write [[hosts]], and below it which devices it has")
    network = top.table("network", ("link",))
    if len(hosts) > 1 and "link" not in network:
        raise ConfigError('there are several hosts: write [network], and below it link = "…"')
    measured: dict[tuple[int, int], Link] = {}
    for table in top.tables("measured", ("from", "to", *_RATES)):
        pair = _rank(table, "from"), _rank(table, "to")
        if pair in measured:
            raise ConfigError(f"{table.where('from')}: the link from {pair[0]} to {pair[1]} is there twice")
        measured[pair] = _link(table)
    return Cluster(tuple(hosts), _named_link(network, links) if "link" in network else Link(), measured)


def _host(table: Table, own: Mapping[str, Device], links: Mapping[str, Link]) -> Host:
    devices: list[Device] = []
    for part in table.tables("devices", _PART):
        try:
            device = device_called(part.text("kind"), own)
        except ConfigError as error:
            raise ConfigError(f"{part.where('kind')}: {error}") from None
        for given in (part, table):
            if "memory" in given:
                device = _with_memory(device, given)
                break
        check_size(len(devices) + _count(part))
        devices += [device] * _count(part)
    if not devices:
        raise ConfigError(
            f'{table.where("devices")} names none: write devices = [{{kind = "H100", count = 8}}]'
        )
    return Host(tuple(devices), _named_link(table, links) if "link" in table else usual_link(devices))


def _count(table: Table) -> int:
    return table.whole("count", least=1, most=MOST_RANKS) if "count" in table else 1


def _rank(table: Table, key: str) -> int:
    return table.whole(key, least=0, most=MOST_RANKS)


def _with_memory(device: Device, table: Table) -> Device:
    memory_bytes = table.size("memory")
    try:
        return replace(device, memory_bytes=memory_bytes)
    except ConfigError as error:
        raise ConfigError(f"{table.where('memory')}: {error}") from None


def _named_link(table: Table, links: Mapping[str, Link]) -> Link:
    try:
        return link_called(table.text("link"), links)
    except ConfigError as error:
        raise ConfigError(f"{table.where('link')}: {error}") from None


def _link(table: Table) -> Link:
    latency_seconds = table.number("latency_us", power=-6)
    return Link(latency_seconds, table.number("gib_per_second", above_zero=True) * _GIB)


def _device(name: str, table: Table) -> Device:
    rates = table.table("teraflops", _DTYPES)
    return Device(
        name,
        {dtype: rates.number(dtype, power=12) for dtype in rates.keys},
        memory_bytes=table.size("memory"),
        memory_bytes_per_second=table.number("memory_gib_per_second") * _GIB,
        reserved_bytes=table.size("reserved") if "reserved" in table else 0.0,
        efficiency=table.number("efficiency"),
        source=table.text("source") if "source" in table else "the cluster file",
        kernel_seconds=table.number("kernel_us", power=-6) if "kernel_us" in table else 0.0,
        communicator_bytes=table.size("communicator") if "communicator" in table else 0.0,
    )
