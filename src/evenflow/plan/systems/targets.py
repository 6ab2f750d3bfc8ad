"""Other systems that train pipelines, as data: what each can express, so that a plan can stay inside it.

All of them cut between whole layers only. What they say of themselves, and where (read in November 2026):

- torchtitan: `torchtitan/config/parallelism.py` of https://github.com/pytorch/torchtitan (modules of each
  stage by name; schedules by the names of torch.distributed.pipelining, whose sizes
  `torch/distributed/pipelining/schedules.py` checks). Of data ranks beside other kinds it shards all states.
- Megatron-LM: docs/user-guide/parallelism-guide.md of https://github.com/NVIDIA/Megatron-LM, and the "Custom
  Pipeline Model Parallel Layout" (experimental) of https://docs.nvidia.com/megatron-core/developer-guide/latest/
  user-guide/features/pipeline_parallel_layout.html. FSDP beside a pipeline is left out: torch's is refused.
- DeepSpeed: https://www.deepspeed.ai/tutorials/pipeline/ (`PipelineModule`, which spreads its list of
  layers "uniform"ly, or those of a "type:" evenly; "parameters" is not used, as ties between its partitions
  are not documented). Its pipelines refuse ZeRO beyond stage 1 (`deepspeed/runtime/pipe/engine.py`), and
  part no tensors.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from evenflow.errors import ConfigError, ScheduleError
from evenflow.foreign import shown
from evenflow.ir.placement import Placement
from evenflow.ir.schedule import Schedule
from evenflow.plan.chain import Chain
from evenflow.plan.choice import Choice, Degrees, Sharding
from evenflow.plan.layers import Layers, cut_only_at, layers_of, planned_layers
from evenflow.plan.own_order import planned_schedule
from evenflow.plan.plan import Plan
from evenflow.plan.planner import NoPlanError, Progress, plan
from evenflow.plan.request import Limits, Request
from evenflow.torch_schedule import torch_faults

Fits = Callable[[int, int], bool]  # (pipeline ranks, microbatches): whether a schedule runs them
Cuts = Callable[[Layers, int], tuple[int, ...] | None]  # (layers, stages): where it cuts, if it can


def _one_a_stage(ranks: int, number: int) -> bool:
    return number >= ranks


def _even_rounds(ranks: int, number: int) -> bool:
    return number % max(1, number // ranks) == 0


def _multiple(ranks: int, number: int) -> bool:
    return number % ranks == 0


def _uniform(layers: Layers, num_stages: int) -> tuple[int, ...] | None:
    """As many layers to each stage, and one more to the first ones: embedding and head are layers too."""
    starts = (*([0] if layers.begins[0] else []), *layers.begins, layers.end)
    each, more = divmod(len(starts), num_stages)
    if not each:
        return None
    return tuple(starts[stage * each + min(stage, more)] for stage in range(1, num_stages))


def _same_blocks(layers: Layers, num_stages: int) -> tuple[int, ...] | None:
    """As many blocks to each stage; where they do not divide, which stage has more is not documented."""
    each, rest = divmod(len(layers.begins), num_stages)
    return None if rest else tuple(layers.begins[stage * each] for stage in range(1, num_stages))


@dataclass(frozen=True, slots=True)
class Target:
    """What a system can express.

    - `schedules`: what it calls those of ours that it has, and what numbers of microbatches it runs
      (any, where there is no rule).
    - `with_pipeline`, `alone`: what several data ranks may share beside other kinds of parallelism, and
      where there is none.
    - `other_degrees`: whether it has tensor, context and expert parallelism beside a pipeline.
    - `reads_orders`: whether it runs any schedule of the file that `torch_schedule` writes.
    - `cuts`: its ways to cut by name; none where any cut between layers can be said.

    All of them can recompute whole layers, each of them or none.
    """

    name: str
    schedules: Mapping[str, tuple[str, Fits | None]]
    with_pipeline: tuple[Sharding, ...]
    alone: tuple[Sharding, ...]
    other_degrees: bool = True
    reads_orders: bool = False
    cuts: Mapping[str, Cuts] = field(default_factory=lambda: MappingProxyType({}))

    def lays_out(self, choice: Choice, *, heads: int = 0) -> bool:
        """Whether it can run a choice, whatever is shared and recomputed.

        Of a model with attention heads, tensor ranks must divide them.
        """
        if heads % choice.degrees.tensor:
            return False
        return self.fault_of_degrees(choice.degrees) is None and self.fault_of_schedule(choice) is None

    def fault_of_degrees(self, degrees: Degrees) -> str | None:
        """Why it cannot have such ranks beside each other, if it cannot."""
        if self.other_degrees or max(degrees.tensor, degrees.context, degrees.expert) == 1:
            return None
        return "its pipelines have no tensor, context or expert ranks beside them"

    def fault_of_schedule(self, choice: Choice) -> str | None:
        """Why it has no such schedule by name, if it has none."""
        if choice.degrees.pipeline == 1:
            return None
        if choice.schedule not in self.schedules:
            return f"of our schedules it has {', '.join(self.schedules)}, and the plan's is {choice.schedule}"
        fits = self.schedules[choice.schedule][1]
        if fits is None or fits(choice.degrees.pipeline, choice.num_microbatches):
            return None
        return (
            f"its {self.schedules[choice.schedule][0]} does not run {choice.num_microbatches} microbatches "
            f"on {choice.degrees.pipeline} ranks"
        )

    def fault_of_savings(self, choice: Choice) -> str | None:
        """Why it cannot share and recompute so, if it cannot."""
        shared = self.shares(choice.degrees)
        if choice.degrees.sharding not in shared:
            return (
                f"of {choice.degrees.data} such data ranks it shares {' or '.join(shared)}, and the plan "
                f"{choice.degrees.sharding}"
            )
        if choice.recompute == "selective":
            return "it recomputes each layer or none, and the plan some nodes"
        return None

    def shares(self, degrees: Degrees) -> tuple[Sharding, ...]:
        """What it can share over data ranks."""
        if degrees.data == 1:
            return ("none",)
        return self.alone if degrees.num_devices == degrees.data else self.with_pipeline

    def limits(self, *, heads: int = 0) -> Limits:
        """What the planner may choose."""

        def lays_out(choice: Choice) -> bool:
            return self.lays_out(choice, heads=heads)

        def allows(choice: Choice) -> bool:
            return self.fault_of_savings(choice) is None and lays_out(choice)

        return Limits(lays_out, allows)


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        target.name: target
        for target in (
            Target(
                "torchtitan",
                MappingProxyType(
                    {
                        "gpipe": ("GPipe", None),
                        "1f1b": ("1F1B", _one_a_stage),
                        "looped-bfs": ("LoopedBFS", None),
                        "interleaved-1f1b": ("Interleaved1F1B", _even_rounds),
                        "interleaved-zb": ("InterleavedZeroBubble", _even_rounds),
                        "zb-v": ("ZBVZeroBubble", None),
                    }
                ),
                with_pipeline=("fsdp",),
                alone=("none", "fsdp"),
                reads_orders=True,
            ),
            Target(
                "megatron",
                MappingProxyType({"1f1b": ("1F1B", None), "interleaved-1f1b": ("interleaved", _multiple)}),
                with_pipeline=("none", "zero1"),
                alone=("none", "zero1", "fsdp"),
            ),
            Target(
                "deepspeed",
                MappingProxyType({"1f1b": ("TrainSchedule", None)}),
                with_pipeline=("none", "zero1"),
                alone=("none", "zero1", "fsdp"),
                other_degrees=False,
                cuts=MappingProxyType({"uniform": _uniform, "type:": _same_blocks}),
            ),
        )
    }
)


def target_called(name: str) -> Target:
    """Return a target by its name; `ConfigError` lists them for another.

    >>> target_called("megatron").with_pipeline
    ('none', 'zero1')
    """
    if name not in TARGETS:
        raise ConfigError(f"--target {name}: there are {', '.join(TARGETS)}")
    return TARGETS[name]


@dataclass(frozen=True, slots=True)
class Within:
    """A plan that a target can express, and how it says it.

    - `layers`, `positions`: the layers, counted as if each was one node, and where they are cut.
    - `way_to_cut`: its name for that, where it has several.
    - `schedule`: its name for the order of work; None where it must read the order itself.
    """

    target: Target
    plan: Plan
    layers: Layers
    positions: tuple[int, ...]
    way_to_cut: str | None
    schedule: str | None

    @property
    def blocks(self) -> tuple[int, ...]:
        """How many blocks each stage holds."""
        return self.layers.counts(self.positions)


def within(made: Plan, target: Target) -> Within:
    """A plan in the words of a target, whoever made it.

    Raises `ConfigError` with every reason for which the target cannot run it, and with what plans for it.
    """
    choice = made.choice
    faults = [target.fault_of_degrees(made.degrees), target.fault_of_savings(choice)]
    if (made.recompute == "none") != (not any(stage.recompute for stage in made.stages)):
        faults.append(f"its stages contradict recompute = {made.recompute!r}")
    unnamed = target.fault_of_schedule(choice)
    named = (
        target.schedules[made.schedule][0] if unnamed is None and made.schedule in target.schedules else None
    )
    if not target.reads_orders:
        faults.append(unnamed)
    way, layers, positions = None, Layers((), 0), tuple[int, ...]()
    try:
        order = planned_schedule(made)  # raises for stages on other ranks than its own
        if unnamed is not None and target.reads_orders:
            faults += _faults_of_order(order)
        if made.degrees.pipeline > 1 or made.layers:
            layers, positions = planned_layers(made)
            way = _way_to_cut(target, layers, positions)
    except ConfigError as error:
        faults.append(str(error))
    if told := [fault for fault in faults if fault is not None]:
        raise ConfigError(
            f"{target.name} cannot run this plan: {'; '.join(told)}. Plan for it: "
            f"evenflow plan ... --target {target.name}"
        )
    return Within(target, made, layers, positions, way, named)


def _faults_of_order(order: Schedule) -> list[str]:
    """Why a system that reads torch's schedule files cannot run an order of work; empty where it can."""
    try:
        faults = torch_faults(order)
    except ScheduleError as error:
        faults = [str(error)]
    if torch_style(order.placement) is None:
        ranks = shown(order.placement.rank_of)
        faults.append(f"it places stages in loops or in a V, not on ranks {ranks}")
    return faults


