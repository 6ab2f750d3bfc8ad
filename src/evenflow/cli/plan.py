"""`evenflow plan`: choose how to train a model on a cluster, say what that takes, write it down."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.utils import _pytree as pytree

import evenflow
from evenflow.cli.collecting import no_collecting
from evenflow.cli.config import RunConfig
from evenflow.cli.feed import make_feed
from evenflow.cli.job import Flags, make_job
from evenflow.cli.plan_here import plan_here
from evenflow.cli.printing import print_line
from evenflow.cli.source import ModelSource, build, refusing
from evenflow.cli.writing import check_new, write
from evenflow.cluster.cluster import Cluster
from evenflow.cluster.read import read_cluster
from evenflow.cluster.short import parse_cluster
from evenflow.cluster.sizes import parse_bytes
from evenflow.cost.estimate import estimate
from evenflow.cost.recorded import Recorded
from evenflow.cost.weights import weights_of
from evenflow.errors import ConfigError
from evenflow.pipe.building.recorded import planned_leaf_share, recorded, row_tokens
from evenflow.pipe.given.splitter import Splitter
from evenflow.plan.chain import Chain
from evenflow.plan.choice import RECOMPUTE_NAMES, Choice, describe
from evenflow.plan.plan import Plan
from evenflow.plan.plan_file import write_plan
from evenflow.plan.planner import NoPlanError, plan
from evenflow.plan.rank_memory import TrainingState
from evenflow.plan.request import Levers, Request
from evenflow.plan.scale import scaled
from evenflow.plan.shortage.advice import advised
from evenflow.plan.shortage.weights import check_weights
from evenflow.plan.systems.target_settings import settings
from evenflow.plan.systems.targets import Target, Within, plan_within, target_called, within_limits
from evenflow.runtime.recorded.weights import rows_of
from evenflow.schedules import catalog
from evenflow.view.units import format_bytes, format_seconds

_SIZES = (1, 2, 4, 8)  # of a microbatch, in rows: more only cost memory
_RECORDED_ROWS = (2, 4)  # sizes that are recorded; one row might be taken for no row


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line says of a plan; see its help. `target` is the name of another system.

    With no cluster the ranks that `evenflow train` would start here are measured.
    """

    cluster: str | None = None
    memory: str | None = None
    rows: int | None = None
    pipeline_only: bool = False
    target: str | None = None
    out: Path | None = None


def plan_run(flags: Flags, asked: Asked) -> Plan:
    """Plan the run that `evenflow train` would make of these flags, here or on a cluster that is not there.

    Raises:
        EvenflowError: The model, the cluster or the levers cannot work as given, or nothing fits.
    """
    check_new("--out", asked.out)
    memory = None if asked.memory is None else parse_bytes(asked.memory)
    console = Console()
    within: Within | None = None
    if asked.cluster is None:
        found = _measured(flags, asked, memory)
    else:
        target = None if asked.target is None else target_called(asked.target)
        found, within = _estimated(console, flags, asked, asked.cluster, memory, target)
    print_plan(console, found)
    if within is not None:
        print_line(console, f"for {within.target.name}:", "bold")
        print_line(console, settings(within))
    if asked.out is not None:
        write(console, asked.out, write_plan(found))
    return found


def _measured(flags: Flags, asked: Asked, memory_bytes: float | None) -> Plan:
    if asked.rows is not None or asked.target is not None:
        name = "rows" if asked.rows is not None else "target"
        raise ConfigError(f"--{name} plans for a machine that is not measured: name one with --cluster")
    job = make_job(flags)
    return plan_here(
        job, replace(_levers(job.config, pipeline_only=True), pipeline=job.num_ranks), memory_bytes
    )


def _estimated(
    console: Console, flags: Flags, asked: Asked, cluster: str, memory: float | None, target: Target | None
) -> tuple[Plan, Within | None]:
    machine = read_cluster(Path(cluster)) if cluster.endswith(".toml") else parse_cluster(cluster)
    if memory is not None:
        machine = machine.with_memory(memory)
    with console.status("recording the model") as status, refusing("the model cannot be recorded"):
        request, heads = _request(flags, machine, asked.rows, pipeline_only=asked.pipeline_only)

        def tell(number: int, of: int, best_seconds: float) -> None:
            best = "" if best_seconds == float("inf") else f", the best {format_seconds(best_seconds)} a step"
            status.update(f"{number} of {of} choices{best}")

        try:
            if target is None:
                return plan(request, progress=tell), None
            within = plan_within(request, target, heads=heads, progress=tell)
            return within.plan, within
        except NoPlanError as refused:
            status.update("nothing fits: looking for what would")
            if target is None:
                raise advised(request, refused) from None
            if target.cuts:  # what another cut would let fit is no advice to it
                raise
            raise advised(within_limits(request, target, heads=heads), refused) from None


