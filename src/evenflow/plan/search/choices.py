"""The space that is searched: every choice that the levers leave open, and where they leave none, why."""

import math
from collections.abc import Iterator
from typing import get_args

from evenflow.plan.choice import Choice, Degrees, Sharding
from evenflow.plan.request import Request

# By stages per rank: the schedules worth pricing. The others are never faster, nor hold less. Eager 1F1B
# holds more than 1F1B, and is faster where transfers take time.
_SCHEDULES = {
    1: ("1f1b", "eager-1f1b", "zb-h1", "zb-h2"),
    2: ("interleaved-1f1b", "interleaved-zb", "zb-v", "v-half", "v-min"),
    4: ("interleaved-1f1b", "interleaved-zb"),
}
# Of choices of the planner's own; the user may ask for more.
_MOST_MICROBATCHES = 512
_MOST_TENSOR = 8
_MOST_EXPERT = 64


def choices(request: Request) -> Iterator[Choice]:
    """Every choice that the levers leave open, without savings of memory.

    >>> from evenflow.cluster.short import parse_cluster
    >>> from evenflow.plan.request import Levers
    >>> levers = Levers(expert=1)
    >>> request = Request(lambda rows: None, (1, 2), parse_cluster("2xH100"), 4, 8.0, 0.01, levers=levers)
    >>> sorted({(choice.degrees.pipeline, choice.degrees.data) for choice in choices(request)})
    [(1, 1), (1, 2), (2, 1)]
    """
    for degrees in _degrees(request):
        for size, number in _sizes(request, degrees.data):
            for per_rank, schedule in _schedules(request, degrees.pipeline):
                choice = Choice(degrees, per_rank, schedule, size, number, "none")
                if request.lays_out(choice):
                    yield choice


def _degrees(request: Request) -> Iterator[Degrees]:
    levers, num_ranks = request.levers, request.cluster.num_ranks
    most_expert = _MOST_EXPERT if levers.expert is None and _has_experts(request) else 1
    # One device alone may be faster than several that are joined badly.
    for used in dict.fromkeys((num_ranks, 1)):
        for pipeline in _divisors(used, levers.pipeline, used):
            for tensor in _divisors(used // pipeline, levers.tensor, _MOST_TENSOR):
                for context in _divisors(used // pipeline // tensor, levers.context, 1):
                    data = used // pipeline // tensor // context
                    if levers.data not in (None, data):
                        continue
                    for expert in _divisors(data, levers.expert, most_expert):
                        yield Degrees(pipeline, data, tensor, context, expert)


def _has_experts(request: Request) -> bool:
    parameters = request.chain_of(request.microbatch_sizes[0]).parameters
    return any(parameter.is_expert for parameter in parameters)


def _divisors(number: int, given: int | None, most: int) -> tuple[int, ...]:
    if given is not None:
        return (given,) if number % given == 0 else ()
    return tuple(d for d in range(1, min(number, most) + 1) if number % d == 0)


def _sizes(request: Request, data: int) -> list[tuple[int, int]]:
    """Rows of a microbatch and their number, of those that part the batch evenly."""
    levers, (rows, rest) = request.levers, divmod(request.batch_rows, data)
    if rest:
        return []
    found = [
        (size, rows // size)
        for size in request.microbatch_sizes
        if rows % size == 0
        and levers.microbatch_size in (None, size)
        and levers.num_microbatches in (None, rows // size)
    ]
    few = [each for each in found if each[1] <= _MOST_MICROBATCHES]
    # The largest that there are, where even they are many.
    return few or sorted(found)[-1:]


def _schedules(request: Request, num_ranks: int) -> Iterator[tuple[int, str]]:
    levers = request.levers
    if num_ranks == 1:
        yield 1, "1f1b"
        return
    for per_rank, names in _SCHEDULES.items():
        if levers.stages_per_rank in (None, per_rank):
            for name in names if levers.schedule is None else (levers.schedule,):
                if name in names or levers.stages_per_rank == per_rank:
                    yield per_rank, name


def open_shardings(request: Request, choice: Choice) -> tuple[Sharding, ...]:
    """What the levers let a choice's data ranks share, in the order of what it costs."""
    every: tuple[Sharding, ...] = get_args(Sharding) if choice.degrees.data > 1 else ("none",)
    return tuple(each for each in every if request.levers.sharding in (None, each))


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
    degrees = {
        "pipeline": levers.pipeline,
        "data": levers.data,
        "tensor": levers.tensor,
        "context": levers.context,
    }
    if devices % math.prod(degree or 1 for degree in degrees.values()):
        ranks = " x ".join(f"{degree} {name}" for name, degree in degrees.items() if (degree or 1) > 1)
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
    yield from _contradicting_sizes(request, rows)
    if levers.schedule is not None:
        per_rank = levers.stages_per_rank or "any number of"
        yield (
            f"the schedule {levers.schedule} with {per_rank} stages a rank is none that is planned with by "
            "itself: give both, the schedule and its stages a rank, or neither"
        )


def _contradicting_sizes(request: Request, rows: int) -> Iterator[str]:
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
