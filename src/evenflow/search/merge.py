"""Merge: strings that alternate forwards with input gradients after a warm-up, as 1F1B and its kin do.

On each rank the forwards run in rounds of some microbatches, each round stage by stage, the input gradients
the same with the last stage first (Narayanan et al., 2021). A round of as many microbatches as ranks would
just fill the way around the ranks if transfers took no time; as they do, a longer first round closes the
gaps. What is left to choose is how many forwards lead on each rank: a line over the ranks. Weight gradients
are decoded, see `timing`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeAlias

import numpy as np

from evenflow.bounds import Instance
from evenflow.search.tables import Ints
from evenflow.search.timing import Letters

Rounds: TypeAlias = tuple[int, ...]  # how many microbatches each round has; the last size is repeated


@dataclass(frozen=True, slots=True, eq=False)
class Merge:
    """The sizes of the rounds, the leading forwards of each rank, and which gaps weight gradients fill."""

    rounds: Rounds
    warmups: Ints
    fill: float


def merged(instance: Instance, merge: Merge) -> tuple[Letters, Ints]:
    """Return the lazy order of a merge.

    >>> from evenflow.bounds import instance_of
    >>> from evenflow.ir import Costs, Placement
    >>> instance = instance_of(Placement.linear(1), 3, Costs.uniform(1))
    >>> order, lengths = merged(instance, Merge((1,), np.array([2]), 1.0))
    >>> order[0, : lengths[0]].tolist()
    [0, 0, 1, 0, 1, 1]
    """
    placement, num_microbatches = instance.placement, instance.num_microbatches
    num = placement.num_stages
    queues = []
    for rank in range(placement.num_ranks):
        local = placement.stages_on(rank)
        forwards = _rounds(local, num_microbatches, merge.rounds)
        inputs = _rounds([num + stage for stage in reversed(local)], num_microbatches, merge.rounds)
        lead = min(max(int(merge.warmups[rank]), 1), len(forwards))
        queue = forwards[:lead]
        for at, letter in enumerate(inputs):
            queue.append(letter)
            queue += forwards[lead + at : lead + at + 1]
        queues.append(queue)
    order = np.zeros((len(queues), max(len(queue) for queue in queues) * 3 // 2), np.int16)
    for rank, queue in enumerate(queues):
        order[rank, : len(queue)] = queue
    return order, np.array([len(queue) for queue in queues], np.int64)


def merges(instance: Instance) -> Iterator[Merge]:
    """Yield merges to try: rounds of some sizes, and warm-ups on a line over the ranks."""
    num_ranks = instance.placement.num_ranks
    most = np.array([_most_forwards(instance, rank) for rank in range(num_ranks)])
    backs = num_ranks - 1 - np.arange(num_ranks)
    step = max(1, int(most.max()) // 40)
    for rounds in _sizes(num_ranks, instance.num_microbatches):
        for slope in (1.0, 1.5, 2.0):
            for first in range(1, int(most.max()) + step, step):
                warmups = np.minimum(first + np.floor(slope * backs), most).astype(np.int64)
                for fill in (0.0, 0.5, 1.0):
                    yield Merge(rounds, warmups, fill)
                if (warmups == most).all():
                    break


def _most_forwards(instance: Instance, rank: int) -> int:
    """How many forwards may lead on a rank, whatever their stages."""
    own = instance.placement.stages_on(rank)
    all_of_them = instance.num_microbatches * len(own)
    stored, cap = min(instance.held_memory[stage] for stage in own), instance.caps[rank]
    return max(1, min(all_of_them, int(cap / stored))) if cap < stored * all_of_them else all_of_them


def _sizes(num_ranks: int, num_microbatches: int) -> list[Rounds]:
    longer = range(num_ranks, min(2 * num_ranks, num_microbatches) + 1, max(1, num_ranks // 8))
    return [(1,), *((first, rest) for first in longer for rest in sorted({num_ranks, first}))]


def _rounds(letters: Sequence[int], num_microbatches: int, rounds: Rounds) -> list[int]:
    queue: list[int] = []
    first = turn = 0
    while first < num_microbatches:
        size = min(rounds[min(turn, len(rounds) - 1)], num_microbatches - first)
        for letter in letters:
            queue += [letter] * size
        first += size
        turn += 1
    return queue


def varied(merge: Merge, dice: Random) -> Merge:
    """Return a merge that differs in a round, in the lead of some neighbouring ranks, or in its filling."""
    rounds, warmups = list(merge.rounds), merge.warmups.copy()
    which = dice.random()
    if which < 0.4:
        if dice.random() < 0.4:
            rounds.append(rounds[-1])
        at = dice.randrange(len(rounds))
        rounds[at] = max(1, rounds[at] + dice.choice((-2, -1, 1, 2)))
    if which > 0.3:
        first = dice.randrange(len(warmups))
        last = first + 1 + dice.randrange(len(warmups) - first)
        warmups[first:last] += dice.choice((-2, -1, 1, 2))
    fill = dice.choice((0.0, 0.25, 0.5, 0.75, 1.0)) if dice.random() < 0.2 else merge.fill
    return Merge(tuple(rounds), warmups, fill)