def torch_style(placement: Placement) -> str | None:
    """How torch's own words call a placement: "loop" or "v"; None for any other.

    Source: `generate_stage_to_rank_mapping` of torch/distributed/pipelining/_utils.py.

    >>> (
    ...     torch_style(Placement.looped(2, 2)),
    ...     torch_style(Placement.v_shape(2)),
    ...     torch_style(Placement((0, 0, 1))),
    ... )
    ('loop', 'v', None)
    """
    num_ranks = placement.num_ranks
    if placement == Placement.looped(num_ranks, max(1, placement.num_stages // num_ranks)):
        return "loop"
    return "v" if placement == Placement.v_shape(num_ranks) else None


def _way_to_cut(target: Target, layers: Layers, positions: tuple[int, ...]) -> str | None:
    if not target.cuts:
        return None
    for way, cuts in target.cuts.items():
        if cuts(layers, len(positions) + 1) == positions:
            return way
    raise ConfigError(
        f"it cuts by {' or '.join(target.cuts)} (PipelineModule's partition_method), and neither puts "
        f"{', '.join(map(str, layers.counts(positions)))} blocks on the stages"
    )


def within_limits(request: Request, target: Target, *, heads: int = 0) -> Request:
    """The request where the planner may choose what the target can express, but for its own ways to cut.

    Raises `ConfigError` for a model that is no embedding, layers and a head.
    """
    return replace(_cut_at(request, _layers(request).places), limits=target.limits(heads=heads))


def plan_within(
    request: Request,
    target: Target,
    *,
    heads: int = 0,
    progress: Progress | None = None,
) -> Within:
    """Return the fastest plan that a target can express.

    Raises `NoPlanError` where none fits into memory, and `ConfigError` for a model that is no embedding,
    layers and a head, and for levers that the target cannot follow.
    """
    limited = within_limits(request, target, heads=heads)
    found: list[Plan] = []
    refused: ConfigError | None = None
    for restricted in _restricted(limited, target):
        try:
            found.append(plan(restricted, progress=progress))
        except ConfigError as error:  # of several ways to cut some may be too few
            if refused is None or not isinstance(refused, NoPlanError):
                refused = error
    if not found:
        assert refused is not None, "each way was planned or refused"
        raise refused
    return within(min(found, key=lambda each: each.prediction.step_seconds), target)


def _restricted(request: Request, target: Target) -> Iterator[Request]:
    if not target.cuts:
        yield request
        return
    layers = _layers(request)
    # One stage a rank, and for each number of stages but one place for each cut.
    for num_stages in range(1, request.cluster.num_ranks + 1):
        if request.cluster.num_ranks % num_stages or request.levers.pipeline not in (None, num_stages):
            continue
        levers = replace(request.levers, pipeline=num_stages)
        for cuts in target.cuts.values():
            places = cuts(layers, num_stages)
            if places is not None:
                yield _cut_at(replace(request, levers=levers), places)


def _layers(request: Request) -> Layers:
    return layers_of(request.chain_of(min(request.microbatch_sizes)).names)


def _cut_at(request: Request, places: tuple[int, ...]) -> Request:
    def chain_of(rows: int) -> Chain:
        return cut_only_at(request.chain_of(rows), places)

    return replace(request, chain_of=chain_of)
