"""Parameters that stages on several ranks use, such as an embedding that is the output layer too."""

from bisect import bisect_right
from collections.abc import Callable, Sequence

from evenflow.ir.costs import Link
from evenflow.plan.chain import Parameter


def shared_seconds(
    parameters: Sequence[Parameter],
    positions: Sequence[int],
    rank_of: Sequence[int],
    link: Callable[[int, int], Link],
    *,
    gradient_bytes: float,
) -> float:
    """What a step takes to keep shared parameters the same, after the pipeline and around the update.

    Each stage's gradient goes to the rank of the first stage that uses the parameter; the new numbers go from
    there to every rank that has it. `gradient_bytes` are those for each byte of the parameter, `link` joins
    two ranks, from one to the other.

    >>> tied = Parameter("embedding", 2, 8, True, nodes=(0, 3))
    >>> line = Link(latency_seconds=1.0, bytes_per_second=4.0)
    >>> shared_seconds([tied], (1,), (0, 1), lambda one, other: line, gradient_bytes=1.0)
    6.0
    """
    seconds = 0.0
    for parameter in parameters:
        if not parameter.trains or len(parameter.nodes) == 1:
            continue
        owner, *others = (
            rank_of[stage] for stage in sorted({bisect_right(positions, n) for n in parameter.nodes})
        )
        for rank in others:
            if rank != owner:
                seconds += link(rank, owner).transfer_seconds(parameter.num_bytes * gradient_bytes)
        for rank in {*others} - {owner}:
            seconds += link(owner, rank).transfer_seconds(parameter.num_bytes)
    return seconds
