"""Lower bounds on the span and the makespan of any schedule of an instance.

Let A_r be the first start on rank r. `rank` bounds, since A_r, the window of r and the starts X of input
gradients with all of their microbatch's descent before them. Two steps bring this to the whole pipeline:

*Heads.* The first op overall is a forward of stage 0. A rank's first forward comes a path later, and with the
lowest stages e_q <= e_r of two ranks, A_r >= A_q + path from e_q to e_r. So r's window plus its head bounds
the makespan.

*Tails.* After X, at stage s on r, the microbatch comes down to every stage low <= s. Its rank q then still
runs the microbatch's input and weight gradients of low and of q's stages below. So rank q is done no sooner
than X + path from s to low + those; the largest bounds the makespan, and each with
e_q <= e_r bounds q's window.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from evenflow.bounds.chain import Chain
from evenflow.bounds.instance import Instance
from evenflow.bounds.rank import Bound, RankBounds
from evenflow.errors import ScheduleError
from evenflow.ir.costs import ROUNDING


@dataclass(frozen=True, slots=True)
class Bounds:
    """The lower bounds of an instance: its span, its makespan, and the busiest rank's work, in seconds.

    The *span* is the longest of the ranks' own windows, from first start to last end; the *makespan* is the
    window of all ranks together. The numbers are floats: compare with a tolerance.
    """

    span: Bound
    makespan: Bound
    work_seconds: float


def lower_bounds(instance: Instance) -> Bounds:
    """Return the largest proven lower bounds on span and makespan, in time quadratic in the stages.

    Raises `ScheduleError` if ranks can't hold one microbatch, naming them all. Proofs: at the head of this
    module and in `evenflow.bounds.rank`; sources: `evenflow.bounds`.

    Four ranks, eight microbatches, memory for two: 24 seconds of work.

    >>> from dataclasses import replace
    >>> from evenflow.bounds import instance_of
    >>> from evenflow.ir import Costs, Placement
    >>> costs = replace(Costs.uniform(4), memory_caps=(2.0,) * 4)
    >>> bounds = lower_bounds(instance_of(Placement.linear(4), 8, costs))
    >>> bounds.span.seconds, bounds.span.reason
    (37.0, 'too few microbatches fit on rank 0 at a time')
    """
    _check_caps(instance)
    chain = Chain(instance)
    ranks = [RankBounds(instance, chain, rank) for rank in range(instance.placement.num_ranks)]
    spans, makespans = [], []
    lowest = [ranks[rank].stages[0] for rank in instance.placement.rank_of]
    # The tail to `low` is down[stage] + tails[low]; since its own rank's first start, heads[low] more.
    tails = [left - down for left, down in zip(chain.left, chain.down, strict=True)]
    heads = [chain.up[low] for low in lowest]
    for rank in ranks:
        first = rank.stages[0]
        head = chain.up[first]
        for window in rank.windows():
            spans.append(window)
            makespans.append(Bound(head + window.seconds, _after_head(window.reason, head)))
        for stage in rank.stages:
            start = rank.last_input_grad(stage)
            since = head + start.seconds + chain.down[stage]
            longest = max(tails[low] - heads[low] for low in range(stage + 1) if lowest[low] <= first)
            spans.append(Bound(since + longest, start.reason))
            makespans.append(Bound(since + max(tails[: stage + 1]), start.reason))
    return Bounds(
        span=_largest(spans),
        makespan=_largest(makespans),
        work_seconds=max(rank.work_seconds for rank in ranks),
    )


def _check_caps(instance: Instance) -> None:
    faults = []
    for rank, cap in enumerate(instance.caps):
        needed = sum(instance.held_memory[stage] for stage in instance.placement.stages_on(rank))
        if needed > cap * (1 + ROUNDING):
            faults.append(f"rank {rank} has a cap of {cap} and needs {needed} for one microbatch")
    if faults:
        raise ScheduleError(f"{'; '.join(faults)}: raise the cap, or give the rank smaller stages")


def _after_head(reason: str, head: float) -> str:
    return f"{reason}, and starts once forwards reach it" if head else reason


def _largest(bounds: Sequence[Bound]) -> Bound:
    return max(bounds, key=lambda bound: bound.seconds)
