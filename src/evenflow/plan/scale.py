"""A chain for any size of microbatch, from two: each cost is a part that stays and a part for each row."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from evenflow.errors import ConfigError
from evenflow.plan.chain import Chain, Handed, Held, Seconds


def scaled(small: Chain, large: Chain, num_rows: int) -> Chain:
    """The chain for `num_rows` rows, on the line through two that were costed.

    Nothing falls below 0. Raises `ConfigError` where the two are not the same program.

    >>> from dataclasses import replace
    >>> seconds = [{"cpu": Seconds((each,), (each,), (each,))} for each in (2.0, 3.0)]
    >>> one = Chain(("a",), 1, (3.0,), seconds[0], saved=(Held(8.0, (0,)),))
    >>> two = replace(one, num_rows=2, seconds=seconds[1], saved=(Held(16.0, (0,)),))
    >>> four = scaled(one, two, 4)
    >>> four.seconds["cpu"].forward, four.saved
    ((5.0,), (Held(num_bytes=32.0, nodes=(0,), handed=None),))
    """
    if small.names != large.names or small.num_rows == large.num_rows:
        raise ConfigError(
            f"the program with {small.num_rows} rows and that with {large.num_rows} are not alike, so that "
            "nothing can be said of other sizes: give the size of a microbatch"
        )
    share = (num_rows - small.num_rows) / (large.num_rows - small.num_rows)

    def between(first: Sequence[float], second: Sequence[float]) -> tuple[float, ...]:
        return tuple(max(0.0, a + share * (b - a)) for a, b in zip(first, second, strict=True))

    return replace(
        small,
        num_rows=num_rows,
        flops=between(small.flops, large.flops),
        seconds={
            kind: Seconds(
                between(times.forward, large.seconds[kind].forward),
                between(times.input_grad, large.seconds[kind].input_grad),
                between(times.weight_grad, large.seconds[kind].weight_grad),
            )
            for kind, times in small.seconds.items()
        },
        saved=_between(small.saved, large.saved, between),
        kept=_between(small.kept, large.kept, between),
        forward_transient_bytes=between(small.forward_transient_bytes, large.forward_transient_bytes),
        backward_transient_bytes=between(small.backward_transient_bytes, large.backward_transient_bytes),
        cut_bytes=between(small.cut_bytes, large.cut_bytes),
        expert_bytes=between(small.expert_bytes, large.expert_bytes),
        skips=_between(small.skips, large.skips, between),
        handed=_handed_between(small.handed, large.handed, between),
    )


def in_proportion(chain: Chain, num_rows: int) -> Chain:
    """The chain for `num_rows` rows, where one size was costed: everything in proportion to the rows."""

    def nothing(held: Sequence[Held]) -> tuple[Held, ...]:
        return tuple(replace(each, num_bytes=0.0) for each in held)

    zeros = (0.0,) * chain.num_nodes
    none = replace(
        chain,
        num_rows=0,
        flops=zeros,
        seconds=dict.fromkeys(chain.seconds, Seconds(zeros, zeros, zeros)),
        saved=nothing(chain.saved),
        kept=nothing(chain.kept),
        forward_transient_bytes=zeros,
        backward_transient_bytes=zeros,
        cut_bytes=zeros,
        expert_bytes=(0.0,) * len(chain.expert_bytes),
        skips=nothing(chain.skips),
        handed=tuple(replace(each, num_bytes=0.0) for each in chain.handed),
    )
    return scaled(none, chain, num_rows)


def _between(
    small: Sequence[Held],
    large: Sequence[Held],
    between: Callable[[Sequence[float], Sequence[float]], tuple[float, ...]],
) -> tuple[Held, ...]:
    """What is held under the same nodes, added up: in another size it may stand in another order."""
    sums: dict[tuple[tuple[int, ...], int | None], list[float]] = {}
    for at, held in enumerate((small, large)):
        for each in held:
            sums.setdefault((each.nodes, each.handed), [0.0, 0.0])[at] += each.num_bytes
    sizes = between([first for first, _ in sums.values()], [second for _, second in sums.values()])
    return tuple(Held(size, *key) for size, key in zip(sizes, sums, strict=True))


def _handed_between(
    small: Sequence[Handed],
    large: Sequence[Handed],
    between: Callable[[Sequence[float], Sequence[float]], tuple[float, ...]],
) -> tuple[Handed, ...]:
    """What nodes hand to each other; unknown where the two do not hand over the same."""
    ways = [[(each.maker, each.users) for each in handed] for handed in (small, large)]
    if ways[0] != ways[1]:
        return ()
    sizes = between([each.num_bytes for each in small], [each.num_bytes for each in large])
    return tuple(replace(each, num_bytes=size) for each, size in zip(small, sizes, strict=True))
