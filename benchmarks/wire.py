"""The network between emulated hosts: what one sends arrives at another, later and no faster than it may.

Kernels can shape a link themselves (tc's netem), but many are built without. So the hosts' network devices
are ends of this process: it reads what a host's kernel sends (packets of up to 64 KiB, as the kernel hands
them to a network card that parts them itself), waits for as long as the packet would occupy the line and be
under way, and hands it to the kernel of the host that it is for. Nothing is lost, and a line's queue has no
end.
Each host has one line out, and one in for each that sends to it.

Started by `namespaces`; it ends when the pipe that is its standard input does.
"""

import argparse
import ctypes
import fcntl
import heapq
import os
import select
import struct
import sys
import time
from contextlib import suppress
from ipaddress import IPv4Address
from pathlib import Path

_NEWNET = 0x40000000  # <sched.h>
_SET_TUNNEL, _SET_OFFLOAD = 0x400454CA, 0x400454D0  # <linux/if_tun.h>, as are the next three
_FLAGS = 0x0001 | 0x1000 | 0x4000  # IP packets; no header of their own; one of virtio before each
_OFFLOAD = 0x01 | 0x02  # checksums, and TCP packets larger than the line's
_VIRTIO_HEADER_BYTES = 10
_LARGEST = 2**17
_SET_TIMER_SLACK = 29  # <linux/prctl.h>


def tunnel_in(namespace: int, name: str) -> int:
    """The other end of a new network device `name`, in the network namespace of a process."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/proc/{namespace}/ns/net").open("rb") as file:
        if libc.setns(file.fileno(), _NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network of process {namespace}")
    tunnel = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tunnel, _SET_TUNNEL, struct.pack("16sH22x", name.encode(), _FLAGS))
    fcntl.ioctl(tunnel, _SET_OFFLOAD, _OFFLOAD)
    return tunnel


class Wire:
    """Lines between hosts, by the address of each: `tunnels[address]` is the end of its network device."""

    def __init__(self, tunnels: dict[int, int], *, bytes_per_second: float, delay_seconds: float) -> None:
        self._tunnels, self._address_of = tunnels, {file: address for address, file in tunnels.items()}
        self._rate, self._delay = bytes_per_second, delay_seconds
        self._free = dict.fromkeys(tunnels, 0.0)  # when each host's line can take the next packet
        self._under_way: list[tuple[float, int, int, bytes]] = []  # when it arrives, number, where, packet
        self._number = 0

    def serve(self, until: int) -> None:
        """Carry packets until something can be read from `until`, which its writer's end makes so."""
        sources = [until, *self._address_of]
        while True:
            left = max(0.0, self._under_way[0][0] - time.monotonic()) if self._under_way else None
            for file in select.select(sources, [], [], left)[0]:
                if file == until:
                    return
                self._read(file)
            self._deliver()

    def _read(self, file: int) -> None:
        source = self._address_of[file]
        while True:
            try:
                packet = os.read(file, _LARGEST)
            except BlockingIOError:
                return
            header = packet[_VIRTIO_HEADER_BYTES : _VIRTIO_HEADER_BYTES + 20]
            target = int.from_bytes(header[16:20], "big")
            if header[0] >> 4 != 4 or target not in self._tunnels:
                continue  # IPv6's, and what is for nobody
            size = len(packet) - _VIRTIO_HEADER_BYTES
            left = max(self._free[source], time.monotonic()) + size / self._rate
            self._free[source] = left
            self._number += 1
            heapq.heappush(self._under_way, (left + self._delay, self._number, target, packet))

    def _deliver(self) -> None:
        while self._under_way and self._under_way[0][0] <= time.monotonic():
            _, _, target, packet = heapq.heappop(self._under_way)
            with suppress(OSError):  # the device is not up yet, or no longer
                os.write(self._tunnels[target], packet)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bytes-per-second", type=float, required=True)
    parser.add_argument("--delay-seconds", type=float, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("hosts", nargs="+", help="PROCESS=ADDRESS of each")
    given = parser.parse_args()
    pairs = (host.split("=") for host in given.hosts)
    tunnels = {int(IPv4Address(address)): tunnel_in(int(process), given.device) for process, address in pairs}
    ctypes.CDLL(None).prctl(_SET_TIMER_SLACK, 1)
    with suppress(PermissionError):  # a wire takes no turns with those that it joins
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    print("ready", flush=True)
    wire = Wire(tunnels, bytes_per_second=given.bytes_per_second, delay_seconds=given.delay_seconds)
    wire.serve(until=sys.stdin.fileno())


if __name__ == "__main__":
    main()
