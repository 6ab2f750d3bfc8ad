"""`evenflow.pipeline`: from a model and an example batch to a `Pipeline`."""

import itertools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from evenflow.cost.optimizer import OptimizerFactory
from evenflow.errors import ConfigError
from evenflow.graph.cut import Cut
from evenflow.graph.fakes import FakeParameters
from evenflow.graph.graph import Graph
from evenflow.ir.flow import Flow
from evenflow.ir.op import InputGrad, parts
from evenflow.ir.placement import Placement
from evenflow.pipe import auto, choices
from evenflow.pipe.additive import differences
from evenflow.pipe.choices import Splitter
from evenflow.pipe.default_programs import model_loss
from evenflow.pipe.fill import Numbers
from evenflow.pipe.fixed import FixedParameters, refuse_shared_hooks
from evenflow.pipe.parts import Parts, StageSummary
from evenflow.pipe.pipeline import Pipeline
from evenflow.pipe.planned import decided
from evenflow.pipe.programs import Programs, fingerprint
from evenflow.pipe.reading import check_loss, check_trainable
from evenflow.pipe.recompute import Recompute, RecomputeChoice, check_recompute
from evenflow.pipe.refuse import check_given, refuse_unfit
from evenflow.pipe.update import SchedulerFactory, Updater
from evenflow.plan.plan import Plan
from evenflow.runtime import compiled
from evenflow.runtime.compiled import Compiling
from evenflow.runtime.kept import buffers_at
from evenflow.runtime.links.choose import link_for, roll_call_for
from evenflow.runtime.links.link import Link
from evenflow.runtime.narrowing import Narrowing
from evenflow.runtime.offload import Offload
from evenflow.runtime.parameters import Accumulators, parameters_by_name, stages_of_parameters
from evenflow.runtime.recordings import Leaves, Program, Recordings
from evenflow.runtime.rng import Streams
from evenflow.runtime.stage import Stage
from evenflow.runtime.weights import ReductionChoice, Weigher, rows_of
from evenflow.runtime.world import World
from evenflow.schedules import catalog
from evenflow.schedules.catalog import ScheduleFunction

_LOG = logging.getLogger("evenflow")


