"""A cluster: the devices of all ranks, the hosts that they are in, and the links between them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

from evenflow.cluster.device import Device
from evenflow.errors import ConfigError
from evenflow.ir.costs import Link

MOST_RANKS = 2**18  # who asks for more is mistaken, and each takes memory


def check_size(num_ranks: int) -> None:
    """Raise `ConfigError` for more ranks than a cluster can have."""
    if num_ranks > MOST_RANKS:
        raise ConfigError(f"a cluster has at most {MOST_RANKS:,} devices, and these are {num_ranks:,}")


@dataclass(frozen=True, slots=True)
class Host:
    """One machine: its devices in the order of its ranks, and the link between any two of them.

    Raises `ConfigError` for one without a device.

    >>> from evenflow.cluster.presets import device_called
    >>> devices = device_called("RTX 4090"), device_called("RTX 3090")
    >>> host = Host(devices, Link(latency_seconds=1e-5, bytes_per_second=1e10))
    >>> [device.name for device in host.devices]
    ['RTX 4090', 'RTX 3090']
    """

    devices: tuple[Device, ...]
    link: Link

    def __post_init__(self) -> None:
        if not self.devices:
            raise ConfigError("a host without a device does nothing: give it one, or leave it out")


@dataclass(frozen=True)
class Cluster:
    """Hosts in the order of their ranks, the link between hosts, and pairs of ranks that are known better.

    `measured[source rank, target rank]` goes before what host and network say. Raises `ConfigError` for no
    host, a measured pair of ranks that are not there or the same, and two kinds of device under one name
    (their memory may differ).

    >>> from evenflow.cluster.links import link_called
    >>> from evenflow.cluster.presets import device_called
    >>> host = Host((device_called("H100"),) * 8, link_called("NVLink 4"))
    >>> cluster = Cluster((host,) * 256, link_called("InfiniBand NDR"))
    >>> cluster.num_ranks, cluster.host_of[8]
    (2048, 1)
    >>> cluster.link_between(0, 7) == host.link, cluster.link_between(7, 8) == host.link
    (True, False)
    """

    hosts: tuple[Host, ...]
    network: Link = field(default_factory=Link)
    measured: Mapping[tuple[int, int], Link] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if not self.hosts:
            raise ConfigError("a cluster needs at least one host")
        check_size(sum(len(host.devices) for host in self.hosts))
        for pair in self.measured:
            if not all(0 <= rank < self.num_ranks for rank in pair) or pair[0] == pair[1]:
                raise ConfigError(
                    f"the link measured from rank {pair[0]} to rank {pair[1]}: there are ranks 0 to "
                    f"{self.num_ranks - 1}, and a link joins two of them"
                )
        kinds: dict[str, Device] = {}
        for device in self.devices:
            known = kinds.setdefault(device.name, device)
            if not known.same_kind(device):
                raise ConfigError(f"two different kinds of device are called {device.name!r}: rename one")

    @cached_property
    def devices(self) -> tuple[Device, ...]:
        """The device of each rank."""
        return tuple(device for host in self.hosts for device in host.devices)

    @cached_property
    def host_of(self) -> tuple[int, ...]:
        """The host of each rank."""
        return tuple(number for number, host in enumerate(self.hosts) for _ in host.devices)

    @property
    def num_ranks(self) -> int:
        """How many devices there are, each a rank."""
        return len(self.devices)

    def link_between(self, source: int, target: int) -> Link:
        """Return the link from one rank to another."""
        known = self.measured.get((source, target))
        if known is not None:
            return known
        host = self.host_of[source]
        return self.hosts[host].link if host == self.host_of[target] else self.network

    def with_devices(self, changed: Callable[[Device], Device]) -> "Cluster":
        """Return the cluster with each device as `changed` makes it."""
        hosts = tuple(replace(host, devices=tuple(map(changed, host.devices))) for host in self.hosts)
        return replace(self, hosts=hosts)

    def with_memory(self, memory_bytes: float) -> "Cluster":
        """Return the cluster with so much memory on each device, whatever it is sold with.

        >>> from evenflow.cluster.presets import device_called
        >>> cluster = Cluster((Host((device_called("RTX 4090"),), Link()),))
        >>> cluster.with_memory(2.0**33).devices[0].memory_bytes
        8589934592.0
        """
        return self.with_devices(lambda device: replace(device, memory_bytes=memory_bytes))
