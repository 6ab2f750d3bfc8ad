"""Tables: what is to be scheduled as the compiled kernels read it. Letters are ops without the microbatch.

Microbatches are identical, so the ops of one kind and stage may run in the order of their microbatches
without loss. An order is then one string of *letters* for each rank: letter `stage` is that stage's forward,
`num_stages + stage` its input gradient, `2 * num_stages + stage` its weight gradient, and the n-th
occurrence of a letter belongs to microbatch n. Memory depends on the string alone.

A delay is a transfer's latency and the time that it occupies its link; that two transfers may meet on one
link is left to the simulator.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from evenflow.bounds import Instance
from evenflow.errors import ScheduleError
from evenflow.ir.costs import ROUNDING
from evenflow.ir.timeline import Objective

MOST_STAGES = 10_000  # three letters each, in 16 bits

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Order: TypeAlias = tuple[tuple[int, ...], ...]  # the letters of each rank


class Tables(NamedTuple):
    """An instance in arrays over letters, edges in compressed rows.

    `sources[source_start[a]:source_start[a + 1]]` are the letters that letter `a` waits for, `delays` their
    delays; `wakes` holds the ranks that may wait for a letter; `stages` the stages of each rank.
    """

    num_microbatches: int
    rank_of: Ints
    seconds: Floats
    source_start: Ints
    sources: Ints
    delays: Floats
    wake_start: Ints
    wakes: Ints
    stage_start: Ints
    stages: Ints
    taken: Floats
    freed: Floats
    cap: Floats
    work: Floats
    base: float
    from_zero: bool


def tables_of(instance: Instance, objective: Objective) -> Tables:
    """Return the arrays of an instance; raises `ScheduleError` for more stages than there are letters.

    >>> from evenflow.bounds import instance_of
    >>> from evenflow.ir import Costs, Placement
    >>> instance = instance_of(Placement.linear(2), 4, Costs.uniform(2, latency_seconds=0.5))
    >>> tables_of(instance, "span").delays.tolist()
    [0.5, 0.0, 0.5, 0.0]
    """
    placement, num = instance.placement, instance.placement.num_stages
    if num > MOST_STAGES:
        raise ScheduleError(
            f"{num} stages are more than the {MOST_STAGES} that can be searched: name a method instead"
        )
    forwards = [[(stage, delay)] for stage, delay in enumerate(instance.up_seconds)]
    input_grads = [[(num + stage, delay)] for stage, delay in enumerate(instance.down_seconds, start=1)]
    edges: list[list[tuple[int, float]]] = [[], *forwards]
    edges += [[(stage, 0.0), *later] for stage, later in enumerate([*input_grads, []])]
    wakes: list[list[int]] = [[] for _ in range(2 * num)]
    for target, row in enumerate(edges):
        for source, _ in row:
            rank = placement.rank_of[target % num]
            if rank not in wakes[source] and rank != placement.rank_of[source % num]:
                wakes[source].append(rank)
    local = [placement.stages_on(rank) for rank in range(placement.num_ranks)]
    seconds = np.array((instance.forward_seconds, instance.input_grad_seconds, instance.weight_grad_seconds))
    held, kept, zeros = np.array(instance.held_memory), np.array(instance.kept_memory), np.zeros(num)
    rank_of = np.array(placement.rank_of, np.int64)
    work = np.bincount(rank_of, seconds.sum(axis=0)).astype(np.float64) * instance.num_microbatches
    return Tables(
        num_microbatches=instance.num_microbatches,
        rank_of=rank_of,
        seconds=np.concatenate(seconds).astype(np.float64),
        source_start=_starts(edges),
        sources=np.array([source for row in edges for source, _ in row], np.int64),
        delays=np.array([delay for row in edges for _, delay in row], np.float64),
        wake_start=_starts(wakes),
        wakes=np.array([rank for row in wakes for rank in row], np.int64),
        stage_start=_starts(local),
        stages=np.array([stage for row in local for stage in row], np.int64),
        taken=np.concatenate((held, zeros, zeros)),
        freed=np.concatenate((zeros, held - kept, kept)),
        cap=np.array(instance.caps, np.float64) * (1 + ROUNDING),
        work=work,
        base=float(work.max()),
        from_zero=objective == "makespan",
    )


def _starts(rows: Sequence[Sequence[object]]) -> Ints:
    return np.concatenate(([0], np.cumsum([len(row) for row in rows]))).astype(np.int64)
