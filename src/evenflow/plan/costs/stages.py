"""What each stage of a cut chain costs: seconds, and bytes of every kind that planning counts."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import add, sub
from typing import TypeVar

from evenflow.ir.costs import Costs, Link
from evenflow.plan.chain import Chain, Held, Parameter
from evenflow.plan.costs.traffic import Traffic
from evenflow.plan.recompute import backward_transients, forward_transients, parted_bytes

_Used = TypeVar("_Used", Held, Parameter)


@dataclass(frozen=True, slots=True)
class StageCost:
    """One stage: nodes `start` to `end` of the chain, without the last. All for one microbatch.

    `saved_bytes` are held from its forward on, `kept_bytes` from its input gradient until its weight gradient
    has ended; `forward_transient_bytes` and `backward_transient_bytes` are the most that is there besides,
    while one of them runs, `weight_transient_bytes` while a weight gradient of its own does; `received_bytes`
    cross the cut before it. Of its parameters, `trained_bytes` get gradients, and `owned_elements` are
    updated here: a parameter of several stages is its first one's. What of these three belongs to experts
    stands beside them.
    """

    start: int
    end: int
    forward_seconds: float
    input_grad_seconds: float
    weight_grad_seconds: float
    saved_bytes: float
    kept_bytes: float
    forward_transient_bytes: float
    backward_transient_bytes: float
    received_bytes: float
    parameter_bytes: float
    trained_bytes: float
    owned_elements: int
    expert_parameter_bytes: float = 0.0
    expert_trained_bytes: float = 0.0
    expert_owned_elements: int = 0
    weight_transient_bytes: float = 0.0

    @property
    def seconds(self) -> float:
        """Forward and both gradients."""
        return self.forward_seconds + self.input_grad_seconds + self.weight_grad_seconds


def stage_costs(
    chain: Chain, positions: Sequence[int], kinds: Sequence[str], *, splits: bool = False
) -> tuple[StageCost, ...]:
    """What the stages between cuts cost, each on a device of its kind.

    `positions` are the nodes before which it is cut, `kinds` names each stage's kind of device. A backward
    frees what each node saved as it goes, and puts aside what weight gradients take where the schedule
    `splits` it in two.

    >>> from evenflow.plan.chain import Seconds
    >>> chain = Chain(
    ...     names=("a", "b"),
    ...     num_rows=1,
    ...     flops=(1.0, 1.0),
    ...     seconds={"cpu": Seconds((1.0, 2.0), (1.0, 2.0), (1.0, 2.0))},
    ...     saved=(Held(8.0, (0, 1)),),
    ...     parameters=(Parameter("w", 4, 16, True, (1,)),),
    ...     forward_transient_bytes=(0.0, 4.0),
    ...     backward_transient_bytes=(2.0, 0.0),
    ...     cut_bytes=(0.0, 8.0),
    ... )
    >>> first, second = stage_costs(chain, (1,), ("cpu", "cpu"))
    >>> (first.seconds, first.saved_bytes, first.trained_bytes), (second.seconds, second.trained_bytes)
    ((3.0, 8.0, 0), (6.0, 16))
    >>> first.backward_transient_bytes, second.forward_transient_bytes
    (2.0, 4.0)
    """
    bounds = (0, *positions, chain.num_nodes)
    saved, kept = (_by_stage(held, positions) for held in (chain.saved, chain.kept))
    own = _by_stage(chain.parameters, positions)
    return tuple(
        _stage_cost(chain, run, kind, saved=saved[stage], kept=kept[stage], own=own[stage], splits=splits)
        for stage, (run, kind) in enumerate(zip(pairwise(bounds), kinds, strict=True))
    )


def _stage_cost(
    chain: Chain,
    run: tuple[int, int],
    kind: str,
    *,
    saved: Sequence[Held],
    kept: Sequence[Held],
    own: Sequence[Parameter],
    splits: bool,
) -> StageCost:
    start, end = run
    seconds = chain.seconds[kind]
    trained = [parameter for parameter in own if parameter.trains]
    late = {node for held in kept for node in held.nodes}
    put_off = [parameter for parameter in trained if not late.isdisjoint(parameter.nodes)]
    owned = [parameter for parameter in trained if parameter.nodes[0] >= start]
    forward, backward = forward_transients(chain, start, end), backward_transients(chain, start, end)
    # Of the first stage, which nobody waits for, a backward in two is whole, and late.
    put_aside = kept if splits and start else ()
    backward = tuple(
        map(add, _beside_saved(backward, saved, start), _of_later_nodes(end - start, put_aside, start))
    )
    return StageCost(
        start,
        end,
        sum(seconds.forward[start:end]),
        sum(seconds.input_grad[start:end]),
        sum(seconds.weight_grad[start:end]),
        saved_bytes=_bytes(saved) + parted_bytes(chain, start, end),
        kept_bytes=_bytes(kept),
        forward_transient_bytes=max(0.0, *_beside_saved(forward, saved, start)),
        backward_transient_bytes=max(0.0, *backward),
        received_bytes=chain.cut_bytes[start] if start else 0.0,
        parameter_bytes=sum(parameter.num_bytes for parameter in own),
        trained_bytes=sum(parameter.num_bytes for parameter in trained),
        owned_elements=sum(parameter.num_elements for parameter in owned),
        expert_parameter_bytes=sum(parameter.num_bytes for parameter in own if parameter.is_expert),
        expert_trained_bytes=sum(parameter.num_bytes for parameter in trained if parameter.is_expert),
        expert_owned_elements=sum(parameter.num_elements for parameter in owned if parameter.is_expert),
        weight_transient_bytes=max((float(each.num_bytes) for each in put_off), default=0.0),
    )


def _beside_saved(transients: Sequence[float], saved: Sequence[Held], start: int) -> tuple[float, ...]:
    """What nodes have beyond all that a stage saves for one microbatch.

    What later nodes alone save is not there yet in the forward, and freed by then in a backward.
    """
    return tuple(map(sub, transients, _of_later_nodes(len(transients), saved, start)))


def _of_later_nodes(num_nodes: int, saved: Sequence[Held], start: int) -> Iterable[float]:
    """For each node of a stage what only later ones have saved."""
    first = [0.0] * (num_nodes + 1)
    for held in saved:
        first[next(node for node in held.nodes if node >= start) - start] += held.num_bytes
    return reversed(list(accumulate(reversed(first[1:]))))


def _bytes(held: Iterable[Held]) -> float:
    return sum(each.num_bytes for each in held)


def _by_stage(each: Sequence[_Used], positions: Sequence[int]) -> list[list[_Used]]:
    """What each stage has: all that any of its nodes uses."""
    found: list[list[_Used]] = [[] for _ in range(len(positions) + 1)]
    for one in each:
        for stage in {bisect_right(positions, node) for node in one.nodes}:
            found[stage].append(one)
    return found


def costs_of(stages: Sequence[StageCost], traffic: Traffic, links: Mapping[tuple[int, int], Link]) -> Costs:
    """What a schedule of these stages is priced with; `links` joins ranks.

    >>> stages = [
    ...     StageCost(n, n + 1, 1.0, 1.0, 1.0, 4.0, 2.0, 0.0, 0.0, 8.0 * n, 0.0, 0.0, 0) for n in (0, 1)
    ... ]
    >>> costs = costs_of(stages, Traffic({(0, 1): 8.0}, {(1, 0): 6.0}), {})
    >>> costs.sent_bytes, costs.weight_grad_bytes
    ({(0, 1): 8.0, (1, 0): 6.0}, (2.0, 2.0))
    """
    return Costs(
        tuple(stage.forward_seconds for stage in stages),
        tuple(stage.input_grad_seconds for stage in stages),
        tuple(stage.weight_grad_seconds for stage in stages),
        links=links,
        sent_bytes={**traffic.activations, **traffic.gradients},
        activation_bytes=tuple(stage.saved_bytes for stage in stages),
        weight_grad_bytes=tuple(min(stage.kept_bytes, stage.saved_bytes) for stage in stages),
    )
