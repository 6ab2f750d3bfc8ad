"""Translate: schedules into the search's letters, and back."""

from collections import defaultdict

from evenflow.ir.op import Backward, ComputeOp, Forward, InputGrad, WeightGrad, parts
from evenflow.ir.placement import Placement
from evenflow.ir.schedule import Schedule
from evenflow.search.tables import Order


def order_of(schedule: Schedule) -> Order:
    """Return the letters of a schedule; a whole backward is two, and an overlap its ops in turn.

    >>> from evenflow.ir.placement import Placement
    >>> queue = (Forward(0, 0), Backward(0, 0))
    >>> order_of(Schedule("tiny", Placement.linear(1), num_microbatches=1, ranks=(queue,)))
    ((0, 1, 2),)
    """
    num = schedule.placement.num_stages

    def letters(op: ComputeOp) -> tuple[int, ...]:
        found: tuple[int, ...] = ()
        for part in parts(op):
            match part:
                case Forward(stage):
                    found += (stage,)
                case InputGrad(stage):
                    found += (num + stage,)
                case WeightGrad(stage):
                    found += (2 * num + stage,)
                case Backward(stage):
                    found += (num + stage, 2 * num + stage)
        return found

    return tuple(tuple(letter for op in queue for letter in letters(op)) for queue in schedule.ranks)


def schedule_of(order: Order, placement: Placement, num_microbatches: int, name: str) -> Schedule:
    """Return the schedule of strict letters: the n-th of a letter is its op of microbatch n.

    >>> from evenflow.ir.placement import Placement
    >>> print(*schedule_of(((0, 1, 2),), Placement.linear(1), 1, "tiny").ranks[0])
    0F0 0I0 0W0
    """
    num = placement.num_stages
    kinds = (Forward, InputGrad, WeightGrad)
    queues = []
    for letters in order:
        seen: defaultdict[int, int] = defaultdict(int)
        queue = []
        for letter in letters:
            queue.append(kinds[letter // num](letter % num, seen[letter]))
            seen[letter] += 1
        queues.append(tuple(queue))
    return Schedule(name, placement, num_microbatches, tuple(queues))