def _request(flags: Flags, machine: Cluster, rows: int | None, *, pipeline_only: bool) -> tuple[Request, int]:
    """The question to the planner, and the attention heads that tensor ranks must divide, 0 if unknown."""
    config = make_job(dataclasses.replace(flags, device="cpu")).config
    with no_collecting(), evenflow.deferred_init():
        source = build(config.model, seed=config.training.seed, loads=False)
    size = next(source.model.parameters()).element_size()
    state = TrainingState(optimizer_bytes=2 * size, update_bytes=size)  # AdamW, as `evenflow train` makes it
    check_weights(weights_of(source.model), machine, state)
    share = planned_leaf_share(machine.num_ranks)
    example = make_feed(config.data, source, config.training).validation[0]
    batch_rows = rows or rows_of(example) or 1
    given = config.pipeline.microbatch_size
    sizes = tuple(size for size in sorted({*_SIZES, given or 1}) if batch_rows % size == 0)
    request = Request(
        _chains(source, example, machine, share),
        sizes,
        machine,
        batch_rows,
        row_tokens=row_tokens(example),
        max_leaf_share=share,
        state=state,
        dtype=str(next(source.model.parameters()).dtype).removeprefix("torch."),
        levers=_levers(config, pipeline_only=pipeline_only),
    )
    return request, _heads(source.model)


def _heads(model: torch.nn.Module) -> int:
    """The attention heads, also those of keys and values, as Hugging Face's configurations call them."""
    config = vars(model).get("config")
    named = ("num_attention_heads", "num_key_value_heads")
    return math.gcd(*(getattr(config, name, None) or 0 for name in named))


def _levers(config: RunConfig, *, pipeline_only: bool) -> Levers:
    """What the planner takes as given of a configuration: not the number of microbatches, nor its cuts."""
    given = config.pipeline
    levers = Levers(
        stages_per_rank=given.stages_per_rank,
        schedule=None if given.schedule == catalog.AUTO else given.schedule,
        microbatch_size=given.microbatch_size,
        recompute=next((name for name in RECOMPUTE_NAMES if name == given.recompute), None),
    )
    return levers.pipeline_only() if pipeline_only else levers


def _chains(source: ModelSource, example: object, machine: Cluster, share: float) -> Callable[[int], Chain]:
    def costed(num_rows: int) -> Chain:
        found = _recorded(source, example, num_rows, share)
        return estimate(found.graph, found.model, machine.devices, num_rows=num_rows)

    small, large = map(costed, _RECORDED_ROWS)
    return functools.lru_cache(lambda num_rows: scaled(small, large, num_rows))


def _recorded(source: ModelSource, example: object, num_rows: int, share: float) -> Recorded:
    return recorded(
        source.model,
        loss=source.loss,
        example=_with_rows(example, num_rows),
        splitter=Splitter(1, 1, None, None),
        max_leaf_share=share,
        device=torch.device("cpu"),
    )


def _with_rows(example: object, num_rows: int) -> object:
    """The batch with so many rows: its first ones, over and over."""

    def repeated(leaf: object) -> object:
        if not isinstance(leaf, torch.Tensor) or leaf.ndim == 0:
            return leaf
        return leaf[torch.arange(num_rows) % len(leaf)]

    return pytree.tree_map(repeated, example)


def print_plan(console: Console, found: Plan) -> None:
    """The plan as tables: what was chosen, each pipeline rank, the runners-up."""
    told = found.prediction
    print_line(console, describe(found.choice), "bold")
    mfu = f", {told.mfu:.1%} of the devices' peak" if told.mfu is not None else ""
    print_line(
        console,
        f"{format_seconds(told.step_seconds)} a step expected ({told.tokens_per_second:,.0f} tokens/s{mfu}); "
        f"none can take less than {format_seconds(told.bound_seconds)}: this is at most {told.gap:.1%} over",
    )
    console.print(_rank_table(found))
    if found.runners_up:
        console.print(_runner_up_table(found))


def _rank_table(found: Plan) -> Table:
    table = Table(title="pipeline ranks", title_justify="left", padding=(0, 1))
    for heading in (
        "rank",
        "device",
        "begins with",
        "idle",
        "memory",
        "of",
        "parameters",
        "optimizer",
        "activations",
    ):
        table.add_column(heading, justify="left" if heading in ("device", "begins with") else "right")
    for number, rank in enumerate(found.ranks):
        stages = [stage for stage in found.stages if stage.rank == number]
        memory = rank.memory
        table.add_row(
            str(number),
            rank.device,
            Text("\n".join(stage.first + (" (recomputes)" if stage.recompute else "") for stage in stages)),
            f"{rank.idle:.1%}",
            *map(format_bytes, (memory.allocated, rank.cap_bytes)),
            format_bytes(memory.parameters + memory.gradients),
            *map(format_bytes, (memory.optimizer, memory.activations)),
        )
    return table


def _runner_up_table(found: Plan) -> Table:
    table = Table(title="runners-up", title_justify="left", padding=(0, 1))
    table.add_column("choice")
    table.add_column("a step", justify="right")
    rows = found.microbatch_size * found.num_microbatches * found.degrees.data
    for each in itertools.islice(found.runners_up, 5):
        number = rows // each.degrees.data // each.microbatch_size
        choice = Choice(
            each.degrees, each.stages_per_rank, each.schedule, each.microbatch_size, number, each.recompute
        )
        table.add_row(Text(describe(choice)), format_seconds(each.step_seconds))
    return table
