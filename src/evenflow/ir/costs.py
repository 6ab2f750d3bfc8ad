"""Costs: how long ops and transfers take, and how much memory they hold."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from evenflow.errors import ConfigError
from evenflow.ir.op import Backward, ComputeOp, Forward, InputGrad, Overlap, WeightGrad
from evenflow.ir.placement import Placement

# Seconds and bytes are summed in floating point, in an order that differs from schedule to schedule, and a
# cap of 0.3 holds three times 0.1: sums that differ by less than this share are the same.
ROUNDING = 1e-9
_LARGEST = 1e100  # sums and products of such costs are still finite
_PER_STAGE = (
    "forward_seconds",
    "input_grad_seconds",
    "weight_grad_seconds",
    "activation_bytes",
    "weight_grad_bytes",
)


@dataclass(frozen=True, slots=True)
class Link:
    """The way from one rank to another: a transfer of b bytes occupies it for b / `bytes_per_second`.

    The value arrives `latency_seconds` after that; meanwhile the next transfer may use the link. Raises
    `ConfigError` for a latency that is negative or not finite, and a bandwidth that is not above 0.

    >>> Link(latency_seconds=1e-5, bytes_per_second=1e9).occupied_seconds(num_bytes=2e6)
    0.002
    """

    latency_seconds: float = 0.0
    bytes_per_second: float = math.inf

    def __post_init__(self) -> None:
        if not 0 <= self.latency_seconds <= _LARGEST:
            raise ConfigError(
                f"a link's latency must be finite seconds of at least 0 (and at most {_LARGEST:g}), got "
                f"{self.latency_seconds}"
            )
        if not self.bytes_per_second > 0:
            raise ConfigError(f"a link's bandwidth must be above 0 bytes/s, got {self.bytes_per_second}")

    def occupied_seconds(self, num_bytes: float) -> float:
        """Return how long a transfer of that size keeps others waiting.

        >>> Link().occupied_seconds(1e12)
        0.0
        """
        return num_bytes / self.bytes_per_second

    def transfer_seconds(self, num_bytes: float) -> float:
        """From the beginning of a transfer until it has arrived.

        >>> Link(latency_seconds=1.0, bytes_per_second=4.0).transfer_seconds(num_bytes=8.0)
        3.0
        """
        return self.latency_seconds + self.occupied_seconds(num_bytes)


@dataclass(frozen=True, slots=True)
class Costs:
    """What one microbatch costs in each stage: seconds, bytes held, and bytes sent.

    Every tuple has one entry a stage; as a stage lives on one rank, that rank's speed is in its numbers.

    - `forward_seconds`, `input_grad_seconds`, `weight_grad_seconds`: one `Forward`, `InputGrad`,
      `WeightGrad`. A whole `Backward` takes the last two together.
    - `link` joins any two ranks, except those that `links[source rank, target rank]` names. Stages of one
      rank hand over for nothing. `sent_bytes[source stage, target stage]` is the size of a transfer,
      activations up and gradients down; 0 where it is not given.
    - `activation_bytes`: allocated when a `Forward` starts. `weight_grad_bytes`: the part of it that remains
      after the `InputGrad`, until the `WeightGrad` has ended. By default 1 and all of it: memory is then
      counted in microbatches.
    - `memory_caps`: the most bytes of activations that each rank can hold; None where nothing limits it.
    - `overlap_share`: an `Overlap` takes this share of the sum of its two ops.

    Raises `ConfigError`, naming all that is wrong: tuples of different lengths, a cost that is negative or
    not finite, `weight_grad_bytes` above `activation_bytes`, an `overlap_share` outside 0.5 to 1.

    >>> costs = Costs((0.5, 1.0), input_grad_seconds=(1.0, 2.0), weight_grad_seconds=(0.5, 1.0))
    >>> costs.num_stages, costs.seconds(Backward(stage=1, microbatch=0))
    (2, 3.0)
    """

    forward_seconds: tuple[float, ...]
    input_grad_seconds: tuple[float, ...]
    weight_grad_seconds: tuple[float, ...]
    link: Link = Link()
    links: Mapping[tuple[int, int], Link] = field(default_factory=lambda: MappingProxyType({}))
    sent_bytes: Mapping[tuple[int, int], float] = field(default_factory=lambda: MappingProxyType({}))
    activation_bytes: tuple[float, ...] = ()
    weight_grad_bytes: tuple[float, ...] = ()
    memory_caps: tuple[float, ...] | None = None
    overlap_share: float = 1.0

    def __post_init__(self) -> None:
        if not self.activation_bytes:
            object.__setattr__(self, "activation_bytes", (1.0,) * self.num_stages)
        if not self.weight_grad_bytes:
            object.__setattr__(self, "weight_grad_bytes", self.activation_bytes)
        if faults := [*self._wrong_lengths(), *self._wrong_values()]:
            raise ConfigError("; ".join(faults))

    def _wrong_lengths(self) -> list[str]:
        return [
            f"{name} names {len(getattr(self, name))} stages where forward_seconds names {self.num_stages}: "
            "give each stage one"
            for name in _PER_STAGE
            if len(getattr(self, name)) != self.num_stages
        ]

    def _wrong_values(self) -> list[str]:
        faults = []
        for name in _PER_STAGE:
            faults += _negative(name, getattr(self, name))
        faults += _negative("sent_bytes", self.sent_bytes.values())
        faults += [
            f"stage {stage} keeps {kept:g} bytes for its weight gradient, more than the {held:g} it holds"
            for stage, (held, kept) in enumerate(
                zip(self.activation_bytes, self.weight_grad_bytes, strict=False)
            )
            if kept > held
        ]
        if wrong := [cap for cap in self.memory_caps or () if not (0 <= cap <= _LARGEST or cap == math.inf)]:
            faults.append(f"memory_caps must lie between 0 and {_LARGEST:g}, or be infinite, got {wrong}")
        if not 0.5 <= self.overlap_share <= 1:
            faults.append(f"overlap_share must lie between 0.5 and 1, got {self.overlap_share}")
        return faults

    @property
    def num_stages(self) -> int:
        """How many stages are priced."""
        return len(self.forward_seconds)

    def seconds(self, op: ComputeOp) -> float:
        """Return the seconds that one compute op takes.

        >>> Costs.uniform(2).seconds(Forward(stage=0, microbatch=5))
        1.0
        """
        match op:
            case Forward(stage):
                return self.forward_seconds[stage]
            case InputGrad(stage):
                return self.input_grad_seconds[stage]
            case WeightGrad(stage):
                return self.weight_grad_seconds[stage]
            case Backward(stage):
                return self.input_grad_seconds[stage] + self.weight_grad_seconds[stage]
            case Overlap(first, second):
                return self.overlap_share * (self.seconds(first) + self.seconds(second))

    def link_between(self, source: int, target: int) -> Link:
        """Return the link from one rank to another.

        >>> Costs.uniform(2, links={(0, 1): Link(0.5)}).link_between(0, 1).latency_seconds
        0.5
        """
        return self.links.get((source, target), self.link)

    def delay_seconds(self, source: int, target: int, placement: Placement) -> float:
        """Return how long after its making a stage's value is in another stage, over a link that is free.

        >>> costs = Costs.uniform(4, latency_seconds=0.5)
        >>> [costs.delay_seconds(stage, stage + 1, Placement.v_shape(2)) for stage in range(3)]
        [0.5, 0.0, 0.5]
        """
        ranks = placement.rank_of[source], placement.rank_of[target]
        if ranks[0] == ranks[1]:
            return 0.0
        link = self.link_between(*ranks)
        return link.transfer_seconds(self.sent_bytes.get((source, target), 0.0))

    def work_seconds(self, placement: Placement, num_microbatches: int, *, trains: bool) -> tuple[float, ...]:
        """Return the seconds of work of each rank in a step of so many microbatches, without `Overlap`.

        >>> Costs.uniform(2).work_seconds(Placement.linear(2), 4, trains=True)
        (12.0, 12.0)
        """
        work = [0.0] * placement.num_ranks
        for stage, rank in enumerate(placement.rank_of):
            seconds = self.forward_seconds[stage]
            if trains:
                seconds += self.input_grad_seconds[stage] + self.weight_grad_seconds[stage]
            work[rank] += seconds * num_microbatches
        return tuple(work)

    @staticmethod
    def uniform(
        num_stages: int,
        forward_seconds: float = 1.0,
        input_grad_seconds: float = 1.0,
        weight_grad_seconds: float = 1.0,
        *,
        latency_seconds: float = 0.0,
        links: Mapping[tuple[int, int], Link] = MappingProxyType({}),
    ) -> "Costs":
        """Return equal costs for every stage; by default a whole backward costs two forwards.

        Two, because a backward multiplies matrices for the inputs and again for the weights.

        >>> Costs.uniform(2, weight_grad_seconds=0.5).weight_grad_seconds
        (0.5, 0.5)
        """
        return Costs(
            (forward_seconds,) * num_stages,
            (input_grad_seconds,) * num_stages,
            (weight_grad_seconds,) * num_stages,
            Link(latency_seconds),
            links,
        )

    @staticmethod
    def of_ranks(
        placement: Placement,
        forward_seconds: Sequence[float],
        input_grad_seconds: Sequence[float],
        weight_grad_seconds: Sequence[float],
        *,
        latency_seconds: float = 0.0,
        activation_bytes: Sequence[float] | None = None,
        weight_grad_bytes: Sequence[float] | None = None,
        memory_caps: Sequence[float] | None = None,
        overlap_share: float = 1.0,
    ) -> "Costs":
        """Return the costs where each rank's, given here, are shared equally by the stages that it holds.

        So the work of a rank is the same for every placement, which makes placements comparable. By default
        a rank's `activation_bytes` are 1, and all of them remain for the weight gradient.

        >>> costs = Costs.of_ranks(Placement.v_shape(2), (1.0, 3.0), (1.0, 3.0), (1.0, 3.0))
        >>> costs.forward_seconds, costs.activation_bytes
        ((0.5, 1.5, 1.5, 0.5), (0.5, 0.5, 0.5, 0.5))
        """
        held = activation_bytes or (1.0,) * placement.num_ranks
        num_on = [len(placement.stages_on(rank)) for rank in range(placement.num_ranks)]

        def shared(whole: Sequence[float]) -> tuple[float, ...]:
            if len(whole) != placement.num_ranks:
                raise ConfigError(
                    f"costs of {len(whole)} ranks for {placement.num_ranks}: give each rank one"
                )
            return tuple(whole[rank] / num_on[rank] for rank in placement.rank_of)

        return Costs(
            shared(forward_seconds),
            shared(input_grad_seconds),
            shared(weight_grad_seconds),
            Link(latency_seconds),
            activation_bytes=shared(held),
            weight_grad_bytes=shared(weight_grad_bytes or held),
            memory_caps=None if memory_caps is None else tuple(memory_caps),
            overlap_share=overlap_share,
        )


def _negative(name: str, costs: Collection[float]) -> list[str]:
    wrong = [cost for cost in costs if not (math.isfinite(cost) and cost >= 0)]
    if wrong:
        return [f"{name} must be finite and at least 0, got {wrong}"]
    absurd = [cost for cost in costs if cost > _LARGEST]
    return [f"{name} must be at most {_LARGEST:g}, got {absurd}"] if absurd else []
