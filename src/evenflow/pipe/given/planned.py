"""What decides the cut and the order of work: `pipeline`'s arguments for it, or a plan in their place."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evenflow.errors import ConfigError
from evenflow.graph.cutting.positions import legal_positions
from evenflow.graph.nouns.graph import Graph
from evenflow.ir.costs import Costs
from evenflow.ir.placement import Placement
from evenflow.pipe.given import cuts
from evenflow.pipe.given.recompute import RecomputeChoice
from evenflow.pipe.given.refuse import check_callable, check_whole
from evenflow.plan.known_costs import known_costs
from evenflow.plan.own_order import OwnOrder, check_stage_ranks, own_schedule
from evenflow.plan.plan import Plan, positions_in
from evenflow.plan.plan_file import read_plan_file
from evenflow.schedules.catalog import ScheduleFunction

DEFAULT_SCHEDULE = "1f1b"
_SHARDINGS = (None, "zero1", "fsdp")


@dataclass(frozen=True, slots=True)
class Decided:
    """`pipeline`'s arguments of the same names, checked, and those of a plan where there is one."""

    plan: Plan | None
    stages: int | None
    stages_per_rank: int | None
    schedule: str | ScheduleFunction
    microbatch_size: int | None
    num_microbatches: int | None
    split: Sequence[str] | None
    split_batch: Callable[[Any], Sequence[Any]] | None  # of any batch
    max_leaf_share: float | None
    recompute: RecomputeChoice  # of the plan's stages, where there is one

    @property
    def costs(self) -> Costs | None:
        """What stages and links cost, where a plan says it."""
        return None if self.plan is None else known_costs(self.plan)

    def places(self, placement: Placement) -> Sequence[int] | None:
        """Which device of the machine each pipeline rank takes, where a plan says it.

        Raises `ConfigError` for a plan whose stages stand elsewhere than its schedule puts them.
        """
        if self.plan is None:
            return None
        check_stage_ranks(self.plan, placement)
        return [rank.place for rank in self.plan.ranks]

    def positions(self, graph: Graph, num_stages: int) -> tuple[int, ...]:
        """Where to cut a recorded program.

        Raises `ConfigError` where it has no such node, or no cut may stand, or too few.
        """
        if self.plan is None:
            return cuts.positions_of(graph, self.split, num_stages)
        return _planned_positions(self.plan, graph)


def given_plan(
    plan: Plan | str | Path | None, mesh: Mapping[str, int] | None, shard: str | None
) -> tuple[Plan | str | None, Mapping[str, int] | None, str | None]:
    """The plan, read if it is a file, and the mesh and sharding that are given, or the plan's.

    Raises `ConfigError` where they contradict each other, or for sharding that there is not.
    """
    if shard not in _SHARDINGS:
        raise ConfigError(f"shard={shard!r} is none of {', '.join(map(repr, _SHARDINGS))}")
    _refuse_both(shard, (mesh or {}).get("tp"))
    if plan is None or plan == "auto":
        if shard is not None and (mesh or {}).get("dp", 1) == 1:
            raise ConfigError(f'shard={shard!r} needs data ranks, and there is one: give mesh= with "dp"')
        return plan, mesh, shard
    made = plan if isinstance(plan, Plan) else read_plan_file(Path(plan))
    if made.degrees.context > 1 or made.degrees.expert > 1:
        raise ConfigError(
            f"the plan takes {made.degrees.context} context and {made.degrees.expert} expert ranks, which "
            "pipeline() cannot run yet: plan for pipeline, data and tensor ranks alone"
        )
    if made.degrees.gathers_nodes:
        raise ConfigError(
            "the plan gathers parameters node by node (fsdp without a pipeline), which pipeline() cannot run "
            "yet: it gathers each stage once for a step; plan for a pipeline of at least two ranks beside"
        )
    degrees = {"pp": made.degrees.pipeline, "dp": made.degrees.data, "tp": made.degrees.tensor}
    _refuse_beside_plan({"mesh": mesh, "shard": shard})
    sharding = None if made.degrees.data == 1 or made.degrees.sharding == "none" else made.degrees.sharding
    _refuse_both(sharding, made.degrees.tensor)
    beside = made.degrees.num_devices > made.degrees.pipeline
    return made, degrees if beside else None, sharding


def _refuse_both(shard: str | None, num_tensor: object) -> None:
    if shard == "fsdp" and num_tensor not in (None, 1):
        raise ConfigError(
            'shard="fsdp" beside tensor ranks is not built: take shard="zero1", or leave "tp" out of mesh='
        )


def decided(made: Plan | None, **given: Any) -> Decided:  # given: `pipeline`'s arguments
    """Check what was given, and put what a plan decides in its place; raises `ConfigError`."""
    if made is not None:
        _refuse_beside_plan(given)
        given["stages"], given["stages_per_rank"] = len(made.stages), made.stages_per_rank
        own = own_schedule(made)
        given["schedule"] = made.schedule if own is None else OwnOrder(own)
        given["microbatch_size"] = made.microbatch_size
        given["max_leaf_share"] = made.max_leaf_share
        return Decided(made, **given)
    counts = ("stages", "stages_per_rank", "microbatch_size", "num_microbatches")
    check_whole(**{name: given[name] for name in counts})
    check_callable(split_batch=given["split_batch"])
    cuts.check_share(given["max_leaf_share"])
    given["schedule"] = DEFAULT_SCHEDULE if given["schedule"] is None else given["schedule"]
    if not isinstance(given["schedule"], str):
        check_callable(schedule=given["schedule"], needed=True)
    return Decided(None, **given)


def _refuse_beside_plan(others: dict[str, Any]) -> None:
    for name, value in others.items():
        if value is not None:
            raise ConfigError(
                f"{name}= and plan= are both given, and a plan decides that; change it in the plan, or leave "
                "one of them out"
            )


def _planned_positions(plan: Plan, graph: Graph) -> tuple[int, ...]:
    """Where the plan cuts a recorded program; `ConfigError` where there is no such node or place to cut."""
    positions = positions_in(plan, [node.name for node in graph.chain])
    legal = legal_positions(graph)
    for number, position in enumerate(positions, start=1):
        if not legal[position]:
            first = plan.stages[number].first
            raise ConfigError(f"the plan's stage {number} begins with {first!r}, but {cuts.NO_CUT}; move it")
    return positions
