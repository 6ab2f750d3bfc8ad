"""What a plan knows of its stages and links, as the schedule's transfers are placed by (`evenflow.lower`)."""

from collections.abc import Mapping

from evenflow.ir.costs import Costs, Link
from evenflow.plan.plan import Plan, PlannedLink


def planned_links(links: Mapping[tuple[int, int], Link]) -> tuple[PlannedLink, ...]:
    """Those of some links, by (from rank, to rank), on which a transfer takes any time.

    >>> planned_links({(0, 1): Link(latency_seconds=0.5, bytes_per_second=4.0), (1, 2): Link()})
    (PlannedLink(source=0, target=1, latency_seconds=0.5, seconds_per_byte=0.25),)
    """
    return tuple(
        PlannedLink(source, target, link.latency_seconds, link.occupied_seconds(1.0))
        for (source, target), link in sorted(links.items())
        if link.transfer_seconds(1.0)
    )


def known_costs(plan: Plan) -> Costs | None:
    """The costs of a plan's stages and of what neighbours hand each other; None where none takes any time.

    What goes past a stage is reckoned as if every stage between handed it on.
    """
    stages = plan.stages
    if not any(s.forward_seconds + s.input_grad_seconds + s.weight_grad_seconds for s in stages):
        return None  # written by hand
    received = {number: stage.received_bytes for number, stage in enumerate(stages) if number}
    return Costs(
        tuple(stage.forward_seconds for stage in stages),
        tuple(stage.input_grad_seconds for stage in stages),
        tuple(stage.weight_grad_seconds for stage in stages),
        links={(link.source, link.target): _link(link) for link in plan.links},
        sent_bytes={edge: size for at, size in received.items() for edge in ((at - 1, at), (at, at - 1))},
    )


def _link(planned: PlannedLink) -> Link:
    seconds = planned.seconds_per_byte
    return Link(planned.latency_seconds, 1 / seconds) if seconds else Link(planned.latency_seconds)
