"""Connections between the ranks of one host: a Unix socket for each pair."""

import os
import socket
import struct
import uuid

from evenflow.runtime.world import World

_TIMEOUT_SECONDS = 60.0
_CREDENTIALS = struct.Struct("3i")  # process, user, group: <sys/socket.h>'s ucred


def neighbours(world: World) -> dict[int, socket.socket] | None:
    """Connect with every rank of this host that can be reached; collective.

    None, on all ranks, where a rank cannot share memory with others of its host (it is no Linux, or each of
    them lives in a container of its own).
    """
    listener = _listener()
    address = "" if listener is None else listener.getsockname()[1:].decode()
    told: list[tuple[str, str]] = world.gather((socket.gethostname(), address))
    found: dict[int, socket.socket] | None = None
    try:
        if listener is not None:
            found = _connected(listener, world.rank, told)
    except OSError:
        found = None
    finally:
        if listener is not None:
            listener.close()
    if all(world.gather(found is not None)):
        return found
    for each in (found or {}).values():
        each.close()
    return None


def _listener() -> socket.socket | None:
    """Where others connect: under a name that no file system holds."""
    if not hasattr(os, "memfd_create"):
        return None
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"\0evenflow-{uuid.uuid4()}".encode())
    listener.listen()
    listener.settimeout(_TIMEOUT_SECONDS)
    return listener


def _connected(listener: socket.socket, rank: int, told: list[tuple[str, str]]) -> dict[int, socket.socket]:
    """Each rank calls those before it and answers those behind it."""
    host = told[rank][0]
    mine = [other for other, (name, _) in enumerate(told) if name == host and other != rank]
    if not all(told[other][1] for other in mine):
        raise ConnectionRefusedError("a rank of this host has no address")
    found = {}
    for other in (other for other in mine if other < rank):
        found[other] = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        found[other].settimeout(_TIMEOUT_SECONDS)
        found[other].connect(f"\0{told[other][1]}".encode())
        found[other].send(struct.pack("i", rank))
    for _ in (other for other in mine if other > rank):
        caller, _ = listener.accept()
        caller.settimeout(_TIMEOUT_SECONDS)
        (other,) = struct.unpack("i", caller.recv(4))
        found[other] = caller
    for each in found.values():
        _, user, _ = _CREDENTIALS.unpack(
            each.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        if user != os.getuid():
            raise PermissionError("somebody else called")
    return found
