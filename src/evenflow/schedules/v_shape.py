"""What V-Half and V-Min share: the building block of the V-shaped placement.

Source: Qi, Wan, Amar, Lin, "Pipeline Parallelism with Controllable Memory", NeurIPS 2024, arXiv:2405.15362. A
rank holds a stage on the way down and one on the way up. One microbatch's ops are given places that, repeated
every six ops, never collide: the building block. How far its stages lie apart sets how long activations live,
and so the memory.

Here the block gives the order in which ops are due, and each rank runs the op that is due first among those
that are ready, as long as its stages hold no more microbatches than their shares of a limit. Rejected: the
paper's "squeeze" and "reorder", which move the repeated blocks' ops one by one: this is shorter, and serves
any number of microbatches.

It can't come to a standstill: a stage's share is at least one microbatch and each kind runs in the order of
the microbatches, so whatever the oldest unfinished microbatch needs next can run.
"""

from evenflow.ir.op import ComputeOp, Forward, InputGrad, WeightGrad
from evenflow.ir.placement import Placement
from evenflow.schedules.gap_filling import Kind, Pace, Progress, Turn, fill

_BLOCK_TICKS = 6  # F, I and W of two stages, of a tick each


def v_queues(placement: Placement, num_microbatches: int, limit: int) -> tuple[tuple[ComputeOp, ...], ...]:
    """Return each rank's queue, with F, I and W in parts, holding at most `limit` activations of a stage.

    The limit is at least 2.

    >>> for queue in v_queues(Placement.v_shape(2), num_microbatches=2, limit=4):
    ...     print(*queue)
    0F0 0F1 3F0 3I0 3F1 3I1 0I0 3W0 0I1 3W1 0W0 0W1
    1F0 2F0 1F1 2F1 2I0 1I0 2I1 1I1 2W0 1W0 2W1 1W1
    """
    block = _Block(placement, limit)
    return fill(placement, num_microbatches, block.choose, Pace(op_ticks=1, transfer_ticks=0))


class _Block:
    """The order in which ops are due, and the shares of the limit."""

    def __init__(self, placement: Placement, limit: int) -> None:
        num_ranks = placement.num_ranks
        self.stages = [placement.stages_on(rank) for rank in range(num_ranks)]
        # Below this limit the stages lie as close as they can; above it, apart, so that transfers have time.
        wide = limit > num_ranks
        self.due = _due_ticks(num_ranks, places_apart=3 if wide else 1)
        self.shares = [0] * placement.num_stages
        # At the turn both arms hold alike. At the outer end the way up needs only the microbatch in work, and
        # one more whose weight gradient waits where stages lie close.
        outer = min(1 if wide else 2, limit // 2)
        for rank, (down, up) in enumerate(self.stages):
            self.shares[up] = outer + rank * (limit // 2 - outer) // max(1, num_ranks - 1)
            self.shares[down] = limit - self.shares[up]

    def choose(self, progress: Progress, rank: int, now: int) -> Turn | None:
        """Return the op that is due first, among those that are ready."""
        later: list[Turn] = []
        for turn in self._known(progress, rank):
            if turn.kind is Forward and self._full(progress, rank, turn.stage):
                if turn.arrival <= now and turn.stage in progress.pending[rank]:
                    return Turn(WeightGrad, turn.stage, now)  # makes room for it
                continue
            if turn.arrival <= now:
                return turn
            later.append(turn)
        return min(later, key=lambda turn: turn.arrival, default=None)

    def _known(self, progress: Progress, rank: int) -> list[Turn]:
        """The next forwards and input gradients whose arrivals are known, by when they are due."""
        found: list[tuple[int, Turn]] = []
        for stage in self.stages[rank]:
            for kind, ends in ((Forward, progress.forward_ends), (InputGrad, progress.input_grad_ends)):
                arrival = progress.arrival(kind, stage)
                if arrival is not None:
                    due = self.due[kind, stage] + _BLOCK_TICKS * len(ends[stage])
                    found.append((due, Turn(kind, stage, arrival)))
        found.sort(key=lambda pair: pair[0])
        return [turn for _, turn in found]

    def _full(self, progress: Progress, rank: int, stage: int) -> bool:
        """Whether the stage holds its share; it may use what the rank's other stage needs no more."""
        down, up = self.stages[rank]
        other = up if stage == down else down
        held = progress.held(other)
        left = progress.num_microbatches - len(progress.forward_ends[other])
        reserved = max(held, min(self.shares[other], held + left))
        return progress.held(stage) + reserved >= self.shares[stage] + self.shares[other]


def _due_ticks(num_ranks: int, places_apart: int) -> dict[tuple[Kind, int], int]:
    """When the first microbatch's ops are due, if a stage's op is due so many places after the one before."""
    due: dict[tuple[Kind, int], int] = {}
    place = 0
    num_stages = 2 * num_ranks
    path: list[tuple[Kind, int]] = [(Forward, stage) for stage in range(num_stages)]
    path += [(InputGrad, stage) for stage in reversed(range(num_stages))]
    for kind, stage in path:
        due[kind, stage] = place
        # The same rank goes on with its other stage, or turns from forward to backward, at once.
        last = num_ranks - 1 if kind is Forward else num_ranks
        turns = stage == last or (kind is Forward and stage == num_stages - 1)
        place += 1 if turns else places_apart
    return due
