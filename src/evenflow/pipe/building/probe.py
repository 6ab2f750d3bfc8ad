"""What it takes to hand tensors to a neighbour, measured over the very link that the pipeline uses.

A ball that goes to and fro tells how long one is under way. What an end takes of its rank is measured as it
is in a step: both ranks compute, and hand each other a parcel whenever they are done with an op; on a CPU,
a link's threads (Gloo's) take turns with theirs, and what comes is read from another core's caches.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from evenflow.graph.nouns.tree import TensorInfo
from evenflow.ir.costs import Link as LinkCost
from evenflow.ir.op import Payload, Recv, Send
from evenflow.runtime.links.link import Link, Manifest, Parcel
from evenflow.runtime.ranks.world import World

_SMALL, _LARGE = 2**12, 2**23  # bytes; the large one is in no cache
_PARCELS = 2**18, 2**21  # bytes
_WARM_UPS, _TRIPS, _OPS = 3, 15, 40
_UNDER_WAY = 1.5  # of a parcel's time on its way an op takes at least
_IN_FLIGHT = 8  # parcels, as a step has them: large ones are then in no cache


@dataclass(frozen=True, slots=True)
class Probed:
    """One direction of a link, and what an end of a transfer takes of its rank's processor."""

    link: LinkCost
    parcel_seconds: float
    seconds_per_byte: float


def probe(world: World, device: torch.device, link: Link) -> dict[tuple[int, int], Probed]:
    """Measure a link between neighbouring ranks, every second pair at once; collective.

    Each rank has the stage of its number. Returns what it found by (rank, next rank). Each goes there and
    back; both directions are taken for equal.
    """
    found: dict[tuple[int, int], Probed] = {}
    for parity in (0, 1):
        first = world.rank - (world.rank - parity) % 2
        pair = (first, first + 1)
        mine = None
        world.gather_numbers([0])  # so that both ends begin
        if pair[0] >= 0 and pair[1] < world.size:
            mine = pair, _probed(link, world.rank, pair, device)
        ends: dict[tuple[int, int], list[Probed]] = {}
        for each in world.gather(mine):
            if each is not None:
                ends.setdefault(each[0], []).append(each[1])
        found |= {pair: _mean(*both) for pair, both in ends.items()}
    return found


def _mean(one: Probed, other: Probed) -> Probed:
    """The two ends of a link see the same time, and may handle their part differently."""
    return Probed(
        one.link,
        (one.parcel_seconds + other.parcel_seconds) / 2,
        (one.seconds_per_byte + other.seconds_per_byte) / 2,
    )


def _probed(link: Link, rank: int, pair: tuple[int, int], device: torch.device) -> Probed:
    (small, small_busy), (large, large_busy) = (
        _trips(link, rank, pair, device, size) for size in (_SMALL, _LARGE)
    )
    per_byte = max(large - small, 0.0) / (_LARGE - _SMALL)
    latency = max(small - per_byte * _SMALL, 0.0)
    found = LinkCost(latency, 1 / per_byte if per_byte else float("inf"))
    if device.type == "cpu":
        few, many = _PARCELS
        small_busy, large_busy = (
            _beside_ops(link, rank, pair, n, _UNDER_WAY * found.transfer_seconds(n)) for n in _PARCELS
        )
    else:
        few, many = _SMALL, _LARGE
    busy_per_byte = max(large_busy - small_busy, 0.0) / (many - few)
    return Probed(
        found,
        max(small_busy - busy_per_byte * few, 0.0),
        busy_per_byte,
    )


def _beside_ops(link: Link, rank: int, pair: tuple[int, int], num_bytes: int, least_seconds: float) -> float:
    """By how much one end of a transfer makes an op longer, where both ranks send one after each op.

    An op takes `least_seconds` or more: on a slow link the wait for the link would count, which is no rank's.
    """
    other = sum(pair) - rank
    cpu = torch.device("cpu")
    info = TensorInfo((num_bytes // 4,), (1,), torch.float32, False)
    payloads = {pair[0]: Payload.ACTIVATION, pair[1]: Payload.GRADIENT}
    leaves, comes = (
        Manifest(("ops", num_bytes, a, b), (info,), cpu) for a, b in ((rank, other), (other, rank))
    )
    receives = [Recv(other, rank, number, payloads[other]) for number in range(_OPS)]
    parcels = [(torch.zeros(num_bytes // 4),) for _ in range(_IN_FLIGHT)]
    held: deque[Parcel] = deque([parcels[0]], maxlen=_IN_FLIGHT)
    matrix = torch.ones(512, 512)
    # Both ends of a link take it for equally fast, so that they compute about as long.
    times = math.ceil(least_seconds / min(_product_seconds(matrix) for _ in range(_OPS)))

    def op() -> float:
        start = time.perf_counter()
        for _ in range(max(1, times)):
            torch.mm(matrix, matrix)
        for tensor in held[-1]:  # who receives one reads what another processor wrote
            assert tensor is not None
            tensor.sum()
        return time.perf_counter() - start

    alone = statistics.median(op() for _ in range(_OPS))
    took = []
    link.start([(receive, comes) for receive in receives])
    for number, receive in enumerate(receives):
        start = time.perf_counter()
        op()
        link.send(Send(rank, other, number, payloads[rank]), parcels[number % _IN_FLIGHT], leaves)
        link.post(receive)
        if number:
            held.append(link.take(receives[number - 1]))
        took.append(time.perf_counter() - start)
    link.take(receives[-1])
    link.finish()
    return max(statistics.median(took[_IN_FLIGHT + _WARM_UPS :]) - alone, 0.0) / 2


def _product_seconds(matrix: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.mm(matrix, matrix)
    return time.perf_counter() - start


def _trips(
    link: Link, rank: int, pair: tuple[int, int], device: torch.device, num_bytes: int
) -> tuple[float, float]:
    """Seconds of one transfer, and of this rank's processor for one end of it: a ball goes to and fro."""
    low, high = pair
    info = TensorInfo((num_bytes // 4,), (1,), torch.float32, False)
    ball = (torch.zeros(num_bytes // 4, device=device),)

    def leg(source: int, target: int, payload: Payload, number: int) -> tuple[Send, Recv, Manifest]:
        manifest = Manifest(("probe", num_bytes, source, target), (info,), device)
        return Send(source, target, number, payload), Recv(source, target, number, payload), manifest

    there, back = partial(leg, low, high, Payload.ACTIVATION), partial(leg, high, low, Payload.GRADIENT)
    serve, answer = (there, back) if rank == low else (back, there)
    numbers = range(_WARM_UPS + _TRIPS)
    link.start([answer(number)[1:] for number in numbers])
    took, busy = [], []

    def send(number: int) -> None:
        op, _, manifest = serve(number)
        link.send(op, ball, manifest)

    def take(number: int) -> None:
        op = answer(number)[1]
        link.post(op)
        link.take(op)
        if device.type == "cuda":  # where its stream waits, and not the host
            torch.cuda.current_stream(device).synchronize()

    turns: tuple[Callable[[int], None], ...] = (send, take) if rank == low else (take, send)
    for number in numbers:
        start, start_busy = time.perf_counter(), time.process_time()
        for turn in turns:
            turn(number)
        took.append((time.perf_counter() - start) / 2)
        busy.append((time.process_time() - start_busy) / 2)
    link.finish()
    return statistics.median(took[_WARM_UPS:]), statistics.median(busy[_WARM_UPS:])
