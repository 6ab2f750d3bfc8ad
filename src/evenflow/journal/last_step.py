"""The last step of a run, op by op: what a page, a trace and a picture of it are drawn from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

from evenflow.bill import Bill
from evenflow.errors import ConfigError
from evenflow.ir.op import ComputeOp, Op, parse_op
from evenflow.ir.timeline import Lane, Timeline

_DIGITS = 8  # ten nanoseconds: below it a clock tells nothing


@dataclass(frozen=True, slots=True)
class LaneRecord:
    """One rank's ops in their order, as text, and for each the seconds when it waited, started and ended.

    `came_seconds`: when the rank came to the op; until `start_seconds` it waited for what the op takes. All
    count from the step's first op that computed. `held_bytes`: the bytes of tensors that were there after
    each op, where somebody measured; else empty.
    """

    ops: tuple[str, ...]
    came_seconds: tuple[float, ...]
    start_seconds: tuple[float, ...]
    end_seconds: tuple[float, ...]
    held_bytes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        columns = (self.came_seconds, self.start_seconds, self.end_seconds, *filter(len, [self.held_bytes]))
        if any(len(column) != len(self.ops) for column in columns):
            raise ConfigError(f"a lane's columns must be as long as its {len(self.ops)} ops")
        times = zip(self.ops, self.came_seconds, self.start_seconds, self.end_seconds, strict=True)
        before = -math.inf
        for op, came, start, end in times:
            parse_op(op)  # raises for what is none
            if not before <= came <= start <= end:
                raise ConfigError(
                    f"{op} comes at {came:g} s, starts at {start:g} and ends at {end:g}: not in turn"
                )
            before = end

    def lane(self) -> Lane:
        """The lane as timelines hold it.

        >>> LaneRecord(("0F0",), (0.0,), (0.5,), (1.5,)).lane().busy_seconds
        1.0
        """
        return Lane(tuple(map(parse_op, self.ops)), self.start_seconds, self.end_seconds)


@dataclass(frozen=True, slots=True)
class EdgeRecord:
    """What one microbatch sends from a stage to another: activations ("F"), or their gradients ("B")."""

    source: int
    target: int
    payload: Literal["F", "B"]
    num_tensors: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class HeldStage:
    """What a stage is made of: its modules in program order, and its part of the estimated work, 0 to 1."""

    rank: int
    modules: tuple[str, ...]
    num_nodes: int
    num_parameters: int
    share: float


@dataclass(frozen=True)  # without slots, which leave no room for what is kept: reading all ops takes time
class LastStep:
    """The last step of a run: a lane and a bill for each rank, as predicted and as measured.

    `caps_bytes`: the memory that each rank has, where it is known; else empty. Of one process that holds all
    ranks there is one bill. Raises `ConfigError` where the parts do not belong together.

    >>> lane = LaneRecord(("0F0",), (0.0,), (0.0,), (1.0,))
    >>> bill = Bill(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    >>> stage = HeldStage(0, ("embed",), 1, 10, 1.0)
    >>> LastStep((lane,), (lane,), (bill,), (bill,), (stage,), ()).measured_timeline.makespan_seconds
    1.0
    """

    predicted: tuple[LaneRecord, ...]
    measured: tuple[LaneRecord, ...]
    predicted_bills: tuple[Bill, ...]
    measured_bills: tuple[Bill, ...]
    stages: tuple[HeldStage, ...]
    edges: tuple[EdgeRecord, ...]
    caps_bytes: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        num_ranks, num_bills = len(self.measured), len(self.measured_bills)
        if not num_ranks or len(self.predicted) != num_ranks:
            raise ConfigError(f"{len(self.predicted)} lanes are predicted, and {num_ranks} are measured")
        if num_bills not in (1, num_ranks) or len(self.predicted_bills) != num_bills:
            raise ConfigError(f"{len(self.predicted_bills)} and {num_bills} bills, of {num_ranks} ranks")
        if self.caps_bytes and len(self.caps_bytes) != num_ranks:
            raise ConfigError(f"caps_bytes names {len(self.caps_bytes)} ranks, and there are {num_ranks}")
        num_stages = len(self.stages)
        named = [(number, stage.rank) for number, stage in enumerate(self.stages)]
        if wrong := [number for number, rank in named if rank >= num_ranks]:
            raise ConfigError(f"stages {wrong} are on ranks beyond the last, {num_ranks - 1}")
        for edge in self.edges:
            if max(edge.source, edge.target) >= num_stages:
                raise ConfigError(f"an edge {edge.source}>{edge.target}, and there are {num_stages} stages")

    @cached_property
    def predicted_timeline(self) -> Timeline:
        """As the simulator has it."""
        return Timeline(tuple(lane.lane() for lane in self.predicted))

    @cached_property
    def measured_timeline(self) -> Timeline:
        """As it came out."""
        return Timeline(tuple(lane.lane() for lane in self.measured))


def lane_record(
    rows: Sequence[tuple[Op, float, float, float]], *, origin: float = 0.0, held_bytes: Sequence[int] = ()
) -> LaneRecord:
    """Return the record of ops with the seconds at which each came, started and ended, from `origin` on.

    Where clocks or rounding have an op begin before another has ended, it begins right then.

    >>> from evenflow.ir.op import Forward
    >>> lane_record([(Forward(0, 0), 5.0, 5.25, 6.0)], origin=5.0)
    LaneRecord(ops=('0F0',), came_seconds=(0.0,), start_seconds=(0.25,), end_seconds=(1.0,), held_bytes=())
    """
    moments = [round(moment - origin, _DIGITS) for _, *each in rows for moment in each]
    in_turn = tuple(accumulate(moments, max))
    return LaneRecord(
        tuple(str(op) for op, _, _, _ in rows), in_turn[::3], in_turn[1::3], in_turn[2::3], tuple(held_bytes)
    )


def first_start(lanes: Sequence[Sequence[tuple[Op, float, float, float]]]) -> float:
    """Return when the first op of all that computed started; 0 if none did.

    >>> first_start([])
    0.0
    """
    starts = [start for lane in lanes for op, _, start, _ in lane if isinstance(op, ComputeOp)]
    return min(starts, default=0.0)
