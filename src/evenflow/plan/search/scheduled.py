"""The schedules that choices name, made once: whole ones, and what is in flight in them."""

from functools import lru_cache

from evenflow.ir.costs import Costs
from evenflow.ir.flow import Flow
from evenflow.ir.op import InputGrad
from evenflow.ir.schedule import Schedule
from evenflow.plan.chain import Chain
from evenflow.plan.choice import Choice
from evenflow.plan.costs.in_flight import InFlight
from evenflow.plan.costs.overheads import Overheads
from evenflow.schedules import catalog
from evenflow.simulate import simulate

_FEW_RANKS = 4  # of more, each fills and drains as these do
_FEW_THAT_STALL = {"v-half": 8, "v-min": 8}  # where few ranks do not show how often they wait
_STEPS = 20  # how finely the times of forward, input and weight gradient are told apart
_REPEATS = frozenset(
    {"1f1b", "zb-h1", "zb-h2", "interleaved-1f1b", "interleaved-zb", "zb-v", "v-half", "v-min"}
)


def schedule_of(choice: Choice) -> Schedule:
    """The schedule; raises `ConfigError` where it cannot serve the choice's sizes."""
    return _schedule(
        choice.schedule, choice.degrees.pipeline, choice.stages_per_rank, choice.num_microbatches
    )


def splits(schedule: Schedule) -> bool:
    """Whether a schedule's backwards are in two parts."""
    return any(isinstance(op, InputGrad) for op in schedule.ranks[0])


def in_flight(choice: Choice, overheads: Overheads) -> InFlight:
    """What is in flight in the schedule; raises `ConfigError` where it cannot serve the choice's sizes."""
    return _in_flight(_sizes(choice), overheads.receives_ahead, overheads.sends_ahead)


def in_flight_of(schedule: Schedule, overheads: Overheads) -> InFlight:
    """What is in flight in a schedule that no choice names."""
    return InFlight(schedule, receives_ahead=overheads.receives_ahead, sends_ahead=overheads.sends_ahead)


def microbatches_in_flight(choice: Choice, chain: Chain, overheads: Overheads) -> tuple[float, ...]:
    """How many microbatches each stage holds at its rank's peak."""
    saved, kept = (sum(each.num_bytes for each in held) for held in (chain.saved, chain.kept))
    share = round(min(kept / saved, 1.0), 2) if saved else 1.0
    return _microbatches(_sizes(choice), overheads.receives_ahead, overheads.sends_ahead, share)


def stretch_of(choice: Choice, chain: Chain) -> float:
    """How many times as long as a rank's work the schedule takes, if stages are equal and nothing is sent.

    How long a microbatch takes, and filling and draining, are seen in runs of a few ranks and microbatches.
    """
    num_ranks, number = choice.degrees.pipeline, choice.num_microbatches
    seconds = next(iter(chain.seconds.values()))
    parts = [sum(each) for each in (seconds.forward, seconds.input_grad, seconds.weight_grad)]
    whole = sum(parts)
    if num_ranks == 1 or not whole:
        return 1.0
    few = min(num_ranks, _FEW_THAT_STALL.get(choice.schedule, _FEW_RANKS))
    shares = tuple(max(1, round(_STEPS * part / whole)) for part in parts)
    each, fill = _pace(choice.schedule, few, choice.stages_per_rank, shares)
    return each + fill * (num_ranks - 1) / (few - 1) / number


@lru_cache(maxsize=1024)
def _pace(name: str, num_ranks: int, stages_per_rank: int, shares: tuple[int, ...]) -> tuple[float, float]:
    """How long a further microbatch takes, and what a run takes besides, in a microbatch's work on a rank."""
    whole = sum(shares) * stages_per_rank
    taken = {}
    for number in (2 * num_ranks, 4 * num_ranks):
        schedule = _schedule(name, num_ranks, stages_per_rank, number)
        num_stages = schedule.placement.num_stages
        costs = Costs.uniform(num_stages, *(float(share) for share in shares))
        taken[number] = simulate(schedule, Flow.chain(num_stages), costs).makespan_seconds / whole
    each = (taken[4 * num_ranks] - taken[2 * num_ranks]) / (2 * num_ranks)
    return each, taken[4 * num_ranks] - 4 * num_ranks * each


@lru_cache(maxsize=64)
def _schedule(name: str, num_ranks: int, stages_per_rank: int, num_microbatches: int) -> Schedule:
    return catalog.get(name)(num_ranks, stages_per_rank, num_microbatches)


@lru_cache(maxsize=512)
def _in_flight(sizes: tuple[str, int, int, int], receives_ahead: int, sends_ahead: int) -> InFlight:
    return InFlight(_schedule(*sizes), receives_ahead=receives_ahead, sends_ahead=sends_ahead)


@lru_cache(maxsize=512)
def _microbatches(
    sizes: tuple[str, int, int, int], receives_ahead: int, sends_ahead: int, kept_share: float
) -> tuple[float, ...]:
    return _in_flight(sizes, receives_ahead, sends_ahead).microbatches(kept_share=kept_share)


def _sizes(choice: Choice) -> tuple[str, int, int, int]:
    """What makes the schedule in which the activations are counted.

    After some rounds a schedule repeats itself, and holds no more: those rounds are enough.
    """
    enough = 4 * choice.degrees.pipeline if choice.schedule in _REPEATS else choice.num_microbatches
    number = min(choice.num_microbatches, enough)
    return choice.schedule, choice.degrees.pipeline, choice.stages_per_rank, number
