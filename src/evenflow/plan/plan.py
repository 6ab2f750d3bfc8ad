"""A plan: every decision of a run, what is expected of it, and how far that is from the best possible."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from evenflow.errors import ConfigError
from evenflow.plan.choice import Choice, Degrees, Recompute
from evenflow.plan.rank_memory import RankMemory


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """A stage: it begins with the node called `first` (see `node_labels`) and lives on pipeline rank `rank`.

    `recompute` names the nodes that compute their forward again in the backward. Seconds and bytes are of
    one microbatch; bytes are those that cross the cut before it.
    """

    rank: int
    first: str
    num_nodes: int
    recompute: tuple[str, ...]
    forward_seconds: float
    input_grad_seconds: float
    weight_grad_seconds: float
    received_bytes: float


@dataclass(frozen=True, slots=True)
class PlannedRank:
    """A pipeline rank: its device, the bytes it needs and has, and the share of a step that it idles.

    `device` is a kind, and `place` the first device of this rank among the cluster's, from 0.
    """

    device: str
    place: int
    memory: RankMemory
    cap_bytes: float
    idle: float


@dataclass(frozen=True, slots=True)
class PlannedLink:
    """The way from one pipeline rank to another, as the plan took it to be.

    >>> PlannedLink(source=0, target=1, latency_seconds=1e-5, seconds_per_byte=1e-10).target
    1
    """

    source: int
    target: int
    latency_seconds: float
    seconds_per_byte: float


@dataclass(frozen=True, slots=True)
class RunnerUp:
    """Another choice that was priced.

    >>> RunnerUp(Degrees(pipeline=4), 1, "zb-h1", 2, "none", step_seconds=0.5).schedule
    'zb-h1'
    """

    degrees: Degrees
    stages_per_rank: int
    schedule: str
    microbatch_size: int
    recompute: Recompute
    step_seconds: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a step takes, in seconds: all of it, the pipeline's part, gradients' sums, the optimizer's update.

    `bound_seconds`: no plan of all that were considered can take less. `mfu`: model FLOPs over the devices'
    peak, 0 to 1, where that is known.
    """

    step_seconds: float
    pipeline_seconds: float
    reduce_seconds: float
    update_seconds: float
    bound_seconds: float
    tokens_per_second: float
    mfu: float | None

    @property
    def gap(self) -> float:
        """The share by which the step may be longer than the best there is."""
        return self.step_seconds / self.bound_seconds - 1 if self.bound_seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """See the module. Its nodes are of a recording whose leaves hold at most `max_leaf_share` of all work.

    `order` has each rank's ops, as in a row of a schedule file, where the schedule was searched ("auto"); it
    is empty where `schedule` names one of the catalog. `links` are those between ranks on which a transfer
    takes any time. For systems that cut between whole layers only: `recompute` tells by which rule the stages
    recompute ("full": all of each layer that keeps anything), and `layers` names the first node of each
    repeated block, and last the node behind them (empty where the program has no such blocks, see `Layers`).
    """

    degrees: Degrees
    schedule: str
    stages_per_rank: int
    microbatch_size: int
    num_microbatches: int
    max_leaf_share: float
    stages: tuple[PlannedStage, ...]
    ranks: tuple[PlannedRank, ...]
    prediction: Prediction
    links: tuple[PlannedLink, ...] = ()
    runners_up: tuple[RunnerUp, ...] = ()
    order: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    recompute: Recompute = "none"

    @property
    def choice(self) -> Choice:
        """What was chosen."""
        return Choice(
            self.degrees,
            self.stages_per_rank,
            self.schedule,
            self.microbatch_size,
            self.num_microbatches,
            self.recompute,
        )


def node_labels(names: Sequence[str]) -> tuple[str, ...]:
    """The names of nodes, told apart: the second of one name gets #2, and so on.

    >>> node_labels(["embed", "block", "block"])
    ('embed', 'block', 'block#2')
    """
    seen: Counter[str] = Counter()
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return tuple(labels)


def positions_in(plan: Plan, names: Sequence[str]) -> tuple[int, ...]:
    """Where a plan cuts a chain of nodes of these names.

    Raises `ConfigError` where a stage begins with a node that is not there, or that stands before an earlier
    stage's first.
    """
    at = {label: position for position, label in enumerate(node_labels(names))}
    positions: list[int] = []
    for number, stage in enumerate(plan.stages):
        if stage.first not in at:
            raise ConfigError(
                f"the plan's stage {number} begins with {stage.first!r}, which the recorded program does not "
                "have: was the plan made for another model, or another batch? Plan again"
            )
        if positions and at[stage.first] <= positions[-1]:
            raise ConfigError(
                f"the plan's stage {number} begins with {stage.first!r}, which does not come after the "
                f"beginning of stage {number - 1}: order the stages as the program runs"
            )
        positions.append(at[stage.first])
    if positions[0] != 0:
        raise ConfigError(
            f"the plan's stage 0 begins with {plan.stages[0].first!r}; it must begin with the first node, "
            f"{names[0]!r}"
        )
    return tuple(positions[1:])
