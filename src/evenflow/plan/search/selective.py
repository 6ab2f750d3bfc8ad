"""Selective recomputation: in each stage as few nodes as its rank must, and the cut that suits them.

A schedule does not load its ranks evenly: the first of 1f1b hold most, the last hardly anything, so that only
some must recompute. What they recompute makes them slower, and then they should do less. So a cut for which
everything *could* be recomputed is followed by the fewest nodes that each rank must, and by a cut for ranks
that are that much slower, until that changes nothing any more.
"""

from collections.abc import Sequence

from evenflow.ir.costs import ROUNDING
from evenflow.plan.chain import Chain
from evenflow.plan.choice import Choice
from evenflow.plan.recompute import Unit, by_worth, cheapest_to_hold, recomputed
from evenflow.plan.request import Request
from evenflow.plan.search.fit import Fit, at_cuts, fitted, groups_of

_ROUNDS = 3  # of cutting; more hardly change anything
_SETTLED = 1e-3  # a rank whose slowness changes by less is cut for


def fitted_selectively(request: Request, choice: Choice, chain: Chain) -> Fit:
    """The cut that fits with the fewest nodes recomputed.

    Nodes and regions of a stage are chosen in the order of what each frees in a second. Of all rounds that
    one counts whose most loaded rank does least. Raises `DoesNotFitError` where no cut fits even if all is
    recomputed.
    """
    worth = by_worth(chain, groups_of(request.cluster, choice.degrees)[0].kind)
    least = cheapest_to_hold(chain, {node for unit in worth for node in unit.nodes})
    cut = fitted(request, choice, least)
    slower = (1.0,) * len(cut.groups)
    best: Fit | None = None
    for _ in range(_ROUNDS):
        fit = _with_fewest(request, choice, chain, worth, cut)
        if best is None or max(fit.load_seconds) < max(best.load_seconds) * (1 - ROUNDING):
            best = fit
        plain = at_cuts(request, choice, chain, cut.positions, cut.groups).load_seconds
        now = tuple(a / b if b else 1.0 for a, b in zip(fit.load_seconds, plain, strict=True))
        if max(abs(a - b) for a, b in zip(now, slower, strict=True)) < _SETTLED:
            break
        # Half way, as a rank that does less has less to recompute.
        slower = tuple((a + b) / 2 for a, b in zip(now, slower, strict=True))
        cut = fitted(request, choice, least, groups=cut.groups, slower=slower)
    assert best is not None, "there is at least one round"
    return best


def _with_fewest(request: Request, choice: Choice, chain: Chain, worth: Sequence[Unit], cut: Fit) -> Fit:
    """The cut with as few nodes of each rank as make it fit, those first that are worth most: all at once."""
    rank_of = cut.schedule.placement.rank_of
    candidates: list[list[tuple[int, ...]]] = [[] for _ in cut.groups]
    rank_of_node = [
        rank_of[stage] for stage, each in enumerate(cut.stages) for _ in range(each.start, each.end)
    ]
    for unit in worth:
        for rank in {rank_of_node[node] for node in unit.nodes}:
            candidates[rank].append(tuple(node for node in unit.nodes if rank_of_node[node] == rank))

    def with_these(counts: Sequence[int]) -> Fit:
        taken = (nodes for own, count in zip(candidates, counts, strict=True) for nodes in own[:count])
        again = recomputed(chain, {node for nodes in taken for node in nodes})
        return at_cuts(request, choice, again, cut.positions, cut.groups)

    low = [0] * len(candidates)
    over_bytes = with_these(low).over_bytes
    high = [len(own) if over > 0 else 0 for own, over in zip(candidates, over_bytes, strict=True)]
    while low != high:
        middle = [(a + b) // 2 for a, b in zip(low, high, strict=True)]
        for rank, over in enumerate(with_these(middle).over_bytes):
            if low[rank] < high[rank]:
                low[rank], high[rank] = (
                    (low[rank], middle[rank]) if over <= 0 else (middle[rank] + 1, high[rank])
                )
    return with_these(high)
