"""What each rank of a schedule holds when it holds most."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from evenflow.ir.op import Forward, InputGrad, WeightGrad
from evenflow.ir.schedule import Schedule
from evenflow.rules import results


class InFlight:
    """What a schedule's ranks hold at the moments when one may hold most: when a forward has allocated.

    Any number of costs can then be asked about, without a walk through the schedule.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.placement = schedule.placement
        self._moments = tuple(_moments(schedule, rank) for rank in range(schedule.placement.num_ranks))

    def peak_bytes(self, saved: Sequence[float], kept: Sequence[float]) -> tuple[float, ...]:
        """The most that each rank holds, where stages save so much for a microbatch.

        `kept` of it stays between the input gradient and the weight gradient. It is what `memory.peak_bytes`
        finds of the schedule.

        >>> from evenflow.schedules.one_f_one_b import one_f_one_b
        >>> InFlight(one_f_one_b(num_ranks=2, stages_per_rank=1, num_microbatches=6)).peak_bytes(
        ...     [1, 5], [0, 0]
        ... )
        (2.0, 5.0)
        """
        return tuple(float(held.max()) for held in self._held(saved, kept))

    def microbatches(self, *, kept_share: float = 1.0) -> tuple[float, ...]:
        """For each stage, what it holds at its rank's peak, in microbatches.

        A microbatch counts 1 from its forward until its input gradient has ended, then `kept_share` (0 to 1)
        until its weight gradient has. All stages of a rank count alike.

        >>> from evenflow.schedules.one_f_one_b import one_f_one_b
        >>> schedule = one_f_one_b(num_ranks=3, stages_per_rank=1, num_microbatches=6)
        >>> InFlight(schedule).microbatches()
        (3.0, 2.0, 1.0)
        """
        num_stages = self.placement.num_stages
        most = [held.argmax() for held in self._held([1.0] * num_stages, [kept_share] * num_stages)]
        found = [0.0] * num_stages
        for rank, (moments, at) in enumerate(zip(self._moments, most, strict=True)):
            for (whole, kept), stage in zip(moments[at], self.placement.stages_on(rank), strict=True):
                found[stage] = float(whole + kept_share * kept)
        return tuple(found)

    def _held(self, saved: Sequence[float], kept: Sequence[float]) -> list[npt.NDArray[np.float64]]:
        found = []
        for rank, moments in enumerate(self._moments):
            stages = self.placement.stages_on(rank)
            sizes = np.array([(saved[stage], kept[stage]) for stage in stages], dtype=float)
            found.append((moments * sizes).sum(axis=(1, 2)))
        return found


def _moments(schedule: Schedule, rank: int) -> npt.NDArray[np.float64]:
    """Different holdings of a rank: `[moment, stage of the rank]`, microbatches held whole and in part."""
    stages = schedule.placement.stages_on(rank)
    place = {stage: at for at, stage in enumerate(stages)}
    held = [[0, 0] for _ in stages]
    found: dict[tuple[tuple[int, int], ...], None] = {}
    for op in schedule.ranks[rank]:
        made = results(op)
        for result in made:
            if isinstance(result, Forward):
                held[place[result.stage]][0] += 1
                found[tuple((whole, kept) for whole, kept in held)] = None
        for result in made:
            match result:
                case InputGrad(stage):
                    held[place[stage]][0] -= 1
                    held[place[stage]][1] += 1
                case WeightGrad(stage):
                    held[place[stage]][1] -= 1
                case Forward():
                    pass
    return np.array(list(found), dtype=float)
