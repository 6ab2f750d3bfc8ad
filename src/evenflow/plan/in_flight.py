"""How many microbatches each stage of a schedule holds when its rank holds most."""

from collections.abc import Iterator

from evenflow.ir.op import ComputeOp, Forward, InputGrad, WeightGrad
from evenflow.ir.schedule import Schedule
from evenflow.rules import results


def in_flight(schedule: Schedule, *, kept_share: float = 1.0) -> tuple[float, ...]:
    """Return, for each stage, what it holds at its rank's peak, in microbatches.

    A microbatch counts 1 from its forward until its input gradient has ended, then `kept_share` (0 to 1)
    until its weight gradient has. All stages of a rank count alike.

    >>> from evenflow.schedules.one_f_one_b import one_f_one_b
    >>> in_flight(one_f_one_b(num_ranks=3, stages_per_rank=1, num_microbatches=6))
    (3.0, 2.0, 1.0)
    """
    held = [0.0] * schedule.placement.num_stages
    for rank, queue in enumerate(schedule.ranks):
        peak = max(_moments(queue, kept_share), key=lambda each: sum(each.values()))
        for stage in schedule.placement.stages_on(rank):
            held[stage] = peak.get(stage, 0.0)
    return tuple(held)


def _moments(queue: tuple[ComputeOp, ...], kept_share: float) -> Iterator[dict[int, float]]:
    """What each stage of a rank holds while each op runs."""
    held: dict[int, float] = {}
    for op in queue:
        made = results(op)
        for result in made:
            if isinstance(result, Forward):
                held[result.stage] = held.get(result.stage, 0.0) + 1
        yield dict(held)
        for result in made:
            match result:
                case InputGrad(stage):
                    held[stage] -= 1 - kept_share
                case WeightGrad(stage):
                    held[stage] -= kept_share
                case Forward():
                    pass
