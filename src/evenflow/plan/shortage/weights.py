"""What a model's parameters alone need, and what would hold them where there is no room.

However a model is cut and sharded, each trained parameter is held once, with its gradient, its optimizer's
states and what the optimizer allocates while it steps. If all devices together have less room than that, no
plan exists, and nothing needs to be searched to say so.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter, itemgetter

from evenflow.cluster.cluster import Cluster
from evenflow.cluster.device import Device
from evenflow.cluster.sizes import told_bytes
from evenflow.errors import ConfigError
from evenflow.plan.adapters import LORA_RANK
from evenflow.plan.rank_memory import TrainingState

_AS_IT_IS = "as it is, on more devices"
_FULL_BYTES, _HALF_BYTES = 4, 2  # of an element of fp32, and of bf16
_SGD = TrainingState(optimizer_bytes=0.0, update_bytes=0.0)


@dataclass(frozen=True, slots=True)
class Weights:
    """A model's parameters, counted; each shared one once.

    `linear_sizes`: inputs and outputs of all its linear layers, added up: what adapters of rank 1 beside them
    have as elements (Hu et al., "LoRA", 2021).
    """

    num_elements: int
    num_bytes: int
    trained_elements: int
    trained_bytes: int
    linear_sizes: int = 0


class WeightsDoNotFitError(ConfigError):
    """Parameters and what training keeps beside them need `needed_bytes`, and there are `room_bytes`."""

    def __init__(self, weights: Weights, cluster: Cluster, state: TrainingState) -> None:
        self.needed_bytes = needed_bytes(weights, state)
        self.room_bytes = room_bytes(cluster)
        verdict = (
            "no plan fits into memory, wherever the model is cut: its parameters alone, each held once, "
            f"need {told_bytes(self.needed_bytes)}, and all devices together have "
            f"{told_bytes(self.room_bytes)}"
        )
        lines = [
            verdict,
            *_table([*_needs(weights, state), ("all of it", "", self.needed_bytes)]),
            *_table([*_rooms(cluster), ("all of it", "", self.room_bytes)]),
            "What would hold that, the smallest change first; activations come on top:",
            *(f"- {each}" for each in _changes(weights, cluster, state)),
            "Recomputation does not help: it saves activations alone.",
        ]
        super().__init__("\n".join(lines))


def needed_bytes(weights: Weights, state: TrainingState) -> float:
    """The bytes of all parameters and of what training keeps beside them, each held once.

    >>> state = TrainingState(optimizer_bytes=8.0, update_bytes=4.0)
    >>> needed_bytes(Weights(10, 40, 5, 20), state)
    120.0
    """
    return sum(size for _, _, size in _needs(weights, state))


def room_bytes(cluster: Cluster) -> float:
    """The memory of all devices, less what each reserves."""
    return sum(device.room_bytes for device in cluster.devices)


def check_weights(weights: Weights, cluster: Cluster, state: TrainingState) -> None:
    """Raise `WeightsDoNotFitError` where the parameters alone need more than all devices together have.

    >>> from evenflow.cluster.short import parse_cluster
    >>> check_weights(Weights(10**9, 2 * 10**9, 10**9, 2 * 10**9), parse_cluster("RTX 4090"), TrainingState())
    """
    if needed_bytes(weights, state) > room_bytes(cluster):
        raise WeightsDoNotFitError(weights, cluster, state)


def _needs(weights: Weights, state: TrainingState) -> Iterator[tuple[str, str, float]]:
    """What is held: its name, the product that it comes from, and its bytes."""
    trained = weights.trained_elements
    products = (
        ("parameters", weights.num_elements, weights.num_bytes),
        ("gradients", trained, weights.trained_bytes * state.gradient_bytes),
        ("the optimizer's states", trained, trained * state.optimizer_bytes),
        ("the optimizer's step", trained, trained * state.update_bytes),
    )
    for name, number, size in products:
        if size:
            yield name, f"{number:,} x {size / number:.3g} bytes", float(size)


def _rooms(cluster: Cluster) -> Iterator[tuple[str, str, float]]:
    alike: dict[tuple[str, float], list[Device]] = {}
    for device in cluster.devices:
        alike.setdefault((device.name, device.memory_bytes), []).append(device)
    for (name, memory_bytes), devices in alike.items():
        reserved = told_bytes(devices[0].reserved_bytes)
        product = f"{len(devices)} x ({told_bytes(memory_bytes)} less {reserved} reserved)"
        yield name, product, sum(device.room_bytes for device in devices)


def _table(rows: Sequence[tuple[str, str, float]]) -> list[str]:
    if len(rows) == 2:  # a single row is its own sum
        rows = rows[:1]
    name_width = max(len(name) for name, _, _ in rows)
    width = max(len(product) for _, product, _ in rows)
    return [
        f"  {name:{name_width}}  {product:{width}}  {told_bytes(size):>10}" for name, product, size in rows
    ]


def _changes(weights: Weights, cluster: Cluster, state: TrainingState) -> list[str]:
    """What would make it fit, each with its sum; those first that take the fewest further devices."""
    as_it_is = needed_bytes(weights, state)
    found = []
    for what, changed, under in _alternatives(weights, state):
        needed = needed_bytes(changed, under)
        if needed < as_it_is or what == _AS_IT_IS:
            more = _devices_more(needed, cluster)
            parts = [f"{name} {told_bytes(size)}" for name, _, size in _needs(changed, under)]
            text = f"{what}: {' + '.join(parts)} = {told_bytes(needed)}; {_with_devices(more, cluster)}"
            found.append((more, text))
    return [text for _, text in sorted(found, key=itemgetter(0))]


def _alternatives(weights: Weights, state: TrainingState) -> Iterator[tuple[str, Weights, TrainingState]]:
    """Other ways to train the same model, those first that change least."""
    yield _AS_IT_IS, weights, state
    trained = weights.trained_elements
    half = _HALF_BYTES * trained
    if weights.trained_bytes > half:
        frozen_bytes = weights.num_bytes - weights.trained_bytes
        scale = half / weights.trained_bytes
        in_half = replace(weights, num_bytes=frozen_bytes + half, trained_bytes=half)
        under = replace(
            state, optimizer_bytes=state.optimizer_bytes * scale, update_bytes=state.update_bytes * scale
        )
        yield "parameters in bfloat16, model.to(torch.bfloat16)", in_half, under
    if state.optimizer_bytes:
        yield "SGD without momentum, which keeps no states", weights, replace(_SGD, gradient_bytes=1.0)
    adapters = LORA_RANK * weights.linear_sizes
    if adapters:
        with_adapters = Weights(
            weights.num_elements + adapters,
            weights.num_bytes + _FULL_BYTES * adapters,
            adapters,
            _FULL_BYTES * adapters,
        )
        what = f"LoRA of rank {LORA_RANK} on all linear layers, {adapters:,} elements in float32"
        yield what, with_adapters, TrainingState()


def _roomiest(cluster: Cluster) -> Device:
    return max(cluster.devices, key=attrgetter("room_bytes"))


def _devices_more(needed: float, cluster: Cluster) -> int:
    return max(0, math.ceil((needed - room_bytes(cluster)) / _roomiest(cluster).room_bytes))


def _with_devices(more: int, cluster: Cluster) -> str:
    if not more:
        return "the devices that are there have room for it"
    return f"takes {more} more {_roomiest(cluster).name}, {cluster.num_ranks + more} devices in all"
