"""Recomputation: which nodes compute their forward again in the backward instead of keeping what it made.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016; Korthikanti et al., "Reducing
Activation Recomputation in Large Transformer Models", 2022 (selective: what is large and quick to make).
"""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import replace

from evenflow.plan.chain import Chain, Held, Seconds


def recomputed(chain: Chain, nodes: Collection[int]) -> Chain:
    """The chain where these nodes keep nothing but what they are given, and run their forward once more.

    A node is given at most what crosses the cut before it. Its input gradient then takes its forward's time
    besides, and what its forward kept counts among what its backward allocates.

    >>> chain = Chain(
    ...     names=("a", "b"),
    ...     num_rows=1,
    ...     flops=(1.0, 1.0),
    ...     seconds={"cpu": Seconds((1.0, 2.0), (1.0, 2.0), (1.0, 2.0))},
    ...     saved=(Held(8.0, (0, 1)), Held(50.0, (1,))),
    ...     kept=(),
    ...     parameters=(),
    ...     forward_transient_bytes=(0.0, 4.0),
    ...     backward_transient_bytes=(2.0, 0.0),
    ...     cut_bytes=(0.0, 8.0),
    ...     legal=(True, True),
    ... )
    >>> again = recomputed(chain, [1])
    >>> again.saved, again.seconds["cpu"].input_grad, again.backward_transient_bytes
    ((Held(num_bytes=8.0, nodes=(0, 1)), Held(num_bytes=8.0, nodes=(1,))), (1.0, 4.0), (2.0, 50.0))
    """
    chosen = frozenset(nodes)
    if not chosen:
        return chain
    private = private_bytes(chain)
    seconds = {
        kind: Seconds(
            each.forward,
            tuple(
                back + each.forward[node] if node in chosen else back
                for node, back in enumerate(each.input_grad)
            ),
            each.weight_grad,
        )
        for kind, each in chain.seconds.items()
    }
    backward = tuple(
        transient + private[node] if node in chosen else transient
        for node, transient in enumerate(chain.backward_transient_bytes)
    )
    inputs = tuple(Held(chain.cut_bytes[node], (node,)) for node in sorted(chosen) if chain.cut_bytes[node])
    return replace(
        chain,
        seconds=seconds,
        saved=(*_without(chain.saved, chosen), *inputs),
        kept=_without(chain.kept, chosen),
        backward_transient_bytes=backward,
    )


def cheapest_to_hold(chain: Chain, nodes: Collection[int]) -> Chain:
    """The chain that holds what it does where all these nodes are recomputed, but takes no longer."""
    return replace(recomputed(chain, nodes), seconds=chain.seconds)


def private_bytes(chain: Chain) -> tuple[float, ...]:
    """What each node keeps that no other node does: what recomputing it would free, but for its inputs."""
    private: defaultdict[int, float] = defaultdict(float)
    for held in chain.saved:
        if len(held.nodes) == 1:
            private[held.nodes[0]] += held.num_bytes
    return tuple(private[node] for node in range(chain.num_nodes))


def by_worth(chain: Chain, kind: str) -> tuple[int, ...]:
    """The nodes that keep anything of their own, those first that free most bytes for each second."""
    private, seconds = private_bytes(chain), chain.seconds[kind].forward
    freed = [max(own - given, 0.0) for own, given in zip(private, chain.cut_bytes, strict=True)]
    worth = {node: bytes_ / max(seconds[node], 1e-12) for node, bytes_ in enumerate(freed) if bytes_ > 0}
    return tuple(sorted(worth, key=lambda node: (-worth[node], node)))


def _without(held: tuple[Held, ...], chosen: frozenset[int]) -> tuple[Held, ...]:
    return tuple(each for each in held if len(each.nodes) > 1 or each.nodes[0] not in chosen)