def pipeline(  # noqa: PLR0913 (the levers that a user has: each is one argument)
    model: torch.nn.Module,
    *,
    loss: Program | None = None,
    example: Any,
    optimizer: OptimizerFactory | None = None,
    scheduler: SchedulerFactory | None = None,
    stages: int | None = None,
    stages_per_rank: int | None = None,
    schedule: str | ScheduleFunction | None = None,
    microbatch_size: int | None = None,
    num_microbatches: int | None = None,
    split: Sequence[str] | None = None,
    split_batch: Callable[[Any], Sequence[Any]] | None = None,
    reduction: ReductionChoice = None,
    atomic: Sequence[type[torch.nn.Module]] = (),
    max_leaf_share: float | None = None,
    exact: bool = False,
    load: str | Path | None = None,
    plan: Plan | str | Path | None = None,
    link: str = "auto",
    boundary_dtype: torch.dtype | None = None,
    compile: bool | str = False,  # noqa: A002 (as torch calls it)
    recompute: RecomputeChoice = None,
    offload: str | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Pipeline:
    """Cut a model into stages and return the pipeline that trains it, its parameters in place.

    Under `torchrun` or `evenflow.launch` each process is one rank and runs its stages; else this process runs
    all of them, on the CUDA devices that it finds or on the CPU.

    - `loss(model, microbatch)` is called once per microbatch and returns a scalar tensor, or (scalar,
      metrics); by default `model(**microbatch).loss`. Any Python that `evenflow.graph.record` can follow.
    - `example`: one full batch, from which shapes are read: any tree of tensors and plain values.
    - `optimizer` receives a list of (name, parameter), a stage's trainable ones; `scheduler` the optimizer.
    - `stages`: how many in all; by default `stages_per_rank` for each process, or CUDA device, or just those.
    - `stages_per_rank`: how many each rank holds; by default what suits the schedule: 2 for those that
      interleave and those in the shape of a V, else 1. Where each stage lives, the schedule says.
    - `schedule`: a name in `evenflow.schedules.catalog`, by default "1f1b"; "auto", the best for equal ops,
      free transfers and 1F1B's memory, which may be searched for seconds; or a function like those of the
      catalog, called with `num_ranks`, `stages_per_rank` and `num_microbatches`, that places the stages alike
      for any number of microbatches.
    - `microbatch_size` (rows) or `num_microbatches`: by default up to four microbatches per rank.
    - `split`: names of modules before which to cut, in order; by default the cuts balance estimated FLOPs.
    - `split_batch(batch)` returns a list of microbatches, for batches that dim 0 does not split.
    - `reduction`: what `loss` does over a microbatch, so that the step's loss is that of the whole batch:
      "item-mean" (over rows), "token-mean" (over the targets that cross-entropy does not ignore), "sum", or
      a function that returns a microbatch's weight. By default the recording says, and `Pipeline.reduction`
      tells what it said; with `num_items_in_batch` in the batch, Hugging Face's losses are sums. Where the
      recording does not say: over those whole-number `labels` that are not -100, if the batch has labels,
      else over rows.
    - `atomic`: module classes that are never taken apart; `max_leaf_share`: the largest share of all FLOPs
      that one unsplit module may hold (default 1 / (4 * stages)).
    - `exact`: shared parameters get one gradient accumulator per use, so that every cut gives the same bits.
    - `load`: a folder of safetensors (a Hugging Face model, an export, a PEFT adapter), of which each process
      reads only the tensors that its stages use, in the parameters' own types. The model's parameters may
      then lie on the device "meta". Keys are named as in its `state_dict`, or as transformers stores it.
    - `plan`: a plan (`evenflow plan -o FILE`) or its file, in the place of the stages, the cuts, the schedule
      and the size of a microbatch. Each pipeline rank takes the CUDA device that the plan gives it. With
      "auto" all processes together measure the model and their links, and plan what is not given; so it is
      where there are several processes and nothing is given. Measurements are kept for the next time.
    - `link`: how tensors travel between processes: "auto", through shared memory between CPU ranks of one
      host and over torch.distributed between others; "torch", over that alone; "shared-memory", or an error.
    - `boundary_dtype`: torch.bfloat16 halves what float32 activations, and their gradients, take on their way
      between stages; they are rounded between any two stages, on one device too. By default they are not.
      What gets no gradient (masks, what frozen layers make, all of an evaluation) is not rounded.
    - `compile`: let torch.compile have every block, a module that holds others and stays whole; modules are
      then taken apart only where they hold more than a stage's share of all FLOPs. A string names its backend
      (by default "inductor"). Numbers are the compiler's, the same for every schedule. What draws random
      numbers stays as it is; the gradients of compiled weights are not put off. The log tells of each stage.
    - `recompute`: what runs its forward again in the backward: "full", all that holds less for it, block by
      block (elements of lists of modules); "selective", in each stage what frees most for each second, until
      half of what "full" frees is; "none"; or names and patterns of modules. What changes state stays out.
    - `offload`: with "activations" what is saved for the backward waits in the host's memory.
    - `seed` keys all random draws; `device` is "cpu" or "cuda".

    Raises `ConfigError` for what cannot work as given, `RecordError` where the model cannot be recorded.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    >>> batch = {"x": torch.randn(8, 4), "y": torch.randn(8, 1)}
    >>> pipe = pipeline(
    ...     model,
    ...     loss=lambda model, batch: torch.nn.functional.mse_loss(model(batch["x"]), batch["y"]),
    ...     example=batch,
    ...     optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    ...     stages=2,
    ... )
    >>> first, second = pipe.step(batch), pipe.step(batch)
    >>> float(second.loss) < float(first.loss)
    True
    """
    refuse_unfit(model, loading=load is not None)
    levers = {
        "stages": stages,
        "stages_per_rank": stages_per_rank,
        "schedule": schedule,
        "microbatch_size": microbatch_size,
        "num_microbatches": num_microbatches,
        "split": split,
        "split_batch": split_batch,
        "max_leaf_share": max_leaf_share,
        "recompute": recompute,
    }
    again = check_recompute(model, recompute)
    check_given(seed, reduction, link, offload=offload, loss=loss, optimizer=optimizer, scheduler=scheduler)
    compiling, narrowing = Compiling.of(compile), Narrowing(boundary_dtype)
    choices.check_split(model, split or ())
    kind = choices.device_kind(device)
    world = choices.world_of(kind)
    program = loss if loss is not None else model_loss
    plan, levers = auto.planned(
        plan,
        levers,
        world,
        choices.own_device(kind, world),
        exact=exact,
        run={"model": model, "loss": program, "example": example, "optimizer": optimizer}
        | {"atomic": tuple(atomic), "seed": seed, "link": link}
        | {"narrowing": narrowing, "compiles": compiling is not None},
    )
    given = decided(plan, **levers)
    method = catalog.get(given.schedule) if isinstance(given.schedule, str) else given.schedule
    on_each = choices.stages_on_each(given.stages_per_rank, given.schedule)
    num_stages = choices.stage_count(given.stages, split, world, kind, stages_per_rank=on_each)
    num_ranks = num_stages // on_each
    splitter = Splitter(num_ranks, given.num_microbatches, given.microbatch_size, split_batch)
    items = splitter(example).items
    item = items[0]
    programs = Programs(
        world, method, num_ranks=num_ranks, stages_per_rank=on_each, num_microbatches=len(items)
    )
    placement = programs.placement
    devices = choices.devices_of(kind, placement, given.places)
    own = range(num_stages) if world.size == 1 else placement.stages_on(world.rank)

    own_device = devices[own[0]]
    fakes = FakeParameters(model, own_device)
    parameters = parameters_by_name(model, fakes.tied)
    numbers = Numbers(model, parameters, fakes.tied, load=load, seed=seed)
    _share_buffers(model, world, own_device)
    accumulators = Accumulators(parameters, devices, exact=exact)
    own_share = choices.leaf_share(num_stages, compiles=compiling is not None)
    share = own_share if given.max_leaf_share is None else given.max_leaf_share
    recordings = Recordings(
        model,
        fakes,
        device=own_device,
        leaves=Leaves(share, exact, (*(split or ()), *again), tuple(atomic)),
        accumulators=accumulators,
        compiling=compiling,
        recompute=Recompute(model, given.recompute, given.plan, tells=world.rank == 0),
    )
    recordings.look(program)
    graph = recordings.trace(program, item)
    check_loss(graph)
    check_trainable(graph)
    cut = recordings.cut_first(graph, given.positions(graph, num_stages), list(parameters))
    _check_alike(cut, programs, world)
    programs.training(len(items), cut.flow)  # a wrong schedule is refused here, and not at the first step
    accumulators.learn(cut)
    owner = {**recordings.stage_of_parameter, **accumulators.owner}

    stages_here = {stage: _stage(stage, devices[stage], seed, model, offload) for stage in own}
    keep = _used_on(cut, owner, own) if world.size > 1 else set(parameters)
    homes = {name: devices[owner[name]] if owner[name] in own else own_device for name in keep}
    numbers.fill(parameters, homes)
    _put(fakes, parameters)
    if world.size > 1:
        _let_go(fakes, parameters, keep=keep, device=own_device)
    owned = {stage: {n: p for n, p in parameters.items() if owner[n] == stage} for stage in own}
    for stage, held in owned.items():
        stages_here[stage].own(held)
    recordings.add(program, item, cut, stages_here)
    _tell_compiled(model, recordings, programs)
    refuse_shared_hooks(accumulators.uses, accumulators.parameter)
    weigher = Weigher(recordings, reduction)
    described = weigher.describe(0, item)
    if world.rank == 0:
        _LOG.info("the step's loss: %s", described)
        _warn_of_differences(model, graph, weigher, items)
    updater = Updater(
        world,
        accumulators,
        owned,
        process_of_stage=lambda stage: placement.rank_of[stage] if world.size > 1 else 0,
        optimizer=optimizer,
        scheduler=scheduler,
    )
    updater.spread()  # processes may have initialised them differently: the owner holds
    return Pipeline(
        Parts(
            model=model,
            loss=program,
            world=world,
            link=_joined(world, own_device, placement, link, cut.flow),
            stages=stages_here,
            devices=devices,
            recordings=recordings,
            updater=updater,
            fixed=FixedParameters(model),
            programs=programs,
            splitter=splitter,
            weigher=weigher,
            reduction=described,
            buffers=_true_buffers(model, cut, world, placement),
            summaries=_summaries(
                cut,
                placement,
                narrowing,
                {name: (owner[name], parameters[name].numel()) for name in parameters},
            ),
            narrowing=narrowing,
            loaded=None if load is None else Path(load),
            plan=given.plan,
        )
    )


def _joined(world: World, device: torch.device, placement: Placement, choice: str, flow: Flow) -> Link:
    """The link between the ranks, who from now on call the roll, where they can."""
    link = link_for(world, device, placement, choice, flow=flow)
    world.roll_call = roll_call_for(world, link)
    return link


def _tell_compiled(model: torch.nn.Module, recordings: Recordings, programs: Programs) -> None:
    """Say once of each stage what is compiled, where that was asked for."""
    works = recordings.entries[0].works if recordings.compiles else {}
    computes = (part for rank in programs.example.ranks for op in rank for part in parts(op))
    splits = {part.stage for part in computes if isinstance(part, InputGrad)}
    for stage, work in works.items():
        said = compiled.told(work.section.nodes, work.compiled, model, splits=stage in splits)
        _LOG.log(logging.INFO if work.compiled else logging.WARNING, "stage %d %s", stage, said)


def _stage(index: int, device: torch.device, seed: int, model: torch.nn.Module, offload: str | None) -> Stage:
    away = None if offload is None else Offload(device)
    return Stage(index, device, Streams(seed, device), partial(buffers_at, model), away)


def _warn_of_differences(
    model: torch.nn.Module, graph: Graph, weigher: Weigher, items: Sequence[Any]
) -> None:
    """Say once where the loss of several microbatches is not that of the whole batch."""
    if len(items) == 1:
        return
    for said in differences(model, graph, rows=rows_of(items[0])):
        warnings.warn(f"the pipeline's loss is not that of the unsplit batch: {said}", stacklevel=3)
    if weigher.sums_more(0, items[0]):
        warnings.warn(
            "the pipeline's loss is not that of the unsplit batch: the microbatches' losses are added up, "
            "and what the loss function adds to its sum (a penalty, the balance of experts) counts once for "
            "each",
            stacklevel=3,
        )
    if weigher.guesses(0, items[0]):
        warnings.warn(
            "the recording does not show what the loss is a mean over; microbatches are weighted by the "
            "labels that are not -100. Where the loss leaves out more (a causal model's first label of each "
            "row), give reduction=lambda microbatch: how many tokens it counts",
            stacklevel=3,
        )


def _share_buffers(model: torch.nn.Module, world: World, device: torch.device) -> None:
    """Give every process the first one's buffers, which masks and tables are computed from on all of them."""
    for buffer in model.buffers() if world.size > 1 else ():
        moved = buffer.detach().to(device)
        work = world.broadcast(moved, 0)
        if work is not None:
            work.wait()
        buffer.detach().copy_(moved)


def _check_alike(cut: Cut, programs: Programs, world: World) -> None:
    """Refuse examples under which the processes recorded different programs: their stages would not fit."""
    nodes, batches = [node.name for node in cut.graph.chain], [section.batch for section in cut.sections]
    mine = fingerprint(nodes, cut.positions, batches, programs.placement, programs.example.ranks)
    found = [row[0] for row in world.gather_numbers([mine])]
    if len(set(found)) > 1:
        other = next(rank for rank, number in enumerate(found) if number != found[0])
        raise ConfigError(
            f"ranks 0 and {other} recorded different programs (here {len(cut.graph.chain)} nodes, cut at "
            f"{cut.positions}): build the same model, pass an example of the same shapes, and name the same "
            "schedule on every rank"
        )


def _true_buffers(model: torch.nn.Module, cut: Cut, world: World, placement: Placement) -> frozenset[str]:
    """Persistent buffers that this process speaks for: what its stages change; the first, the rest."""
    rank_of = placement.rank_of
    homes = {
        name: rank_of[s.stage] for s in cut.sections for node in s.nodes for name in node.changed_buffers
    }
    kept = set(model.state_dict())
    names = (name for name, _ in model.named_buffers() if name in kept)
    return frozenset(name for name in names if world.size == 1 or homes.get(name, 0) == world.rank)


def _used_on(cut: Cut, owner: Mapping[str, int], stages: Sequence[int]) -> set[str]:
    """Parameters that one of these stages owns or uses."""
    users = stages_of_parameters(cut)
    return {name for name, home in owner.items() if not {home, *users.get(name, ())}.isdisjoint(stages)}


def _let_go(
    fakes: FakeParameters, parameters: dict[str, torch.nn.Parameter], *, keep: set[str], device: torch.device
) -> None:
    """Keep `keep` on this process's device; put empty parameters in the place of all others."""
    for name, parameter in list(parameters.items()):
        if name in keep:
            parameter.data = parameter.data.to(device)
        else:
            empty = torch.empty_like(parameter, device="meta")
            parameters[name] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
    _put(fakes, parameters)


def _put(fakes: FakeParameters, parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """Let the model's modules hold these parameters."""
    for module, key, fake in fakes.slots:
        module._parameters[key] = parameters[fakes.names[id(fake)]]


def _summaries(
    cut: Cut, placement: Placement, narrowing: Narrowing, parameters: Mapping[str, tuple[int, int]]
) -> tuple[StageSummary, ...]:
    """What each stage holds. `parameters` maps a name to (owning stage, number of elements)."""
    costs = choices.node_costs(cut.graph)
    edges = (0, *cut.positions, len(cut.graph.chain))
    sent = [[value for group in section.sends.values() for value in group] for section in cut.sections]
    return tuple(
        StageSummary(
            stage=stage,
            rank=placement.rank_of[stage],
            num_nodes=end - start,
            first=cut.graph.chain[start].name if end > start else "-",
            last=cut.graph.chain[end - 1].name if end > start else "-",
            num_parameters=sum(size for owner, size in parameters.values() if owner == stage),
            share=sum(costs[start:end]) / sum(costs),
            num_sent=len(sent[stage]),
            sends_bytes=sum(narrowing.num_bytes(cut.graph.values[value].info) for value in sent[stage]),
        )
        for stage, (start, end) in enumerate(itertools.pairwise(edges))
    )
