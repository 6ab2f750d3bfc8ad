"""What a run takes beside its nodes: the runtime's own time for ops, parcels and steps, and its buffers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from evenflow.plan.costs.stages import StageCost
from evenflow.plan.costs.traffic import Parcels


@dataclass(frozen=True, slots=True)
class Overheads:
    """Seconds of a rank's own time, in which it computes nothing, and buffers.

    - `op_seconds`: for each forward and each backward of a stage.
    - `parcel_seconds` and `seconds_per_byte`: for what it sends to another rank, and as much for what it
      receives.
    - `step_seconds`: once a step, whatever is in it.
    - `receives_ahead` and `sends_ahead`: how many parcels have memory on a rank before they are used, and
      after they were sent.

    Where nothing is known of them, seconds are 0, and one parcel comes and one goes.
    """

    op_seconds: float = 0.0
    parcel_seconds: float = 0.0
    seconds_per_byte: float = 0.0
    step_seconds: float = 0.0
    receives_ahead: int = 1
    sends_ahead: int = 1

    def handling_seconds(self, num_bytes: float) -> float:
        """What one end of a transfer takes; a transfer of nothing is none.

        >>> Overheads(parcel_seconds=1.0, seconds_per_byte=0.5).handling_seconds(4.0)
        3.0
        """
        return self.parcel_seconds + self.seconds_per_byte * num_bytes if num_bytes else 0.0


def as_run(
    stages: Sequence[StageCost], parcels: Sequence[Parcels], overheads: Overheads, *, splits: bool
) -> tuple[StageCost, ...]:
    """The stages as the runtime runs them: with its own time, and with backwards as it parts them.

    `parcels` are what each exchanges with other ranks. Where the schedule splits backwards, the first stage,
    which nobody waits for, leaves everything to the weight gradient.

    >>> ends = [StageCost(n, n + 1, 1.0, 1.0, 0.5, 4.0, 2.0, 0.0, 0.0, 8.0 * n, 0.0, 0.0, 0) for n in (0, 1)]
    >>> none = [Parcels([], [], [], [])] * 2
    >>> first, second = as_run(ends, none, Overheads(op_seconds=0.25), splits=True)
    >>> (first.input_grad_seconds, first.weight_grad_seconds), second.weight_grad_seconds
    ((0.0, 1.75), 0.75)
    """
    return tuple(
        _as_run(stage, number, own, overheads, splits)
        for number, (stage, own) in enumerate(zip(stages, parcels, strict=True))
    )


def _as_run(stage: StageCost, number: int, parcels: Parcels, overheads: Overheads, splits: bool) -> StageCost:
    def own(*sizes: float) -> float:
        return overheads.op_seconds + sum(map(overheads.handling_seconds, sizes))

    first, rest = stage.input_grad_seconds, stage.weight_grad_seconds
    late = splits and number == 0
    if late:
        first, rest = 0.0, first + rest
    backward = own(*parcels.gradients_received, *parcels.gradients_sent)
    return replace(
        stage,
        forward_seconds=stage.forward_seconds + own(*parcels.received, *parcels.sent),
        input_grad_seconds=first + (backward if first or not splits else 0.0),
        weight_grad_seconds=rest + (overheads.op_seconds if splits and rest else 0.0),
        kept_bytes=stage.saved_bytes if late else stage.kept_bytes,
        backward_transient_bytes=0.0 if late else stage.backward_transient_bytes,
        weight_transient_bytes=stage.backward_transient_bytes if late else stage.weight_transient_bytes,
    )
