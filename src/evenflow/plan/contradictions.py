"""Why levers leave nothing to choose: the first of them that rows, devices or sizes do not allow."""

import math
from collections.abc import Iterator

from evenflow.plan.request import Request

_DEGREES = ("pipeline", "data", "tensor", "context")


def contradiction(request: Request) -> str:
    """Say of a request without any choice which levers contradict the numbers, and what would do.

    >>> from evenflow.cluster.short import parse_cluster
    >>> from evenflow.plan.request import Levers
    >>> levers = Levers(pipeline=3)
    >>> contradiction(Request(lambda rows: None, (1,), parse_cluster("8xH100"), 4, 8.0, 0.01, levers=levers))
    '3 pipeline ranks are asked for, and 8 devices cannot be parted so: make it a divisor of 8'
    """
    found = next(_contradictions(request), None)
    if found is not None:
        return found
    limits = ", the limits of the system that is planned for" if request.limits is not None else ""
    return (
        f"nothing can be chosen: {request.batch_rows} rows, {request.cluster.num_ranks} devices{limits} and "
        "the levers that were given admit no microbatches of a whole number of rows; give fewer levers"
    )


def _contradictions(request: Request) -> Iterator[str]:
    levers, devices = request.levers, request.cluster.num_ranks
    given = {name: getattr(levers, name) for name in _DEGREES if getattr(levers, name) is not None}
    wanted = math.prod(given.values())
    if devices % wanted:
        ranks = " x ".join(f"{degree} {name}" for name, degree in given.items() if degree > 1)
        yield (
            f"{ranks} ranks are asked for, and {devices} devices cannot be parted so: make it a divisor of "
            f"{devices}"
        )
    data = levers.data or 1
    rows, rest = divmod(request.batch_rows, data)
    if rest:
        yield (
            f"{request.batch_rows} rows cannot be parted evenly over {data} data ranks: give a multiple of "
            f"{data} rows"
        )
    yield from _sizes(request, rows)
    if levers.schedule is not None:
        per_rank = levers.stages_per_rank or "any number of"
        yield (
            f"the schedule {levers.schedule} with {per_rank} stages a rank is none that is planned with by "
            "itself: give both, the schedule and its stages a rank, or neither"
        )


def _sizes(request: Request, rows: int) -> Iterator[str]:
    levers, known = request.levers, ", ".join(map(str, request.microbatch_sizes))
    size, number = levers.microbatch_size, levers.num_microbatches
    of_each = f"the {rows} rows of a data rank"
    if size is not None and (rows % size or size not in request.microbatch_sizes):
        yield f"microbatches of {size} rows, from {of_each}: the sizes that can be planned are {known}"
    if number is not None and rows % number:
        yield f"{number} microbatches, from {of_each}: make it a divisor of {rows}"
    if number is not None and rows // number not in request.microbatch_sizes:
        each = rows // number
        yield (
            f"{number} microbatches, from {of_each}, have {each} each: the sizes that can be planned are "
            f"{known}"
        )
