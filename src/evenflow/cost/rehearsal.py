"""A rehearsal: one microbatch through the whole program, stage after stage, and what each stage takes.

A node that is measured by itself meets other caches, and other neighbours on the machine, than one that runs
in its place. So nodes say how a stage's seconds are spread over it, and rehearsals how many they are.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from operator import mul

import torch
from torch.utils import _pytree as pytree

from evenflow.cost.bench import places_of_parameters, ready, undisturbed
from evenflow.cost.cache import Cache
from evenflow.cost.clock import timed
from evenflow.cost.measured import NOTHING_KEPT, Measured
from evenflow.cost.recorded import Recorded
from evenflow.errors import EvenflowError, RecordError
from evenflow.graph.cutting.cut import Cut, cut
from evenflow.ir.op import Payload
from evenflow.plan.chain import Chain, Seconds
from evenflow.plan.cuts.partition import balanced_cuts
from evenflow.runtime.program.work import Work
from evenflow.runtime.stages.inflight import InFlight
from evenflow.runtime.stages.stage import Stage

_MOST_STAGES = 8

Passed = tuple[tuple[float, float], ...]  # seconds of each stage's forward and backward


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """A recorded program, cut into stages of about equal work.

    `needed_bytes` is what a device must have room for.
    """

    recorded: Recorded
    positions: tuple[int, ...]
    needed_bytes: float

    @staticmethod
    def of(recorded: Recorded, chain: Chain) -> "Rehearsal":
        """Rehearse the program that this chain was made of."""
        num_stages = min(_MOST_STAGES, 1 + sum(chain.legal[1:]))
        cuts = balanced_cuts(chain.flops, cut_bytes=chain.cut_bytes, legal=chain.legal, num_stages=num_stages)
        transients = (*chain.forward_transient_bytes, *chain.backward_transient_bytes)
        weights = sum(each.num_bytes * (1 + each.trains) for each in chain.parameters)
        needed = weights + sum(held.num_bytes for held in chain.saved) + max(transients)
        return Rehearsal(recorded, cuts, needed)

    def run(self, repetitions: int, *, late: bool = False) -> list[Passed]:
        """Pass the microbatch through, once to warm up and then so many times.

        Who is `late` begins half a pass later: so ranks that rehearse together do different things at a time,
        as in a pipeline. Parameters have the model's numbers, or small random ones where it has none; the
        model, its buffers and all random generators are left as they were. Raises `RecordError` where a stage
        fails.
        """
        graph, model, device = self.recorded.graph, self.recorded.model, self.recorded.device
        made, places = cut(graph, self.positions), places_of_parameters(model)
        with (
            undisturbed(model, device),
            ready(graph, model, places, made.sections, device, keeps_numbers=True) as (stages, works),
        ):
            first = self._passed(made, stages, works)
            if late:
                time.sleep(sum(map(sum, first)) / 2)
            return [self._passed(made, stages, works) for _ in range(repetitions)]

    def _passed(self, made: Cut, stages: Sequence[Stage], works: Sequence[Work]) -> Passed:
        batch, device = dict(enumerate(self.recorded.batch)), self.recorded.device
        flights = [InFlight(work) for work in works]
        forward, backward = [0.0] * len(stages), [0.0] * len(stages)
        number = 0
        try:
            for number, (stage, flight) in enumerate(zip(stages, flights, strict=True)):
                run = partial(stage.run_forward, flight, batch, step=0, microbatch=0)
                forward[number], _ = timed(run, device)
                for target in made.sections[number].sends:
                    flights[target].activations[number] = stage.outgoing(flight, target, Payload.ACTIVATION)
            flights[-1].loss = pytree.tree_leaves(flights[-1].output)[0]
            flights[-1].output = None
            for number, stage in reversed([*enumerate(stages)]):
                run = partial(stage.run_backward, flights[number])
                backward[number], _ = timed(run, device)
                for target in made.sections[number].gradient_sends:
                    parcel = stage.outgoing(flights[number], target, Payload.GRADIENT)
                    flights[target].gradients[number] = parcel
        except (EvenflowError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            nodes = works[number].section.nodes
            raise RecordError(
                f"{nodes[0].name} to {nodes[-1].name} cannot be run to be measured "
                f"({type(error).__name__}: {error})"
            ) from error
        return tuple(zip(forward, backward, strict=True))


def over(mean: Callable[[Iterable[float]], float], passes: Sequence[Passed]) -> Passed:
    """Some mean of each stage's seconds.

    >>> over(max, [((1.0, 2.0),), ((3.0, 1.0),)])
    ((3.0, 2.0),)
    """
    stages = (zip(*stage, strict=True) for stage in zip(*passes, strict=True))
    return tuple((mean(forward), mean(backward)) for forward, backward in stages)


def found_in(cache: Cache, signs: Sequence[str], positions: Sequence[int]) -> Passed | None:
    """What was kept of a rehearsal of nodes with these signatures, cut there."""
    stages = [cache.find(_sign(signs, positions, stage)) for stage in range(len(positions) + 1)]
    whole = [stage for stage in stages if stage is not None]
    if len(whole) < len(stages):
        return None
    return tuple((stage.forward_seconds, stage.backward_seconds) for stage in whole)


def keep_in(cache: Cache, signs: Sequence[str], positions: Sequence[int], passed: Passed) -> None:
    """Keep what a rehearsal's stages took, for the next time."""
    for stage, (forward, backward) in enumerate(passed):
        sign = _sign(signs, positions, stage)
        cost = Measured(forward, backward, 0.0, 0.0, NOTHING_KEPT, NOTHING_KEPT, (), 0, 0)
        cache.keep(sign, f"stage {stage} of a rehearsal", cost)


