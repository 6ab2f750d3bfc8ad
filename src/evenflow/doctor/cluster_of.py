"""The cluster that an examination found."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby
from statistics import median

from evenflow.cluster.cluster import Cluster, Host
from evenflow.cluster.device import Device
from evenflow.cost.local_device import device_found
from evenflow.doctor.examine import Examination, Place
from evenflow.doctor.exchange import Exchange
from evenflow.errors import ConfigError
from evenflow.ir.costs import Link

_GIB = 2.0**30
_ALIKE = 0.25  # a pair that differs from the others' median by more than this share is told apart


def cluster_of(found: Examination) -> Cluster:
    """Return the cluster: links as measured, devices as far as they are known.

    A GPU that is no preset, and a CPU, get the rate of a product of matrices in float32 as their peak. Within
    hosts, and between them, the median of all pairs counts; pairs that differ are named. Raises
    `ConfigError` where no link could be measured, and for ranks of one host that are not in a row.
    """
    names = [name for name, _ in groupby(found.places, key=lambda place: place.host)]
    if len(set(names)) < len(names):
        raise ConfigError(f"the ranks of a host must be in a row, and the hosts are {', '.join(names)}")
    measured = dict(_directions(found))
    if not measured:
        raise ConfigError("no link could be measured, so there is no cluster to write")
    host_of = [place.host for place in found.places]
    inside = [link for (a, b), link in measured.items() if host_of[a] == host_of[b]]
    between = [link for (a, b), link in measured.items() if host_of[a] != host_of[b]]
    network = _median(between) if between else Link()
    within = _median(inside) if inside else network
    kinds: dict[str, Device] = {}
    devices = [_device(place, kinds) for place in found.places]
    hosts = tuple(
        Host(tuple(device for device, owner in zip(devices, host_of, strict=True) if owner == name), within)
        for name in names
    )
    usual = Cluster(hosts, network)
    apart = {pair: link for pair, link in measured.items() if not _alike(link, usual.link_between(*pair))}
    return replace(usual, measured=apart)


def _directions(found: Examination) -> Iterable[tuple[tuple[int, int], Link]]:
    for (low, high), link in found.links.items():
        if isinstance(link, Exchange):
            yield (low, high), _rounded(link.latency_seconds, link.there_bytes_per_second)
            yield (high, low), _rounded(link.latency_seconds, link.back_bytes_per_second)


def _digits(value: float) -> float:
    """Three digits: more are chance, and in the way of who reads them."""
    return float(f"{value:.3g}")


def _rounded(latency_seconds: float, bytes_per_second: float) -> Link:
    return Link(_digits(latency_seconds), _digits(bytes_per_second / _GIB) * _GIB)


def _median(links: list[Link]) -> Link:
    return _rounded(
        median(link.latency_seconds for link in links), median(link.bytes_per_second for link in links)
    )


def _alike(link: Link, other: Link) -> bool:
    return abs(link.bytes_per_second / other.bytes_per_second - 1) <= _ALIKE


def _device(place: Place, kinds: dict[str, Device]) -> Device:
    """A rank's device; one kind has one rate, that of the first rank that has it."""
    found = device_found(place.device_name, place.memory_bytes, _digits(place.flops_per_second))
    return replace(kinds.setdefault(found.name, found), memory_bytes=found.memory_bytes)
