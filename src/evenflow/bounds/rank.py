"""What memory and the paths of microbatches force on one rank, in seconds since that rank's first start.

A rank's first op is a forward of its lowest stage, as its other stages wait for that one. Of its stages the
highest has the last forward and the first input gradient. Work is always seconds of ops on this rank.
"""

import math
from dataclasses import dataclass

from evenflow.bounds.chain import Chain
from evenflow.bounds.instance import Instance
from evenflow.bounds.loads import envelope, most_seconds, ramp, room_of
from evenflow.ir.costs import ROUNDING


@dataclass(frozen=True, slots=True)
class Bound:
    """Seconds that no schedule can beat, and in a phrase why."""

    seconds: float
    reason: str


class RankBounds:
    """The bounds of one rank: on its window, and on when its input gradients can come to an end.

    >>> from dataclasses import replace
    >>> from evenflow.bounds import instance_of
    >>> from evenflow.ir import Costs, Placement
    >>> costs = replace(Costs.uniform(2, latency_seconds=0.5), memory_caps=(2.0, 2.0))
    >>> instance = instance_of(Placement.linear(2), 4, costs)
    >>> rank = RankBounds(instance, Chain(instance), 0)
    >>> max(bound.seconds for bound in rank.windows()), rank.last_input_grad(0).seconds
    (14.0, 13.0)
    """

    def __init__(self, instance: Instance, chain: Chain, rank: int) -> None:
        self._instance, self._chain, self._rank = instance, chain, rank
        self.stages = instance.placement.stages_on(rank)
        self._room = room_of(instance, rank)
        self._once = [
            instance.forward_seconds[stage]
            + instance.input_grad_seconds[stage]
            + instance.weight_grad_seconds[stage]
            for stage in self.stages
        ]
        self.work_seconds = instance.num_microbatches * sum(self._once)
        self._first_idle_seconds = self._first_idle()
        self._last_forwards = [self._last_forward(level) for level in range(len(self.stages))]

    def windows(self) -> list[Bound]:
        """Return the bounds on this rank's window that do not come from its last input gradient."""
        bounds = [Bound(self.work_seconds, f"rank {self._rank} has this much work")]
        if self._first_idle_seconds:
            reason = f"too few forwards fit on rank {self._rank} to fill its first round trip"
            bounds.append(Bound(self.work_seconds + self._first_idle_seconds, reason))
        if self._room < math.inf:
            bounds.append(self._area())
        return bounds

    def last_input_grad(self, stage: int) -> Bound:
        """Bound the start of an input gradient of `stage` whose microbatch has none below `stage` done.

        Either that of the microbatch with the last forward of one of the rank's stages, a path after it. Or
        the last one of `stage`: then all but the rest is done.
        """
        forward = self._instance.forward_seconds
        bounds = [
            Bound(end.seconds - forward[low] + self._chain.turn(low, stage), end.reason)
            for low, end in zip(self.stages, self._last_forwards, strict=True)
        ]
        done = self.work_seconds - self._rest_at_last_input_grad(stage) + self._first_idle_seconds
        bounds.append(Bound(done, f"rank {self._rank} can't leave all weight gradients to the end"))
        return max(bounds, key=lambda bound: bound.seconds)

    def _first_idle(self) -> float:
        """Return the least idle seconds before the first input gradient starts.

        It starts a round trip after the rank does. Until then nothing is freed, so only those forwards run
        that fit into memory together. The microbatch whose input gradient it is has run all of its own; of
        each other one some lowest stages have run.
        """
        instance = self._instance
        states, memory, seconds = [], 0.0, 0.0
        for stage in self.stages:
            memory += instance.held_memory[stage]
            seconds += instance.forward_seconds[stage]
            states.append((memory, seconds))
        others = [(*step, instance.num_microbatches - 1) for step in envelope(states)]
        forwards = seconds + most_seconds(others, self._room - memory)
        return max(0.0, self._chain.turn(self.stages[0], self.stages[-1]) - forwards)

    def _last_forward(self, level: int) -> Bound:
        """Bound the end of the last forward of stage `stages[level]`."""
        undone = self.work_seconds - self._rest_at_last_forward(level)
        # If the forwards so far don't all fit, something was freed before, so after the first input gradient.
        memory = self._memory_up_to(level)
        if self._instance.num_microbatches * memory > self._room * (1 + ROUNDING):
            undone += self._first_idle_seconds
        by_work = Bound(
            undone, f"the last microbatch makes a round trip after rank {self._rank}'s last forward"
        )
        by_memory = Bound(self._turnover(level), f"too few microbatches fit on rank {self._rank} at a time")
        return max(by_work, by_memory, key=lambda bound: bound.seconds)

    def _rest_at_last_forward(self, level: int) -> float:
        """Return the most work undone when the last forward of stage `stages[level]` ends.

        Every microbatch has run its forwards up to there, so what it has undone holds memory. If forwards
        above are undone too, all work there is put down to the highest stage reached, which holds its memory.
        """
        instance, others = self._instance, self._instance.num_microbatches - 1
        things = []
        for at in range(len(self.stages)):
            above = sum(self._once[at + 1 :]) if at >= level else 0.0
            things += [(*step, others) for step in self._states(at, above)]
        own = sum(self._once) - sum(instance.forward_seconds[stage] for stage in self.stages[: level + 1])
        return own + most_seconds(things, self._room - self._memory_up_to(level))

    def _rest_at_last_input_grad(self, stage: int) -> float:
        """Return the most work undone when the last input gradient of `stage` starts.

        All forwards are done, and all input gradients above `stage`. This microbatch has those up to `stage`
        undone and holds their memory; of `stage` the others have only weight gradients undone.
        """
        instance, num_microbatches = self._instance, self._instance.num_microbatches
        things: list[tuple[float, float, int]] = []
        level = self.stages.index(stage)
        for at, low in enumerate(self.stages):
            if at < level:
                things += [(*step, num_microbatches - 1) for step in self._states(at, 0.0)]
            else:
                count = num_microbatches - (at == level)
                things.append((instance.kept_memory[low], instance.weight_grad_seconds[low], count))
        return self._chain.left[stage] + most_seconds(things, self._room - self._memory_up_to(level))

    def _states(self, level: int, above: float) -> list[tuple[float, float]]:
        """Return the steps of (memory, seconds) that one microbatch may have undone of a stage and above."""
        instance, stage = self._instance, self.stages[level]
        weight = instance.weight_grad_seconds[stage]
        both = instance.input_grad_seconds[stage] + weight + above
        return envelope([(instance.kept_memory[stage], weight), (instance.held_memory[stage], both)])

    def _memory_up_to(self, level: int) -> float:
        return sum(self._instance.held_memory[stage] for stage in self.stages[: level + 1])

    def _turnover(self, level: int) -> float:
        """Return when the last forward of stage `stages[level]` can end, for want of memory.

        A microbatch between its forward and its input gradient of this stage holds the memory of this stage
        and of all below. (A lowest stage that frees nothing at its input gradient: until its weight gradient
        ends.) So at most k are there at a time: the (k + i)-th forward waits for the i-th to leave, and the
        i-th leaves at least one life after the i-th forward.
        """
        instance, stage = self._instance, self.stages[level]
        num_microbatches, forward = instance.num_microbatches, instance.forward_seconds[stage]
        life = self._chain.turn(stage, stage) + instance.input_grad_seconds[stage]
        if level == 0 and instance.kept_memory[stage] == instance.held_memory[stage]:
            life += instance.weight_grad_seconds[stage]
        memory, fitting = self._memory_up_to(level), num_microbatches
        if num_microbatches * memory > self._room * (1 + ROUNDING):
            fitting = max(1, math.floor(self._room / memory * (1 + ROUNDING)))
        lives, forwards = divmod(num_microbatches - 1, fitting)
        head = self._chain.up[stage] - self._chain.up[self.stages[0]]
        return head + lives * life + (forwards + 1) * forward

    def _area(self) -> Bound:
        """Bound the window by memory-seconds: those that all activations need, and those that memory has.

        Filling and emptying lose some of them. If the two are apart, both losses count; the sum shows that
        they are, as a window in which they overlap holds no more than one in which they just touch.
        """
        instance, room = self._instance, self._room
        needed, fill, drain = 0.0, [], []
        for stage in self.stages:
            held, kept = instance.held_memory[stage], instance.kept_memory[stage]
            input_grad, weight_grad = instance.input_grad_seconds[stage], instance.weight_grad_seconds[stage]
            needed += held * (self._chain.turn(stage, stage) + input_grad) + kept * weight_grad
            fill.append((held, instance.forward_seconds[stage]))
            drain += [(held - kept, input_grad), (kept, weight_grad)]
        needed *= instance.num_microbatches
        (filling, unfilled), (draining, drained) = ramp(fill, room), ramp(drain, room)
        seconds = (needed + unfilled + drained) / room
        if seconds < filling + draining:
            seconds = needed / room
        return Bound(seconds, f"rank {self._rank}'s memory is too small for activations held this long")
