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

from evenflow.errors import ConfigError
from evenflow.plan.chain import Chain
from evenflow.plan.layers import Layers, cut_only_at, layers_of
from evenflow.plan.plan import Degrees, Plan
from evenflow.plan.planner import NoPlanError, Progress, plan
from evenflow.plan.rank_memory import Sharding
from evenflow.plan.request import Choice, Limits, Request

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
    - `cuts`: its ways to cut by name; none where any cut between layers can be said.

    All of them can recompute whole layers, each of them or none.
    """

    name: str
    schedules: Mapping[str, tuple[str, Fits | None]]
    with_pipeline: tuple[Sharding, ...]
    alone: tuple[Sharding, ...]
    other_degrees: bool = True
    cuts: Mapping[str, Cuts] = field(default_factory=lambda: MappingProxyType({}))

    def lays_out(self, choice: Choice, *, heads: int = 0, experts: int = 0) -> bool:
        """Whether it can run a choice, whatever is shared and recomputed.

        Of a model with attention heads, tensor ranks must divide them; expert ranks divide the experts.
        """
        degrees = choice.degrees
        others = (degrees.tensor, degrees.context, degrees.expert)
        if heads % degrees.tensor or experts % degrees.expert:
            return False
        if degrees.pipeline == 1:
            return self.other_degrees or max(others) == 1
        if choice.schedule not in self.schedules or (max(others) > 1 and not self.other_degrees):
            return False
        fits = self.schedules[choice.schedule][1]
        return fits is None or fits(degrees.pipeline, choice.num_microbatches)

    def shares(self, degrees: Degrees) -> tuple[Sharding, ...]:
        """What it can share over data ranks."""
        if degrees.data == 1:
            return ("none",)
        return self.alone if degrees.num_devices == degrees.data else self.with_pipeline

    def limits(self, *, heads: int = 0, experts: int = 0) -> Limits:
        """What the planner may choose."""

        def lays_out(choice: Choice) -> bool:
            return self.lays_out(choice, heads=heads, experts=experts)

        def allows(choice: Choice) -> bool:
            shared = choice.degrees.sharding in self.shares(choice.degrees)
            return shared and choice.recompute in ("none", "full") and lays_out(choice)

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
    """A plan that a target can express, the blocks of each stage, and its way to cut, if it has several."""

    target: Target
    plan: Plan
    blocks: tuple[int, ...]
    positions: tuple[int, ...]
    layers: Layers
    way_to_cut: str | None


def within_limits(request: Request, target: Target, *, heads: int = 0, experts: int = 0) -> Request:
    """The request where the planner may choose what the target can express, but for its own ways to cut.

    Raises `ConfigError` for a model that is no embedding, layers and a head.
    """
    layers = layers_of(request.chain_of(min(request.microbatch_sizes)).names)
    return replace(_cut_at(request, layers.places), limits=target.limits(heads=heads, experts=experts))


def plan_within(
    request: Request,
    target: Target,
    *,
    heads: int = 0,
    experts: int = 0,
    progress: Progress | None = None,
) -> Within:
    """Return the fastest plan that a target can express.

    Raises `NoPlanError` where none fits into memory, and `ConfigError` for a model that is no embedding,
    layers and a head, and for levers that the target cannot follow.
    """
    layers = layers_of(request.chain_of(min(request.microbatch_sizes)).names)
    limited = within_limits(request, target, heads=heads, experts=experts)
    found: list[tuple[Plan, str | None]] = []
    refused: ConfigError | None = None
    for restricted, way in _restricted(limited, target, layers):
        try:
            found.append((plan(restricted, progress=progress), way))
        except ConfigError as error:  # of several ways to cut some may be too few
            if refused is None or not isinstance(refused, NoPlanError):
                refused = error
    if not found:
        assert refused is not None, "each way was planned or refused"
        raise refused
    best, way = min(found, key=lambda each: each[0].prediction.step_seconds)
    ends = [sum(stage.num_nodes for stage in best.stages[:count]) for count in range(1, len(best.stages))]
    return Within(target, best, layers.counts(ends), tuple(ends), layers, way)


def _restricted(request: Request, target: Target, layers: Layers) -> Iterator[tuple[Request, str | None]]:
    if not target.cuts:
        yield request, None
        return
    # One stage a rank, and for each number of stages but one place for each cut.
    for num_stages in range(1, request.cluster.num_ranks + 1):
        if request.cluster.num_ranks % num_stages or request.levers.pipeline not in (None, num_stages):
            continue
        levers = replace(request.levers, pipeline=num_stages)
        for way, cuts in target.cuts.items():
            places = cuts(layers, num_stages)
            if places is not None:
                yield _cut_at(replace(request, levers=levers), places), way


def _cut_at(request: Request, places: tuple[int, ...]) -> Request:
    def chain_of(rows: int) -> Chain:
        return cut_only_at(request.chain_of(rows), places)

    return replace(request, chain_of=chain_of)