def _sign(signs: Sequence[str], positions: Sequence[int], stage: int) -> str:
    return repr((*signs, *positions, stage))


def as_rehearsed(
    chain: Chain,
    alike: Sequence[int],
    positions: Sequence[int],
    passed: Mapping[str, Passed],
    *,
    op_seconds: float,
) -> Chain:
    """The chain with seconds that add up to those of its stages as rehearsed, by kind of device.

    `alike` gives for each node the first that is the same: those stay equal, with the mean of what their
    stages were off. `op_seconds` are what a stage's forward or backward takes beside its nodes, at most half.
    Kinds of devices that did not rehearse keep their seconds.

    >>> times = Seconds((1.0, 1.0), (2.0, 2.0), (0.0, 0.0))
    >>> chain = Chain(("a", "b"), 1, (1.0,) * 2, {"cpu": times})
    >>> found = as_rehearsed(chain, (0, 1), (1,), {"cpu": ((2.0, 2.0), (1.0, 3.0))}, op_seconds=0.0)
    >>> found.seconds["cpu"].forward, found.seconds["cpu"].input_grad
    ((2.0, 1.0), (2.0, 3.0))
    """
    bounds = [*pairwise((0, *positions, chain.num_nodes))]

    def scaled(seconds: Seconds, stages: Passed) -> Seconds:
        whole = tuple(map(sum, zip(seconds.input_grad, seconds.weight_grad, strict=True)))
        forward, backward = (
            _factors(nodes, alike, bounds, [max(each - op_seconds, each / 2) for each in took])
            for nodes, took in zip((seconds.forward, whole), zip(*stages, strict=True), strict=True)
        )
        return Seconds(
            tuple(map(mul, seconds.forward, forward)),
            tuple(map(mul, seconds.input_grad, backward)),
            tuple(map(mul, seconds.weight_grad, backward)),
        )

    return replace(
        chain,
        seconds={
            kind: scaled(seconds, passed[kind]) if kind in passed else seconds
            for kind, seconds in chain.seconds.items()
        },
    )


def _factors(
    nodes: Sequence[float], alike: Sequence[int], bounds: Sequence[tuple[int, int]], took: Sequence[float]
) -> list[float]:
    """For each node, how many times as long as by itself its like took, in the mean over their seconds."""
    own, rehearsed = [0.0] * len(nodes), [0.0] * len(nodes)
    for (start, end), seconds in zip(bounds, took, strict=True):
        alone = sum(nodes[start:end])
        for node in range(start, end):
            own[alike[node]] += nodes[node]
            rehearsed[alike[node]] += nodes[node] * (seconds / alone if alone else 1.0)
    return [rehearsed[first] / own[first] if own[first] else 1.0 for first in alike]
