"""Chance: random numbers inside compiled code, whose whole state is one array, so that a seed says it all."""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from evenflow.search.compiled import inlined

State = npt.NDArray[np.uint64]


class Cooling(NamedTuple):
    """How an annealing cools: over so many ops timed, from hot to cold, in seconds of cost."""

    num_ops: float
    hot: float
    cold: float


def chance(seed: int) -> State:
    """Return the state of a new generator.

    >>> state = chance(3)
    >>> 0 <= uniform(state) < 1
    True
    """
    # The first output of SplitMix64: neighbouring seeds must not give neighbouring states.
    mixed = (seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % 2**64
    return np.array([(mixed ^ (mixed >> 31)) or 1], np.uint64)


@inlined
def uniform(state: State) -> float:
    """Return a number from 0 to 1, 1 excluded (xorshift64*, Vigna 2016)."""
    x = state[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    state[0] = x
    return float((x * np.uint64(2685821657736338717)) >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@inlined
def below(state: State, limit: int) -> int:
    """Return a whole number from 0 to `limit`, the limit excluded."""
    return int(uniform(state) * limit)


@inlined
def geometric(state: State, mean: float) -> int:
    """Return a whole number from 0 on, `mean` on average."""
    return int(math.log(1.0 - uniform(state)) / math.log(mean / (mean + 1.0)))


@inlined
def normal(state: State) -> float:
    """Return a number of mean 0 and variance 1 (Box and Muller)."""
    radius = math.sqrt(-2.0 * math.log(1.0 - uniform(state)))
    return radius * math.cos(2.0 * math.pi * uniform(state))


@inlined
def heat_at(cooling: Cooling, num_ops: float) -> float:
    """Return the temperature when so many ops have been timed: it falls by the same share for each."""
    return cooling.hot * math.pow(cooling.cold / cooling.hot, num_ops / cooling.num_ops)
