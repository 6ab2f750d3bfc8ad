"""Chains for tests of planning: a language model's embedding, equal blocks and a head."""

import functools

from evenflow.cluster.cluster import Cluster
from evenflow.plan.chain import Chain, Held, Parameter, Seconds

WIDTH, VOCABULARY = 64, 4096


def language_model(cluster: Cluster, *, num_blocks: int = 8, head: float = 3.0, rate: float = 1e9):
    """`chain_of` a model whose head takes as long as `head` blocks on each device of a cluster."""
    names = ("embedding", *(f"block.{n}" for n in range(num_blocks)), "head")
    weights = 12 * WIDTH**2
    work = (0.1, *[1.0] * num_blocks, head)

    @functools.cache
    def of(rows: int) -> Chain:
        act = 4.0 * rows * 32 * WIDTH
        flops = tuple(2.0 * weights * rows * 32 * each for each in work)
        speeds = {device.name: rate * device.flops_per_second["float32"] / 1e14 for device in cluster.devices}
        times = {
            kind: Seconds(*(tuple(part * each / speed for each in flops) for part in (1.0, 1.1, 0.9)))
            for kind, speed in speeds.items()
        }
        saved = [Held(10 * act, (n + 1,)) for n in range(num_blocks)]
        saved += [Held(act, (n, n + 1)) for n in range(num_blocks + 1)]
        sizes = (VOCABULARY * WIDTH, *[weights] * num_blocks, VOCABULARY * WIDTH)
        parameters = (Parameter(f"w{n}", size, 4 * size, True, (n,)) for n, size in enumerate(sizes))
        return Chain(
            names,
            rows,
            flops,
            times,
            tuple(saved),
            (),
            tuple(parameters),
            (act,) * len(names),
            (2 * act,) * len(names),
            (0.0, *[act] * (len(names) - 1)),
            (True,) * len(names),
        )

    return of
