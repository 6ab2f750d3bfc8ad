"""The schedules that choices name, made once: whole ones, and what is in flight in them."""

from functools import lru_cache

from evenflow.ir.schedule import Schedule
from evenflow.plan.chain import Chain
from evenflow.plan.in_flight import InFlight
from evenflow.plan.request import Choice
from evenflow.schedules import catalog

_REPEATS = frozenset(
    {"1f1b", "zb-h1", "zb-h2", "interleaved-1f1b", "interleaved-zb", "zb-v", "v-half", "v-min"}
)


def schedule_of(choice: Choice) -> Schedule:
    """The schedule; raises `ConfigError` where it cannot serve the choice's sizes."""
    return _schedule(
        choice.schedule, choice.degrees.pipeline, choice.stages_per_rank, choice.num_microbatches
    )


def in_flight(choice: Choice) -> InFlight:
    """What is in flight in the schedule; raises `ConfigError` where it cannot serve the choice's sizes."""
    return _in_flight(*_sizes(choice))


def microbatches_in_flight(choice: Choice, chain: Chain) -> tuple[float, ...]:
    """How many microbatches each stage holds at its rank's peak."""
    saved, kept = (sum(each.num_bytes for each in held) for held in (chain.saved, chain.kept))
    return _microbatches(*_sizes(choice), round(min(kept / saved, 1.0), 2) if saved else 1.0)


@lru_cache(maxsize=64)
def _schedule(name: str, num_ranks: int, stages_per_rank: int, num_microbatches: int) -> Schedule:
    return catalog.get(name)(num_ranks, stages_per_rank, num_microbatches)


@lru_cache(maxsize=512)
def _in_flight(name: str, num_ranks: int, stages_per_rank: int, num_microbatches: int) -> InFlight:
    return InFlight(_schedule(name, num_ranks, stages_per_rank, num_microbatches))


@lru_cache(maxsize=512)
def _microbatches(
    name: str, num_ranks: int, stages_per_rank: int, num_microbatches: int, kept_share: float
) -> tuple[float, ...]:
    flying = _in_flight(name, num_ranks, stages_per_rank, num_microbatches)
    return flying.microbatches(kept_share=kept_share)


def _sizes(choice: Choice) -> tuple[str, int, int, int]:
    """What makes the schedule in which the activations are counted.

    After some rounds a schedule repeats itself, and holds no more: those rounds are enough.
    """
    per_round = choice.degrees.pipeline * choice.stages_per_rank
    enough = 4 * per_round if choice.schedule in _REPEATS else choice.num_microbatches
    number = min(choice.num_microbatches, enough)
    return choice.schedule, choice.degrees.pipeline, choice.stages_per_rank, number
