"""What each rank of a schedule holds when it holds most."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import islice

import numpy as np

from evenflow.ir.op import Backward, Forward, InputGrad, SimpleOp, WeightGrad, parts
from evenflow.ir.schedule import Schedule
from evenflow.plan.rank_memory import Peak


@dataclass(frozen=True, slots=True)
class StageBytes:
    """What one microbatch has of a stage in memory, and what the stage has once; bytes.

    - `saved`: from the forward until the input gradient; `kept`: what of it stays until the weight gradient.
    - `forward_transient` and `backward_transient`: beside that, while its forward or its backward runs.
    - `received` and `sent`: of a parcel between it and the stage before, and the stage behind.
    - `gradients`: of its weights, from the end of the first backward on.
    - `weight_transient`: beside what was kept, while its weight gradient runs.
    """

    saved: float
    kept: float = 0.0
    forward_transient: float = 0.0
    backward_transient: float = 0.0
    received: float = 0.0
    sent: float = 0.0
    gradients: float = 0.0
    weight_transient: float = 0.0


class InFlight:
    """What a schedule's ranks hold at the moments when one may hold most: while each op runs.

    Any number of costs can then be asked about, without a walk through the schedule. Parcels have memory
    before they are used, as the next `receives_ahead` that a rank expects, and after: the last `sends_ahead`
    that it has sent.
    """

    def __init__(self, schedule: Schedule, *, receives_ahead: int = 0, sends_ahead: int = 0) -> None:
        self.placement = schedule.placement
        self._moments = tuple(
            np.array(list(dict.fromkeys(_Walk(schedule, rank, receives_ahead, sends_ahead).moments())))
            for rank in range(schedule.placement.num_ranks)
        )

    def peaks(self, stages: Sequence[StageBytes]) -> tuple[Peak, ...]:
        """Each rank's peak, for stages of these sizes.

        >>> from evenflow.schedules.one_f_one_b import one_f_one_b
        >>> schedule = one_f_one_b(num_ranks=2, stages_per_rank=1, num_microbatches=6)
        >>> first, last = InFlight(schedule).peaks([StageBytes(1.0), StageBytes(5.0, gradients=4.0)])
        >>> first.total, last.activations, last.gradients
        (2.0, 5.0, 4.0)
        """
        return tuple(self._peak(rank, stages) for rank in range(self.placement.num_ranks))

    def _peak(self, rank: int, stages: Sequence[StageBytes]) -> Peak:
        sizes = np.array([astuple(stages[stage]) for stage in self.placement.stages_on(rank)])
        held = (self._moments[rank] * sizes).sum(axis=1)  # [moment, what]
        most = held[held.sum(axis=1).argmax()]
        saved, kept, forward, backward, received, sent, gradients, late = map(float, most)
        return Peak(saved + kept, forward + backward + late, received + sent, gradients)

    def microbatches(self, *, kept_share: float = 1.0) -> tuple[float, ...]:
        """For each stage, what it holds at its rank's peak, in microbatches.

        A microbatch counts 1 from its forward until its input gradient has ended, then `kept_share` (0 to 1)
        until its weight gradient has. All stages of a rank count alike.

        >>> from evenflow.schedules.one_f_one_b import one_f_one_b
        >>> schedule = one_f_one_b(num_ranks=3, stages_per_rank=1, num_microbatches=6)
        >>> InFlight(schedule).microbatches()
        (3.0, 2.0, 1.0)
        """
        found = [0.0] * self.placement.num_stages
        for rank, moments in enumerate(self._moments):
            held = moments[:, :, 0] + kept_share * moments[:, :, 1]  # [moment, stage]
            most = held[held.sum(axis=1).argmax()]
            for stage, number in zip(self.placement.stages_on(rank), most, strict=True):
                found[stage] = float(number)
        return tuple(found)


_Moment = tuple[tuple[int, ...], ...]  # [stage of the rank][field of `StageBytes`]: how many of it are there
_FIELDS = tuple(StageBytes.__dataclass_fields__)
_SAVED, _KEPT, _FORWARD, _BACKWARD, _RECEIVED, _SENT, _GRADIENTS, _LATE = range(len(_FIELDS))


class _Walk:
    """Walks through a rank's ops and tells what is there while each runs."""

    def __init__(self, schedule: Schedule, rank: int, receives_ahead: int, sends_ahead: int) -> None:
        self._placement = schedule.placement
        self._place = {stage: at for at, stage in enumerate(schedule.placement.stages_on(rank))}
        self._ops = [part for op in schedule.ranks[rank] for part in parts(op)]
        self._held = [[0] * len(_FIELDS) for _ in self._place]
        self._coming = deque(filter(None, (self._parcel(op, _RECEIVED, _SENT) for op in self._ops)))
        self._ahead = receives_ahead
        self._leaving: deque[tuple[int, int]] = deque(maxlen=sends_ahead)

    def moments(self) -> Iterator[_Moment]:
        """What is there while each op runs."""
        for op in self._ops:
            own = self._held[self._place[op.stage]]
            if self._parcel(op, _RECEIVED, _SENT) is not None:
                self._coming.popleft()
            own[_SAVED] += isinstance(op, Forward)
            yield self._during(op)
            if isinstance(op, Backward | InputGrad):
                own[_SAVED] -= 1
                own[_KEPT] += isinstance(op, InputGrad)
            if isinstance(op, WeightGrad):
                own[_KEPT] -= 1
            if isinstance(op, Backward | WeightGrad):
                own[_GRADIENTS] = 1
            if (parcel := self._parcel(op, _SENT, _RECEIVED)) is not None:
                self._leaving.append(parcel)

    def _during(self, op: SimpleOp) -> _Moment:
        found = [list(each) for each in self._held]
        own = found[self._place[op.stage]]
        match op:
            case Forward():
                own[_FORWARD] = 1
            case WeightGrad():
                own[_LATE] = 1
            case _:
                own[_BACKWARD] = 1
        for place, side in (*islice(self._coming, self._ahead), *self._leaving):
            found[place][side] += 1
        return tuple(map(tuple, found))

    def _parcel(self, op: SimpleOp, of_forward: int, of_backward: int) -> tuple[int, int] | None:
        """The parcel that an op exchanges with another rank on one side: its stage's place, and the side."""
        if isinstance(op, WeightGrad):
            return None
        side = of_forward if isinstance(op, Forward) else of_backward
        other = op.stage + (1 if side == _SENT else -1)
        rank_of = self._placement.rank_of
        if not 0 <= other < len(rank_of) or rank_of[other] == rank_of[op.stage]:
            return None
        return self._place[op.stage], side
