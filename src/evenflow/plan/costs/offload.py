"""Offloading: what stages save of a microbatch waits on the host, so that one microbatch's is there at once.

It leaves when its forward has ended, and comes back whole before its backward begins.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

from evenflow.plan.chain import Chain
from evenflow.plan.costs.stages import StageCost

LEAST_BYTES = 2.0**16  # what has less stays: its copy would take longer to begin than to make


def offloaded(
    stages: Sequence[StageCost], chain: Chain, *, least_bytes: float = LEAST_BYTES
) -> tuple[StageCost, ...]:
    """The stages of a chain where what is large of their activations is there while they compute, alone.

    What a node keeps for itself is taken to be in one piece. Times stay: copies run beside the computing.

    >>> from evenflow.plan.chain import Held, Seconds
    >>> zero, saved = (0.0,), (Held(8.0, (0,)), Held(2.0, (0,)))
    >>> seconds = {"cpu": Seconds(zero, zero, zero)}
    >>> chain = Chain(("a",), 1, zero, seconds, saved)
    >>> stage = StageCost(0, 1, 1.0, 1.0, 1.0, 10.0, 0.0, 1.0, 3.0, 0.0, 0.0, 0.0, 0)
    >>> (found,) = offloaded([stage], chain, least_bytes=4.0)
    >>> found.saved_bytes, found.forward_transient_bytes, found.backward_transient_bytes
    (2.0, 9.0, 11.0)
    """
    positions = [stage.start for stage in stages[1:]]
    moved = [0.0] * len(stages)
    for held in chain.saved:
        if held.num_bytes >= least_bytes:
            for stage in {bisect_right(positions, node) for node in held.nodes}:
                moved[stage] += held.num_bytes
    return tuple(
        replace(
            stage,
            saved_bytes=stage.saved_bytes - size,
            forward_transient_bytes=stage.forward_transient_bytes + size,
            backward_transient_bytes=stage.backward_transient_bytes + size,
        )
        for stage, size in zip(stages, moved, strict=True)
    )
