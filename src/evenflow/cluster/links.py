"""Links that one can buy: what one direction of each carries.

Rates are the nominal ones of one direction times `_REACHED`, because no transfer reaches the nominal one: a
share that is assumed, as all latencies are (of a transfer between two ranks as the program sees it, with what
the library needs to start it). `evenflow doctor` measures both.
"""

from collections.abc import Mapping
from types import MappingProxyType

from evenflow.cluster.names import nearest, normal
from evenflow.errors import ConfigError
from evenflow.ir.costs import Link

_REACHED = 0.8

# Nominal bytes per second of one direction, and latency.
_NOMINAL = {
    "NVLink 4": (450e9, 10e-6),  # NVIDIA H100 data sheet: 900 GB/s, both directions together
    "NVLink 3": (300e9, 10e-6),  # NVIDIA A100 data sheet: 600 GB/s
    "NVLink bridge": (56.25e9, 10e-6),  # NVIDIA GA102 whitepaper, of two RTX 3090: 112.5 GB/s
    "PCIe 5.0 x16": (63.0e9, 15e-6),  # PCI-SIG: 32 GT/s a lane, 128b/130b
    "PCIe 4.0 x16": (31.5e9, 15e-6),  # 16 GT/s
    "PCIe 3.0 x16": (15.75e9, 15e-6),  # 8 GT/s
    "InfiniBand NDR": (50e9, 15e-6),  # 400 Gb/s a port
    "InfiniBand HDR": (25e9, 15e-6),  # 200 Gb/s
    "400 Gb Ethernet": (50e9, 30e-6),
    "200 Gb Ethernet": (25e9, 30e-6),
    "100 Gb Ethernet": (12.5e9, 30e-6),
    "25 Gb Ethernet": (3.125e9, 50e-6),
    "10 Gb Ethernet": (1.25e9, 50e-6),
    "shared memory": (15e9, 90e-6),  # two processes of one CPU, so that 12e9 are reached: measured 2026-11-22
}

LINKS: Mapping[str, Link] = MappingProxyType(
    {name: Link(latency, rate * _REACHED) for name, (rate, latency) in _NOMINAL.items()}
)
_BY_NORMAL = {normal(name): link for name, link in LINKS.items()}


def link_called(name: str, own: Mapping[str, Link] = MappingProxyType({})) -> Link:
    """Return a link by its name, one's own ones first; `ConfigError` suggests another for an unknown name.

    >>> link_called("pcie 4.0 x16").bytes_per_second
    25200000000.0
    """
    link = own.get(name, _BY_NORMAL.get(normal(name)))
    if link is None:
        raise ConfigError(f"unknown link {name!r}{nearest(name, [*own, *LINKS])}")
    return link
