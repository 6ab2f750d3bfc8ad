"""Joining the ranks of a run, over the network interface that leads from each to the others.

Gloo, if it is told nothing, listens at the address of its host's own name. On many systems that is 127.0.1.1,
which leads from every other host to that host itself, or an address of a network that the others are not in.
So each rank asks its routes which address leads to the host where all meet, and those that are on that host
which leads to one that is not; Gloo is told the interface of that address. Who has set GLOO_SOCKET_IFNAME has
decided. NCCL looks for interfaces itself, and knows more of them than routes do.
"""

import fcntl
import ipaddress
import logging
import os
import socket
import struct
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]  # torch hands them on
    PrefixStore,
    Store,
    rendezvous,
)

from evenflow.errors import PeerError

_LOG = logging.getLogger(__name__)
_VARIABLE = "GLOO_SOCKET_IFNAME"  # torch has no other way to tell Gloo
_ASK_ADDRESS = 0x8915  # <linux/sockios.h>: SIOCGIFADDR
_LOOPBACK = "127.0.0.1"
_LOOKS_EVERY_SECONDS = 0.005
_ANY_PORT = 9  # nothing is sent there


def join(backend: str, timeout: timedelta) -> str:
    """Open the group of all ranks that the launcher has started; return where others reach this one."""
    shared, rank, size = next(rendezvous("env://", timeout=timeout))
    shared.set_timeout(timeout)
    store = PrefixStore(f"evenflow {attempt_of(shared, rank, size, timeout)}", shared)
    address = _own_address(shared.host, store, rank, size)
    interface = interface_of(address)
    if interface is not None and not _is_loopback(address) and _VARIABLE not in os.environ:
        os.environ[_VARIABLE] = interface
        _LOG.info("rank %d talks to others over %s (%s)", rank, interface, address)
    own = PrefixStore("default_pg", store)  # as torch names it
    dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=timeout)
    return address


def attempt_of(store: Store, rank: int, size: int, timeout: timedelta) -> int:
    """A number that no earlier attempt of these ranks has had; collective.

    The elastic launcher keeps one store for all attempts of a run (torch 2.13), so that addresses of ranks
    that are gone still stand in it, and a new one may read them. What a rank asks here nobody has asked
    before, and the first rank answers until each has heard. (The count of restarts that the launcher tells
    is each host's own, and a host that joins later has another.)
    """
    if rank:
        question = uuid.uuid4().hex
        store.set(f"evenflow asks {rank}", question)
        number = int(store.get(f"evenflow answers {question}"))
        store.add(f"evenflow heard {number}", 1)
        return number
    number, answered = store.add("evenflow attempts", 1), set()
    end = time.monotonic() + timeout.total_seconds()
    while (heard := store.add(f"evenflow heard {number}", 0)) < size - 1:
        if time.monotonic() > end:
            raise PeerError(f"rank 0 waited {timeout} for all ranks to join: {heard + 1} of {size} have")
        for other in range(1, size):
            if store.check([f"evenflow asks {other}"]):
                question = store.get(f"evenflow asks {other}").decode()
                if question not in answered:
                    store.set(f"evenflow answers {question}", str(number))
                    answered.add(question)
        time.sleep(_LOOKS_EVERY_SECONDS)
    return number


def _own_address(meeting_place: str, store: Store, rank: int, size: int) -> str:
    """This rank's address on the way to others; a loopback's where all are on this host. Collective."""
    mine = address_towards(meeting_place) or _LOOPBACK
    keys = [f"address {number}" for number in range(size)]
    store.set(keys[rank], mine)
    if not _is_loopback(mine):
        return mine
    # The meeting place is on this host, whose own way to it says nothing.
    others = (told.decode() for told in store.multi_get(keys))
    found = (address_towards(other) for other in others if not _is_loopback(other))
    return next((each for each in found if each is not None), mine)


def address_towards(host: str) -> str | None:
    """The address of this host's from which packets to another leave; None where none do.

    >>> address_towards("127.0.0.1")
    '127.0.0.1'
    """
    try:
        for family, kind, protocol, _, target in socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind, protocol) as asked:
                asked.connect(target)  # of datagrams: it chooses a route, and sends nothing
                return str(asked.getsockname()[0])
    except OSError as error:
        _LOG.debug("no way to %s: %s", host, error)
    return None


def interface_of(address: str) -> str | None:
    """The network interface that has an address; None where none is known to have it.

    >>> interface_of("127.0.0.1")
    'lo'
    """
    wanted = ipaddress.ip_address(address.partition("%")[0])
    return next((name for name, has in _addresses() if has == wanted), None)


def _addresses() -> Iterator[tuple[str, ipaddress.IPv4Address | ipaddress.IPv6Address]]:
    """The interfaces, and the addresses that Linux tells of each without more ado."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            try:
                told = fcntl.ioctl(asked, _ASK_ADDRESS, struct.pack("256s", name.encode()))
            except OSError:
                continue  # it has none
            yield name, ipaddress.IPv4Address(told[20:24])
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.exists() else ():
        number, *_, name = line.split()
        yield name, ipaddress.IPv6Address(bytes.fromhex(number))


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
