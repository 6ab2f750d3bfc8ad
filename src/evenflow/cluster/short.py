"""A cluster in a few words, for the shell: `8xH100`, `2x RTX 4090 + 2x RTX 3090`, `256x8xH100`."""

import re
from collections.abc import Sequence

from evenflow.cluster.cluster import Cluster, Host, check_size
from evenflow.cluster.device import Device
from evenflow.cluster.links import link_called
from evenflow.cluster.presets import USUAL_LINK, device_called
from evenflow.errors import ConfigError
from evenflow.ir.costs import Link

_PART = re.compile(r"(?:(\d{1,20})\s*[x×]\s*)?(?:(\d{1,20})\s*[x×]\s*)?(\S.*)", re.IGNORECASE)
_NETWORK = "InfiniBand NDR"


def parse_cluster(text: str) -> Cluster:
    """Return the cluster that a short form names; `ConfigError` for what is none.

    Devices of one host are joined by `+`. Two numbers before a device are hosts, and devices of each; such a
    part has hosts of its own. Within a host is the slowest link that its devices usually have, between
    hosts InfiniBand NDR: a cluster file can say it otherwise.

    >>> [device.name for device in parse_cluster("2x RTX 4090 + RTX 3090").devices]
    ['RTX 4090', 'RTX 4090', 'RTX 3090']
    >>> cluster = parse_cluster("2x4xA100")
    >>> len(cluster.hosts), cluster.num_ranks
    (2, 8)
    """
    together: list[Device] = []
    hosts: list[Host] = []
    for part in text.split("+"):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise ConfigError(
                f"{text!r} names no device around a '+': write 8xH100, or 2x RTX 4090 + RTX 3090"
            )
        first, second, name = match.groups()
        for number in (first, second):
            check_size(int(number or 1))
        devices = (device_called(name),) * int(second or first or 1)
        if second is None:
            together.extend(devices)
        elif devices:
            hosts.extend([Host(devices, usual_link(devices))] * int(first))
    if together:
        hosts.insert(0, Host(tuple(together), usual_link(together)))
    if not hosts:
        raise ConfigError(f"{text!r} is a cluster of no devices: give each a number of at least 1")
    return Cluster(tuple(hosts), link_called(_NETWORK) if len(hosts) > 1 else Link())


def usual_link(devices: Sequence[Device]) -> Link:
    """Return the slowest of the links that these devices usually have within a host.

    Raises `ConfigError` for a device that is no preset, of which nobody knows.

    >>> usual_link([device_called("H100"), device_called("L40S")]) == link_called("PCIe 4.0 x16")
    True
    """
    for device in devices:
        if device.name not in USUAL_LINK:
            raise ConfigError(
                f'nothing says how the devices {device.name!r} of a host are joined: give it link = "…"'
            )
    return min(
        (link_called(USUAL_LINK[device.name]) for device in devices),
        key=lambda link: link.bytes_per_second,
    )
