"""Connections between the ranks of one host: a Unix socket for each pair."""

import contextlib
import logging
import os
import socket
import struct
import uuid
from collections.abc import Sequence

from evenflow.runtime.notes.processes import this_host
from evenflow.runtime.ranks.world import World

_LOG = logging.getLogger(__name__)
_TIMEOUT_SECONDS = 60.0
_CREDENTIALS = struct.Struct("3i")  # process, user, group: <sys/socket.h>'s ucred
_RANK = struct.Struct("i")


def neighbours(world: World) -> dict[int, socket.socket] | None:
    """Connect with every rank of this host; collective.

    None, on all ranks, where a rank cannot share memory with others of its host: not on Linux, say. Ranks in
    containers that do not see each other count as on different hosts.
    """
    found: dict[int, socket.socket] | None = None
    with contextlib.ExitStack() as stack:
        trouble, address, listener = "", "", None
        try:
            listener, address = _listener(stack)
        except (OSError, AttributeError) as error:  # Python lacks names for what the system does not have
            trouble = str(error)
        told: list[tuple[str, str]] = world.gather((this_host(), address))
        if listener is not None and all(address for _, address in told):
            try:
                found = _connected(listener, world.rank, told)
            except OSError as error:
                trouble = str(error)
    troubles = [each for each in world.gather(trouble) if each]
    if not troubles:
        return found
    if world.is_first:
        _LOG.info("tensors of this host's ranks go over torch.distributed: %s", troubles[0])
    for each in (found or {}).values():
        each.close()
    return None


def _listener(stack: contextlib.ExitStack) -> tuple[socket.socket, str]:
    """Where others connect: under a name that no file system holds."""
    os.close(os.memfd_create("evenflow"))  # else there is nothing to connect for
    listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    address = f"evenflow-{uuid.uuid4()}"
    listener.bind(f"\0{address}".encode())
    listener.listen()
    listener.settimeout(_TIMEOUT_SECONDS)
    return listener, address


def _connected(
    listener: socket.socket, rank: int, told: Sequence[tuple[str, str]]
) -> dict[int, socket.socket]:
    """Each rank calls those before it and answers those behind it."""
    mine = {other for other, (host, _) in enumerate(told) if host == told[rank][0]} - {rank}
    found: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        for other in sorted(other for other in mine if other < rank):
            called = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            called.settimeout(_TIMEOUT_SECONDS)
            called.connect(f"\0{told[other][1]}".encode())
            called.send(_RANK.pack(rank))
            found[other] = called
        while found.keys() != mine:
            caller = stack.enter_context(listener.accept()[0])
            if not _is_ours(caller):
                continue
            caller.settimeout(_TIMEOUT_SECONDS)
            name = caller.recv(_RANK.size)
            if len(name) == _RANK.size:
                found[_RANK.unpack(name)[0]] = caller
        stack.pop_all()
    return found


def _is_ours(caller: socket.socket) -> bool:
    """Whether a process of the same user calls: any user of this host sees the name."""
    credentials = caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(credentials)[1] == os.getuid())
