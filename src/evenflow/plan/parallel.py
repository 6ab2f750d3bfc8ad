"""Other kinds of parallelism as axes of the estimate: what a chain costs a device that is one of several.

Tensor, context and expert parallelism change what each node costs and holds; each adds its communication to
the nodes' seconds, none of which is hidden behind computing. Data parallelism adds a sum of gradients after
the last microbatch (`reduce_seconds`).
Sources: Shoeybi et al., "Megatron-LM", 2019 (tensor); Liu et al., "Ring Attention", 2023 (context); Lepikhin
et al., "GShard", 2020 (expert); Patarasuk & Yuan, "Bandwidth optimal all-reduce algorithms", 2009.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from operator import add, attrgetter

from evenflow.cluster.cluster import Cluster
from evenflow.ir.costs import Link
from evenflow.plan.chain import Chain, Held, Parameter, Seconds, together

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


@dataclass(frozen=True, slots=True)
class Peers:
    """Devices that work together: `num_near` of them in each of `num_far` hosts.

    `near` joins two of a host, `far` two of different hosts; each device has one of its own.
    """

    num_near: int = 1
    near: Link = field(default_factory=Link)
    num_far: int = 1
    far: Link = field(default_factory=Link)

    @staticmethod
    def of(cluster: Cluster, *, stride: int, count: int) -> "Peers":
        """`count` of a cluster's devices that are `stride` apart, from the first on.

        The slowest links between neighbours count. Where hosts have unequal numbers of them, each is taken
        to be alone.

        >>> from evenflow.cluster.short import parse_cluster
        >>> peers = Peers.of(parse_cluster("4x8xH100"), stride=2, count=16)
        >>> peers.num_near, peers.num_far
        (4, 4)
        """
        ranks = [stride * number for number in range(count)]
        hosts = [cluster.host_of[rank] for rank in ranks]
        links: dict[bool, list[Link]] = {True: [], False: []}
        for a, b in pairwise(ranks):
            links[cluster.host_of[a] == cluster.host_of[b]].append(cluster.link_between(a, b))
        near, far = (
            min(links[same], key=attrgetter("bytes_per_second"), default=Link()) for same in (True, False)
        )
        numbers = set(Counter(hosts).values())
        num_near = numbers.pop() if len(numbers) == 1 else 1
        return Peers(num_near, near, count // num_near, far)

    @property
    def num_ranks(self) -> int:
        """How many there are."""
        return self.num_near * self.num_far

    def all_reduce_seconds(self, num_bytes: float) -> float:
        """How long they take to sum so many bytes: each host its own, then each device its part over hosts.

        >>> Peers(4, Link(bytes_per_second=1e9), 2, Link(bytes_per_second=1e8)).all_reduce_seconds(4e9)
        16.0
        """
        return all_reduce_seconds(num_bytes, self.num_near, self.near) + all_reduce_seconds(
            num_bytes / self.num_near, self.num_far, self.far
        )

    def all_to_all_seconds(self, num_bytes: float) -> float:
        """How long each takes to hand all others their part of so many bytes, near and far at the same time.

        >>> Peers(4, Link(bytes_per_second=1e9), 2, Link(bytes_per_second=1e8)).all_to_all_seconds(8e9)
        40.0
        """
        if self.num_ranks == 1:
            return 0.0
        within = num_bytes / self.num_far
        return max(
            all_to_all_seconds(within, self.num_near, self.near),
            all_to_all_seconds(num_bytes, self.num_far, self.far),
        )


def tensor_parallel(chain: Chain, peers: Peers) -> Chain:
    """The chain where each node's matrices are parted over devices.

    Work, parameters, and what is saved are shared evenly; the activations behind each attention and each MLP
    are summed, in the forward and in the backward.
    """
    if peers.num_ranks == 1:
        return chain
    degree = peers.num_ranks
    matrices = _count(chain, attrgetter("is_matrix"))
    sums = [
        math.ceil(number / _MATRICES_PER_SUM) * peers.all_reduce_seconds(_leaving(chain, node))
        for node, number in enumerate(matrices)
    ]
    parameters = tuple(_part(parameter, degree) for parameter in together(chain.parameters))
    return _shared(replace(chain, parameters=parameters), degree, sums)


def context_parallel(chain: Chain, peers: Peers) -> Chain:
    """The chain where each row's positions are parted over devices: all but the parameters.

    Keys and values, at most the size of two activations, go once round the ring in each direction.
    """
    degree = peers.num_ranks
    if degree == 1:
        return chain
    link = min(peers.near, peers.far, key=attrgetter("bytes_per_second"))
    ring = [
        all_to_all_seconds(2 * _leaving(chain, node) / degree, degree, link) * bool(number)
        for node, number in enumerate(_count(chain, attrgetter("is_matrix")))
    ]
    parted = _shared(chain, degree, ring)
    return replace(
        parted,
        cut_bytes=tuple(size / degree for size in chain.cut_bytes),
        skips=_less(chain.skips, degree),
    )


def expert_parallel(chain: Chain, many: Chain, peers: Peers) -> Chain:
    """The chain where each of some data ranks has a part of the experts, and tokens travel to theirs.

    A rank's experts serve the tokens of all these ranks, as many as they would have with so many times the
    rows: `many` is the same chain for those, and a part of it what a node with experts costs here. Tokens
    are taken to be spread evenly. They go to their experts and come back, in the forward and in the backward.
    """
    degree = peers.num_ranks
    if degree == 1:
        return chain
    has_experts = _count(chain, attrgetter("is_expert"))
    travel = [2 * peers.all_to_all_seconds(size) for size in chain.expert_bytes]

    def part(own: Sequence[float], whole: Sequence[float]) -> tuple[float, ...]:
        return tuple(
            b / degree if number else a for a, b, number in zip(own, whole, has_experts, strict=True)
        )

    seconds = {
        kind: Seconds(
            part(each.forward, many.seconds[kind].forward),
            part(each.input_grad, many.seconds[kind].input_grad),
            part(each.weight_grad, many.seconds[kind].weight_grad),
        )
        for kind, each in chain.seconds.items()
    }
    own = tuple(
        _part(parameter, degree) if parameter.is_expert else parameter for parameter in chain.parameters
    )
    return replace(
        chain,
        parameters=own,
        seconds=_slower(seconds, 1, travel),
        forward_transient_bytes=part(chain.forward_transient_bytes, many.forward_transient_bytes),
        backward_transient_bytes=part(chain.backward_transient_bytes, many.backward_transient_bytes),
    )


def fully_sharded(chain: Chain, peers: Peers, *, gradient_bytes: float) -> Chain:
    """The chain where data ranks have a part of each node's parameters, and gather all while the node runs.

    They gather the next node's meanwhile, so that a node takes as long as it computes or as its parameters
    take to come, whichever is longer; in the backward they come again, and gradients are summed and parted.
    `gradient_bytes` are those of each byte of a parameter. Experts stay where they are.

    Source: Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", 2023.
    """
    if peers.num_ranks == 1:
        return chain
    whole, trained = [0.0] * chain.num_nodes, [0.0] * chain.num_nodes
    for parameter in chain.parameters:
        for node in () if parameter.is_expert else parameter.nodes:
            whole[node] += parameter.num_bytes
            trained[node] += parameter.num_bytes * parameter.trains
    # A sum of all is a sum that is parted, and a gathering.
    gather = [peers.all_reduce_seconds(size) / 2 for size in whole]
    part = [peers.all_reduce_seconds(size * gradient_bytes) / 2 for size in trained]

    def overlapped(each: Seconds) -> Seconds:
        forward = map(max, each.forward, gather)
        backward = zip(each.input_grad, each.weight_grad, gather, part, strict=True)
        return Seconds(
            tuple(forward),
            tuple(max(first, come + go - rest) for first, rest, come, go in backward),
            each.weight_grad,
        )

    # Besides the node's own, the next one's are there.
    there = tuple(own + after for own, after in zip(whole, (*whole[1:], 0.0), strict=True))
    return replace(
        chain,
        seconds={kind: overlapped(each) for kind, each in chain.seconds.items()},
        forward_transient_bytes=tuple(map(add, chain.forward_transient_bytes, there)),
        backward_transient_bytes=tuple(map(add, chain.backward_transient_bytes, there)),
    )


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
        seconds=_slower(chain.seconds, degree, extra),
        saved=_less(chain.saved, degree),
        kept=_less(chain.kept, degree),
        handed=tuple(replace(each, num_bytes=each.num_bytes / degree) for each in chain.handed),
        expert_bytes=tuple(size / degree for size in chain.expert_bytes),
        forward_transient_bytes=tuple(size / degree for size in chain.forward_transient_bytes),
        backward_transient_bytes=tuple(size / degree for size in chain.backward_transient_bytes),
    )


def _slower(seconds: Mapping[str, Seconds], degree: int, extra: Sequence[float]) -> dict[str, Seconds]:
    return {
        kind: Seconds(
            tuple(time / degree + more for time, more in zip(each.forward, extra, strict=True)),
            tuple(
                time / degree + (more if time else 0.0)
                for time, more in zip(each.input_grad, extra, strict=True)
            ),
            tuple(time / degree for time in each.weight_grad),
        )
        for kind, each in seconds.items()
    }


def _less(held: tuple[Held, ...], degree: int) -> tuple[Held, ...]:
    return tuple(replace(each, num_bytes=each.num_bytes / degree) for each in held)


def _part(parameter: Parameter, degree: int) -> Parameter:
    return replace(
        parameter,
        num_elements=math.ceil(parameter.num_elements / degree),
        num_bytes=math.ceil(parameter.num_bytes / degree),
    )
