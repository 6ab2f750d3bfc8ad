"""The chain of one microbatch: up through the forwards, down through the input gradients.

Along it no op starts sooner than the works and the delays before it add up to. All that follows counts from
the start of an op to the start of another.
"""

from evenflow.bounds.instance import Instance


class Chain:
    """The least seconds between the starts of two ops of one microbatch.

    `up[s]` leads from the forward of stage 0 to that of stage s, and `down[s]` from the input gradient of
    stage s to that of stage 0. `left[s]` is the work that the microbatch still has on the rank of stage s
    when its input gradient of s starts: input and weight gradients of s and of the rank's stages below it.

    >>> from evenflow.bounds import instance_of
    >>> from evenflow.ir import Costs, Placement
    >>> costs = Costs.uniform(4, 0.5, 0.5, 0.5, latency_seconds=0.25)
    >>> chain = Chain(instance_of(Placement.v_shape(2), 1, costs))
    >>> chain.up, chain.left
    ([0.0, 0.75, 1.25, 2.0], [1.0, 1.0, 2.0, 2.0])
    >>> chain.turn(0, 3), chain.turn(3, 0)
    (2.5, 2.5)
    """

    def __init__(self, instance: Instance) -> None:
        forward, input_grad = instance.forward_seconds, instance.input_grad_seconds
        self.up, self.down = [0.0], [0.0]
        for stage in range(instance.placement.num_stages - 1):
            self.up.append(self.up[-1] + forward[stage] + instance.up_seconds[stage])
            self.down.append(self.down[-1] + input_grad[stage + 1] + instance.down_seconds[stage])
        self._whole = self.up[-1] + forward[-1] + self.down[-1]
        self.left: list[float] = []
        on_rank = [0.0] * instance.placement.num_ranks
        for stage, rank in enumerate(instance.placement.rank_of):
            on_rank[rank] += input_grad[stage] + instance.weight_grad_seconds[stage]
            self.left.append(on_rank[rank])

    def turn(self, stage: int, back: int) -> float:
        """Return the least seconds from the start of `stage`'s forward to that of `back`'s input gradient."""
        return self._whole - self.up[stage] - self.down[back]
