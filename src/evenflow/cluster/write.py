"""Writing a cluster file by hand, so that a person finds in it what to edit."""

import json
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from itertools import groupby
from pathlib import Path

from evenflow.cluster.cluster import Cluster, Host
from evenflow.cluster.device import Device
from evenflow.cluster.links import LINKS
from evenflow.cluster.presets import PRESETS
from evenflow.cluster.sizes import write_bytes
from evenflow.errors import ConfigError
from evenflow.ir.costs import Link

_GIB = 2.0**30


def write_cluster(cluster: Cluster, path: Path) -> None:
    """Write a file that `read_cluster` reads as the same cluster, to 15 digits. An existing one is replaced.

    Raises `ConfigError` where the file cannot be written.

    >>> from evenflow.cluster.short import parse_cluster
    >>> write_cluster(parse_cluster("8xH100"), Path("/dev/null/cluster.toml"))
    Traceback (most recent call last):
    ...
    evenflow.errors.ConfigError: cannot write the cluster /dev/null/cluster.toml: Not a directory
    """
    try:
        path.write_text(format_cluster(cluster), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the cluster {path}: {error.strerror}") from None


def format_cluster(cluster: Cluster) -> str:
    """Return the text of a cluster file.

    >>> from evenflow.cluster.short import parse_cluster
    >>> print(format_cluster(parse_cluster("2x RTX 4090 + 2x RTX 3090")))
    # Ranks count through the hosts, and through the devices of each.
    <BLANKLINE>
    [[hosts]]
    devices = [{kind = "RTX 4090", count = 2}, {kind = "RTX 3090", count = 2}]
    link = "PCIe 4.0 x16"  # between the devices of a host
    <BLANKLINE>
    """
    links = _link_names(cluster)
    blocks = ["# Ranks count through the hosts, and through the devices of each."]
    for host, alike in groupby(cluster.hosts):
        blocks.append("\n".join(_host(host, len(list(alike)), cluster, links)))
    if cluster.network in links:
        blocks.append(f"[network]\nlink = {_text(links[cluster.network])}  # between hosts")
    own = {device.name: device for device in reversed(cluster.devices) if not _is_preset(device)}
    blocks += ["\n".join(_device(device)) for device in own.values()]
    for link, name in links.items():
        if LINKS.get(name) != link:
            blocks.append(f"[links.{_text(name)}]\n{_link(link)}")
    blocks += [
        f"[[measured]]\nfrom = {source}\nto = {target}\n{_link(link)}"
        for (source, target), link in sorted(cluster.measured.items())
    ]
    return "\n\n".join(blocks) + "\n"


def _link_names(cluster: Cluster) -> dict[Link, str]:
    presets = {link: name for name, link in LINKS.items()}
    names: dict[Link, str] = {}
    networks = () if cluster.network == Link() and len(cluster.hosts) == 1 else (cluster.network,)
    for link in (*(host.link for host in cluster.hosts), *networks):
        names.setdefault(link, presets.get(link) or f"link {len(names)}")
    return names


def _is_preset(device: Device) -> bool:
    return device.name in PRESETS and device.same_kind(PRESETS[device.name])


def _host(host: Host, count: int, cluster: Cluster, links: dict[Link, str]) -> Iterator[str]:
    yield "[[hosts]]"
    if count > 1:
        yield f"count = {count}"
    parts = ", ".join(_part(list(alike), cluster) for _, alike in groupby(host.devices))
    yield f"devices = [{parts}]"
    yield f"link = {_text(links[host.link])}  # between the devices of a host"


def _part(alike: Sequence[Device], cluster: Cluster) -> str:
    device = alike[0]
    fields = {"kind": _text(device.name)}
    if len(alike) > 1:
        fields["count"] = str(len(alike))
    if _is_preset(device):
        usual = PRESETS[device.name].memory_bytes
    else:
        usual = next(each.memory_bytes for each in cluster.devices if each.name == device.name)
    if device.memory_bytes != usual:
        fields["memory"] = _text(write_bytes(device.memory_bytes))
    return "{" + ", ".join(f"{key} = {value}" for key, value in fields.items()) + "}"


def _device(device: Device) -> Iterable[str]:
    rates = ", ".join(f"{dtype} = {_scaled(rate, -12)}" for dtype, rate in device.flops_per_second.items())
    yield f"[devices.{_text(device.name)}]"
    yield f"teraflops = {{{rates}}}  # dense peaks"
    yield f"memory = {_text(write_bytes(device.memory_bytes))}"
    yield f"memory_gib_per_second = {device.memory_bytes_per_second / _GIB!r}"
    yield f"reserved = {_text(write_bytes(device.reserved_bytes))}"
    yield f"efficiency = {device.efficiency!r}  # the share of the peak that large matrix products reach"
    yield f"kernel_us = {_scaled(device.kernel_seconds, 6)}"
    yield f"communicator = {_text(write_bytes(device.communicator_bytes))}"
    yield f"source = {_text(device.source)}"


def _link(link: Link) -> str:
    return (
        f"latency_us = {_scaled(link.latency_seconds, 6)}\ngib_per_second = {link.bytes_per_second / _GIB!r}"
    )


def _scaled(value: float, power: int) -> str:
    """The number times 10 to the `power`, to the 15 digits that every float keeps, as TOML writes numbers."""
    return f"{Decimal(f'{value:.15g}').scaleb(power).normalize():f}"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # which TOML's basic strings are, but for what nobody types
