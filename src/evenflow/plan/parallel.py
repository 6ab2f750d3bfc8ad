"""Other kinds of parallelism as axes of the estimate: what a chain costs a device that is one of several.

Tensor, context and expert parallelism change what each node costs and holds; each adds its communication to
the nodes' seconds. Data parallelism adds a sum of gradients after the last microbatch (`reduce_seconds`).
Sources: Shoeybi et al., "Megatron-LM", 2019 (tensor); Liu et al., "Ring Attention", 2023 (context); Lepikhin
et al., "GShard", 2020 (expert); Patarasuk & Yuan, "Bandwidth optimal all-reduce algorithms", 2009.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from evenflow.ir.costs import Link
from evenflow.plan.chain import Chain, Held, Parameter, Seconds

_MATRICES_PER_SUM = 4  # queries, keys, values and output need one sum of activations; an MLP's three one more


def all_reduce_seconds(num_bytes: float, num_ranks: int, link: Link) -> float:
    """How long a ring takes to sum so many bytes over ranks.

    >>> all_reduce_seconds(4e9, 4, Link(bytes_per_second=1e9))
    6.0
    """
    if num_ranks == 1:
        return 0.0
    share = 2 * (num_ranks - 1) / num_ranks
    return share * link.occupied_seconds(num_bytes) + 2 * (num_ranks - 1) * link.latency_seconds


def all_to_all_seconds(num_bytes: float, num_ranks: int, link: Link) -> float:
    """How long each rank takes to hand all others their part of so many bytes.

    >>> all_to_all_seconds(4e9, 4, Link(bytes_per_second=1e9))
    3.0
    """
    return link.occupied_seconds(num_bytes) * (num_ranks - 1) / num_ranks + link.latency_seconds


def tensor_parallel(chain: Chain, degree: int, link: Link) -> Chain:
    """The chain where each node's matrices are parted over `degree` devices that `link` joins.

    Work, parameters, and what is saved are shared evenly; the activations behind each attention and each MLP
    are summed, in the forward and in the backward.
    """
    if degree == 1:
        return chain
    matrices = _count(chain, lambda parameter: parameter.num_elements >= 2**12)
    sums = [
        math.ceil(number / _MATRICES_PER_SUM) * all_reduce_seconds(_leaving(chain, node), degree, link)
        for node, number in enumerate(matrices)
    ]
    return _shared(replace(chain, parameters=_parted(chain.parameters, degree)), degree, sums)


def context_parallel(chain: Chain, degree: int, link: Link) -> Chain:
    """The chain where each row's positions are parted over `degree` devices: all but the parameters.

    Keys and values, at most the size of two activations, go once round the ring in each direction.
    """
    if degree == 1:
        return chain
    ring = [
        all_to_all_seconds(2 * _leaving(chain, node) / degree, degree, link) * bool(number)
        for node, number in enumerate(_count(chain, lambda parameter: parameter.num_elements >= 2**12))
    ]
    parted = _shared(chain, degree, ring)
    return replace(parted, cut_bytes=tuple(size / degree for size in chain.cut_bytes))


def expert_parallel(chain: Chain, degree: int, link: Link, *, experts_per_token: int) -> Chain:
    """The chain where experts live on `degree` data ranks: their parameters are parted, tokens travel.

    Each token's activation goes to its experts and comes back, in the forward and in the backward.
    """
    if degree == 1:
        return chain
    counts = _count(chain, lambda parameter: parameter.is_expert)
    travel = [
        2 * all_to_all_seconds(experts_per_token * _leaving(chain, node), degree, link) * bool(number)
        for node, number in enumerate(counts)
    ]
    own = tuple(
        _part(parameter, degree) if parameter.is_expert else parameter for parameter in chain.parameters
    )
    return replace(chain, parameters=own, seconds=_slower(chain, 1, travel))


def _leaving(chain: Chain, node: int) -> float:
    """The bytes of activations behind a node; of the last one, which makes the loss, those before it."""
    return chain.cut_bytes[node + 1] if node + 1 < chain.num_nodes else chain.cut_bytes[node]


def _count(chain: Chain, chosen: Callable[[Parameter], bool]) -> list[int]:
    counts = [0] * chain.num_nodes
    for parameter in chain.parameters:
        for node in parameter.nodes if chosen(parameter) else ():
            counts[node] += 1
    return counts


def _shared(chain: Chain, degree: int, extra: Sequence[float]) -> Chain:
    """Work and activations over `degree` devices, and so many more seconds in each direction."""
    return replace(
        chain,
        flops=tuple(flops / degree for flops in chain.flops),
        seconds=_slower(chain, degree, extra),
        saved=_less(chain.saved, degree),
        kept=_less(chain.kept, degree),
        forward_transient_bytes=tuple(size / degree for size in chain.forward_transient_bytes),
        backward_transient_bytes=tuple(size / degree for size in chain.backward_transient_bytes),
    )


def _slower(chain: Chain, degree: int, extra: Sequence[float]) -> dict[str, Seconds]:
    return {
        kind: Seconds(
            tuple(time / degree + more for time, more in zip(each.forward, extra, strict=True)),
            tuple(
                time / degree + (more if time else 0.0)
                for time, more in zip(each.input_grad, extra, strict=True)
            ),
            tuple(time / degree for time in each.weight_grad),
        )
        for kind, each in chain.seconds.items()
    }


def _less(held: tuple[Held, ...], degree: int) -> tuple[Held, ...]:
    return tuple(replace(each, num_bytes=each.num_bytes / degree) for each in held)


def _parted(parameters: tuple[Parameter, ...], degree: int) -> tuple[Parameter, ...]:
    return tuple(_part(parameter, degree) for parameter in parameters)


def _part(parameter: Parameter, degree: int) -> Parameter:
    return replace(
        parameter,
        num_elements=math.ceil(parameter.num_elements / degree),
        num_bytes=math.ceil(parameter.num_bytes / degree),
    )
