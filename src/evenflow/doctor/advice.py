"""What is known to help with links that fail or are slow. Each piece says what was seen."""

from collections.abc import Iterator

from evenflow.doctor.examine import Examination, Place
from evenflow.doctor.exchange import Exchange
from evenflow.doctor.worker import Fault

_MIB, _GIB = 2**20, 2**30
_SLOW_INSIDE = 2 * _GIB  # bytes a second; any PCIe of the last ten years does more
_SLOW_NETWORK = 1.2e9  # of 10 Gb Ethernet, nearly
_SMALL_SHARED_MEMORY = 512 * _MIB  # Docker gives 64 MiB where it is not told otherwise


def advice(found: Examination) -> tuple[str, ...]:
    """Return what is worth trying, most urgent first; nothing where all is well."""
    return tuple(dict.fromkeys((*_faults(found), *_host_settings(found), *_peers(found), *_speeds(found))))


def _faults(found: Examination) -> Iterator[str]:
    for (low, high), link in found.links.items():
        if not isinstance(link, Fault):
            continue
        first, second = found.places[low], found.places[high]
        if first.host != second.host:
            yield (
                f"ranks {low} and {high} are on {first.host} and {second.host}: see that no firewall "
                "stands between them, and set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the interface "
                "that leads from one to the other"
            )
        elif first.device.startswith("cuda"):
            # NVIDIA/nccl-tests issue 117, NVIDIA/nccl issues 257 and 2079; NCCL user guide, troubleshooting.
            if first.settings.get("NCCL_P2P_DISABLE", "0") == "0":
                yield (
                    f"ranks {low} and {high} fail, and GPUs of consumers often do with peer-to-peer "
                    "transfers: try NCCL_P2P_DISABLE=1"
                )
            if first.iommu:
                yield (
                    f"{first.host} has an IOMMU at work, through which peer-to-peer transfers may hang or "
                    "arrive changed: turn off PCIe ACS and the IOMMU in the BIOS, or start the kernel with "
                    "iommu=pt"
                )


def _host_settings(found: Examination) -> Iterator[str]:
    for place in _one_of_each_host(found):
        if place.shared_memory_bytes < _SMALL_SHARED_MEMORY:
            yield (
                f"/dev/shm of {place.host} has {place.shared_memory_bytes / _MIB:.0f} MiB, and NCCL needs "
                "more between GPUs without peer-to-peer transfers: start a container with --shm-size=8g"
            )
        for setting in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
            asked = place.settings.get(setting, "")
            if asked and not asked.startswith("^") and not _some_interface(asked, place):
                yield (
                    f"{setting}={asked} names no interface of {place.host}, which has "
                    f"{', '.join(place.interfaces)}: set it to one of these, or to none"
                )


def _some_interface(asked: str, place: Place) -> bool:
    """Whether a host has one of the interfaces: prefixes with commas between, after = whole names (NCCL)."""
    whole = asked.startswith("=")
    names = asked.removeprefix("=").split(",")
    return any(
        each == name if whole else each.startswith(name) for name in names for each in place.interfaces
    )


def _peers(found: Examination) -> Iterator[str]:
    for place in _one_of_each_host(found):
        num_here = sum(other.host == place.host for other in found.places)
        if place.device.startswith("cuda") and num_here > 1 and len(place.peers) < num_here - 1:
            yield (
                f"the GPUs of {place.host} do not all reach each other's memory (no NVLink, or a driver that "
                "forbids it on this card): transfers go through the host's memory, so prefer few, large ones"
            )


def _speeds(found: Examination) -> Iterator[str]:
    for (low, high), link in found.links.items():
        if not isinstance(link, Exchange):
            continue
        first, second = found.places[low], found.places[high]
        there, back = link.there_bytes_per_second, link.back_bytes_per_second
        if first.host != second.host and min(there, back) < _SLOW_NETWORK:
            yield (
                f"between {first.host} and {second.host} pass {min(there, back) / _GIB:.2f} GiB/s: where "
                "there is a faster network, name its interface in NCCL_SOCKET_IFNAME, and see that "
                "NCCL_IB_DISABLE is not 1"
            )
        elif (
            first.host == second.host and first.device.startswith("cuda") and min(there, back) < _SLOW_INSIDE
        ):
            yield (
                f"ranks {low} and {high} of one host pass {min(there, back) / _GIB:.2f} GiB/s: see that both "
                "GPUs have all their PCIe lanes (nvidia-smi topo -m, nvidia-smi -q -d PCI)"
            )


def _one_of_each_host(found: Examination) -> Iterator[Place]:
    seen: set[str] = set()
    for place in found.places:
        if place.host not in seen:
            seen.add(place.host)
            yield place
