"""Schedule functions of one's own, as a user may pass them: any placement, any kind of op, ordered greedily.

They are no good schedules; they hold what the catalog's do not: placements that nobody would choose,
backwards of both forms in one stage, overlaps of all kinds, weight gradients as late as can be.
"""

from collections.abc import Callable
from dataclasses import dataclass

from evenflow.ir import (
    Backward,
    Flow,
    Forward,
    InputGrad,
    Overlap,
    Placement,
    Schedule,
    WeightGrad,
    parts,
)
from evenflow.rules import dependencies, results
from evenflow.schedules.catalog import ScheduleFunction

SPLIT, MIXED, WHOLE = "split", "mixed", "whole"


@dataclass(frozen=True)
class Own:
    """A schedule function: on each rank the first op that can run, of the kinds of op in `order`.

    `backwards`: "whole", "split", or "mixed", every second microbatch in another form. With `overlaps`, two
    ops that can run at the same time are run as one.
    """

    name: str
    placement_of: Callable[[int, int], Placement]
    stages_per_rank: int
    backwards: str = SPLIT
    order: str = "IBFW"
    overlaps: bool = False

    def __call__(self, num_ranks: int, stages_per_rank: int, num_microbatches: int) -> Schedule:
        placement = self.placement_of(num_ranks, stages_per_rank)
        flow = Flow.chain(placement.num_stages)
        waiting = [
            sorted(
                (op for stage in placement.stages_on(rank) for op in self.ops(stage, num_microbatches)),
                key=lambda op: (self.order.index(str(op).lstrip("0123456789")[0]), op.microbatch, -op.stage),
            )
            for rank in range(num_ranks)
        ]
        queues = [[] for _ in range(num_ranks)]
        made = set()
        while any(waiting):
            step = []
            for rank, left in enumerate(waiting):
                ready = [op for op in left if made.issuperset(dependencies(op, flow))]
                # One kind of op of a stage is run in the order of its microbatches.
                ready = [op for op in ready if not any(_is_earlier(other, op) for other in left)]
                chosen = ready[: 2 if self.overlaps else 1]
                if chosen:
                    op = chosen[0] if len(chosen) == 1 else Overlap(*chosen)
                    queues[rank].append(op)
                    step += results(op)
                    left[:] = [one for one in left if one not in parts(op)]
            assert step, "nothing can run"
            made.update(step)
        return Schedule(self.name, placement, num_microbatches, tuple(map(tuple, queues)))

    def ops(self, stage: int, num_microbatches: int):
        for microbatch in range(num_microbatches):
            yield Forward(stage, microbatch)
            if self.backwards == WHOLE or (self.backwards == MIXED and microbatch % 2):
                yield Backward(stage, microbatch)
            else:
                yield InputGrad(stage, microbatch)
                yield WeightGrad(stage, microbatch)


def _is_earlier(other, op) -> bool:
    """Whether `other` must run before `op` lest a weight's gradients add up out of order."""
    adds = (WeightGrad, Backward)
    if other.stage != op.stage or other.microbatch >= op.microbatch:
        return False
    return type(other) is type(op) or (isinstance(other, adds) and isinstance(op, (*adds, InputGrad)))


def upside_down(num_ranks: int, stages_per_rank: int) -> Placement:
    """The first stage on the last rank."""
    looped = Placement.looped(num_ranks, stages_per_rank)
    return Placement(tuple(num_ranks - 1 - rank for rank in looped.rank_of))


def in_blocks(num_ranks: int, stages_per_rank: int) -> Placement:
    """Neighbouring stages on the same rank: everything between them is handed over."""
    return Placement(tuple(rank for rank in range(num_ranks) for _ in range(stages_per_rank)))


def v_shape(num_ranks: int, stages_per_rank: int) -> Placement:
    return Placement.v_shape(num_ranks)


OWN: dict[str, ScheduleFunction] = {
    own.name: own
    for own in (
        Own("straight, split", Placement.looped, 1, order="FIBW"),
        Own("v, split", v_shape, 2),
        Own("v, mixed, overlapping", v_shape, 2, MIXED, overlaps=True),
        Own("v, split, overlapping", v_shape, 2, SPLIT, order="FIWB", overlaps=True),
        Own("looped, weights at last", Placement.looped, 3, SPLIT, order="FIBW"),
        Own("upside down", upside_down, 2, MIXED, order="WIBF"),
        Own("in blocks", in_blocks, 2, WHOLE, overlaps=True),
    )
}
