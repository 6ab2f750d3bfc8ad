"""Making a pipeline's parts: its program recorded and cut, its stages with their parameters."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from evenflow.errors import ConfigError
from evenflow.graph.cutting.cut import Cut
from evenflow.graph.nouns.graph import Graph
from evenflow.ir.op import InputGrad, parts
from evenflow.pipe.building.asked import Asked
from evenflow.pipe.building.holdings import used_on
from evenflow.pipe.building.layout import Layout
from evenflow.pipe.building.model_parameters import ModelParameters
from evenflow.pipe.given.cuts import leaf_share
from evenflow.pipe.given.programs import fingerprint
from evenflow.pipe.given.reading import check_loss, check_metrics, check_trainable
from evenflow.pipe.given.recompute import Recompute
from evenflow.pipe.parameters.fixed import refuse_shared_hooks
from evenflow.pipe.parameters.replicas import Dealt, data_ranks
from evenflow.runtime.links.choose import link_for, roll_call_for
from evenflow.runtime.links.link import Link
from evenflow.runtime.program import compiled
from evenflow.runtime.program.kept import buffers_at
from evenflow.runtime.program.offload import Offload
from evenflow.runtime.program.rng import Streams
from evenflow.runtime.recorded.parameters import Accumulators
from evenflow.runtime.recorded.recordings import Recordings
from evenflow.runtime.recorded.tracing import Leaves, Tracing
from evenflow.runtime.stages.stage import Stage

_LOG = logging.getLogger("evenflow")


@dataclass(frozen=True, slots=True)
class CutProgram:
    """A recorded program cut into stages, the first of `recordings`. `owner`: each parameter's stage."""

    recordings: Recordings
    accumulators: Accumulators
    cut: Cut
    owner: Mapping[str, int]


def recorded_and_cut(asked: Asked, layout: Layout, held: ModelParameters, item: Any) -> CutProgram:
    """Record `item`, the example's first microbatch, and cut, the same on all processes; collective.

    Raises `RecordError` for what cannot be recorded, `ConfigError` for what cannot be trained or cut, or is
    another program elsewhere, and `ScheduleError` for a wrong schedule.
    """
    given, num_stages = layout.decided, layout.placement.num_stages
    accumulators = Accumulators(held.by_name, layout.devices, exact=asked.exact)
    share = given.max_leaf_share
    if share is None:
        share = leaf_share(num_stages, compiles=asked.compiling is not None)
    leaves = Leaves(share, asked.exact, (*asked.split, *asked.recomputed), asked.atomic)
    recordings = Recordings(
        Tracing(asked.model, held.fakes, device=layout.device, leaves=leaves),
        accumulators=accumulators,
        compiling=asked.compiling,
        vocabulary=held.vocabulary,
        recompute=Recompute(asked.model, given.recompute, given.plan, tells=layout.mesh.world.is_first),
    )
    with asked.precision.recording(layout.device.type):
        graph = recordings.tracing.trace(asked.loss, item)
    _check_trainable(asked, held, graph)
    cut = recordings.cut_first(graph, given.positions(graph, num_stages), list(held.by_name))
    _check_alike(cut, layout)
    # A wrong schedule is refused here, and not at the first step.
    layout.programs.training(layout.programs.example.num_microbatches, cut.flow)
    accumulators.learn(cut)
    owner = {**recordings.stage_of_parameter, **accumulators.owner}
    return CutProgram(recordings, accumulators, cut, owner)


def _check_trainable(asked: Asked, held: ModelParameters, graph: Graph) -> None:
    check_loss(graph)
    check_trainable(graph)
    check_metrics(graph, asked.joining)
    fakes = held.fakes
    asked.precision.check(graph, ((fakes.names[id(fake)], fake) for _, _, fake in fakes.slots))


def _check_alike(cut: Cut, layout: Layout) -> None:
    """Refuse examples under which the processes recorded different programs: their stages would not fit."""
    nodes, batches = [node.name for node in cut.graph.chain], [section.batch for section in cut.sections]
    programs = layout.programs
    orders = programs.placement, programs.example.ranks, programs.costs
    mine = fingerprint(nodes, cut.positions, batches, *orders)
    found = [row[0] for row in layout.mesh.world.gather_numbers([mine])]
    if len(set(found)) > 1:
        other = next(rank for rank, number in enumerate(found) if number != found[0])
        raise ConfigError(
            f"ranks 0 and {other} recorded different programs (here {len(cut.graph.chain)} nodes, cut at "
            f"{cut.positions}): build the same model, pass an example of the same shapes, and name the same "
            "schedule, or the same plan, on every rank"
        )


def stages_made(
    asked: Asked, layout: Layout, held: ModelParameters, made: CutProgram, item: Any
) -> tuple[dict[int, Stage], Dealt]:
    """This process's stages, with the parameters that they own, and what data ranks do; collective.

    The model is left with what this process uses; parameters that others have become empty. Raises
    `ConfigError` for weights of a folder that do not fit, and hooks that would see a part of a gradient.
    """
    own, devices, owner = layout.own, layout.devices, made.owner
    stages = {stage: _stage(asked, stage, devices[stage]) for stage in own}
    keep = used_on(made.cut, owner, own) if layout.world.size > 1 else set(held.by_name)
    held.settle({name: devices[owner[name]] if owner[name] in own else layout.device for name in keep})
    owned = {stage: {n: p for n, p in held.by_name.items() if owner[n] == stage} for stage in own}
    for stage, parameters in owned.items():
        stages[stage].own(parameters)
    dealt = data_ranks(layout.mesh, stages, owned, made.accumulators, layout.shard, held.tensor)
    held.put(dealt.used)
    with asked.precision.recording(layout.device.type):
        made.recordings.add(item, made.cut, stages)
    refuse_shared_hooks(made.accumulators.uses, made.accumulators.parameter)
    return stages, dealt


def _stage(asked: Asked, index: int, device: torch.device) -> Stage:
    away = None if asked.offload is None else Offload(device)
    return Stage(index, device, Streams(asked.seed, device), partial(buffers_at, asked.model), away)


def tell_compiled(asked: Asked, layout: Layout, made: CutProgram) -> None:
    """Say once of each stage what is compiled, where that was asked for."""
    works = made.recordings.entries[0].works if made.recordings.compiles else {}
    computes = (part for rank in layout.programs.example.ranks for op in rank for part in parts(op))
    splits = {part.stage for part in computes if isinstance(part, InputGrad)}
    for stage, work in works.items():
        said = compiled.told(work.section.nodes, work.compiled, asked.model, splits=stage in splits)
        _LOG.log(logging.INFO if work.compiled else logging.WARNING, "stage %d %s", stage, said)


def joined(asked: Asked, layout: Layout, made: CutProgram) -> Link:
    """The link between the ranks, who from now on call the roll, where they can."""
    grid = layout.mesh
    link = link_for(grid.pipeline, layout.device, layout.placement, asked.link, flow=made.cut.flow)
    for world in (grid.pipeline, grid.world)[grid.is_whole :]:
        world.roll_call = roll_call_for(world, link)
    return link
