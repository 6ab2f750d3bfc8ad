"""`evenflow.pipeline`: from a model and an example batch to a `Pipeline`."""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from evenflow.cost.optimizer import OptimizerFactory
from evenflow.graph.nouns.graph import Graph
from evenflow.pipe.building.additive import differences
from evenflow.pipe.building.asked import Asked
from evenflow.pipe.building.holdings import summaries, true_buffers
from evenflow.pipe.building.layout import laid_out
from evenflow.pipe.building.making import joined, recorded_and_cut, stages_made, tell_compiled
from evenflow.pipe.building.model_parameters import ModelParameters
from evenflow.pipe.given.default_programs import model_loss
from evenflow.pipe.given.precision import Precision
from evenflow.pipe.given.recompute import RecomputeChoice, check_recompute
from evenflow.pipe.given.refuse import refuse_unfit
from evenflow.pipe.parameters.fixed import FixedParameters
from evenflow.pipe.parameters.replicas import SharedBuffers
from evenflow.pipe.parameters.rules import OnBadNumbers, UpdateRules
from evenflow.pipe.parameters.tensor_plan import TensorPlan
from evenflow.pipe.parameters.update import SchedulerFactory, Updater
from evenflow.pipe.pipeline import Pipeline
from evenflow.pipe.step.parts import Parts
from evenflow.plan.plan import Plan
from evenflow.runtime.program.compiled import Compiling
from evenflow.runtime.ranks.watchdog import TIMEOUT_SECONDS
from evenflow.runtime.recorded.joining import Joining, MetricsChoice
from evenflow.runtime.recorded.tracing import Program
from evenflow.runtime.recorded.weights import ReductionChoice, Weigher, rows_of
from evenflow.runtime.stages.narrowing import Narrowing
from evenflow.schedules.catalog import ScheduleFunction

_LOG = logging.getLogger("evenflow")


# long: as its arguments, and what is to be said of each: it is the library's face. The body lists them once
# more, and then the steps.
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
    metrics: MetricsChoice = None,
    atomic: Sequence[type[torch.nn.Module]] = (),
    max_leaf_share: float | None = None,
    exact: bool = False,
    load: str | Path | None = None,
    plan: Plan | str | Path | None = None,
    link: str = "auto",
    boundary_dtype: torch.dtype | None = None,
    compile: bool | str = False,  # noqa: A002 (as torch calls it)
    precision: str | None = None,
    clip_norm: float | None = None,
    bad_numbers: str | None = None,
    find_nan: bool = False,
    mesh: Mapping[str, int] | None = None,
    tensor_plan: TensorPlan | None = None,
    shard: str | None = None,
    recompute: RecomputeChoice = None,
    offload: str | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    timeout: float | None = TIMEOUT_SECONDS,
) -> Pipeline:
    """Cut a model into stages and return the pipeline that trains it, its parameters in place.

    Under `torchrun` or `evenflow.launch` each process is one rank and runs its stages; else this process runs
    all of them, on the CUDA devices that it finds or on the CPU.

    - `loss(model, microbatch)` is called once per microbatch and returns a scalar tensor, or (scalar,
      metrics); by default `model(**microbatch).loss`. Any Python that can be recorded (docs/own.md).
    - `example`: one full batch, from which shapes are read: any tree of tensors and plain values.
    - `optimizer` receives a list of (name, parameter), a stage's trainable ones, and returns an optimizer, or
      a list of several, which are stepped as one; `scheduler` receives the optimizer.
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
    - `metrics`: how the microbatches' metrics become the batch's: "mean" (weighted as the loss is), "sum",
      "max", "min", "cat" or a function of the list of their values, for all of them, or by the names that
      they have: metrics={"correct": "sum"}. What is not named: tensors with dimensions are concatenated along
      dim 0, real scalars averaged, whole numbers added up, equal values kept, anything else listed.
    - `atomic`: module classes that are never taken apart; `max_leaf_share`: the largest share of all FLOPs
      that one unsplit module may hold (default 1 / (4 * stages)).
    - `exact`: shared parameters get one gradient accumulator per use, so that every cut gives the same bits.
    - `load`: a folder of safetensors (a Hugging Face model, an export, a PEFT adapter), of which each process
      reads only the tensors that its stages use. The model's parameters may then lie on the device "meta",
      and have the types that the folder stores; others keep theirs (see `precision`). Keys are named as in
      its `state_dict`, or as transformers stores it.
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
    - `precision`: "fp32"; "bf16" or "fp16" (float32 parameters, products in 16 bits, as torch.autocast has
      them; with "fp16" the loss is scaled, and a step that overflows anywhere is left out everywhere);
      "bf16-pure" (batch and parameters in bfloat16 too; the optimizer updates float32 copies). By default
      what the model and the loss function say.
    - `clip_norm`: the most that the norm of all gradients may be, over all ranks, before the update;
      `StepResult.grad_norm` tells what it was. math.inf measures it alone.
    - `bad_numbers`: what becomes of a step whose loss, or the norm of its gradients, is NaN or infinite:
      "stop" raises `BadNumbersError` on every rank, "skip" leaves it out, and warns. Nothing is updated then,
      and the step is run again to say which node made the first bad number. By default nobody looks.
    - `find_nan`: watch every node of every step as it runs: slower, and finds what does not repeat too.
    - `mesh`: how many pipeline ("pp"), data ("dp") and tensor ("tp") ranks there are: {"pp": 4, "dp": 2};
      together they are all processes, and "pp" is what the others leave. Each data rank takes its own part of
      a batch's microbatches; their gradients are summed while other stages compute. Numbers are those of the
      same batch without, but for a BatchNorm's statistics, which are those of the first data rank's part.
    - `tensor_plan`: how tensor ranks share modules, `{"layers.*.up": "colwise", "layers.*.down": "rowwise"}`
      say, or with torch's `ParallelStyle`s. By default the plan that a Hugging Face model brings along.
    - `shard`: what data ranks share: "zero1", the optimizer's states, each updating some of the parameters;
      "fsdp", parameters, gradients and states, with torch's `fully_shard`: a step gathers each stage once.
    - `recompute`: what runs its forward again in the backward: "full", all that holds less for it, block by
      block (elements of lists of modules); "selective", in each stage what frees most for each second, until
      half of what "full" frees is; "none"; or names and patterns of modules. What changes state stays out.
    - `offload`: with "activations" what is saved for the backward waits in the host's memory.
    - `seed` keys all random draws; `device` is "cpu" or "cuda".
    - `timeout`: for how many seconds a rank waits for another one that does not move: that is stopped, or
      hangs, or vanished. Then all end, with one report of who waited where, and for whom (docs/failures.md).
      With None there is no such watchdog.

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
    asked = Asked(
        model=model,
        loss=model_loss if loss is None else loss,
        example=example,
        optimizer=optimizer,
        scheduler=scheduler,
        split=split or (),
        recomputed=check_recompute(model, recompute),
        reduction=reduction,
        joining=Joining.of(metrics),
        atomic=tuple(atomic),
        exact=exact,
        load=None if load is None else Path(load),
        link=link,
        narrowing=Narrowing(boundary_dtype),
        compiling=Compiling.of(compile),
        precision=Precision.of(precision),
        clip_norm=clip_norm,
        on_bad_numbers=OnBadNumbers.of(bad_numbers, find_nan=find_nan),
        tensor_plan=tensor_plan,
        offload=offload,
        seed=seed,
    )
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
    layout, items = laid_out(asked, levers, plan=plan, mesh=mesh, shard=shard, device=device, timeout=timeout)
    held = ModelParameters(asked, layout.mesh, layout.device)
    made = recorded_and_cut(asked, layout, held, items[0])
    own, dealt = stages_made(asked, layout, held, made, items[0])
    tell_compiled(asked, layout, made)
    weigher = Weigher(made.recordings, reduction)
    described = weigher.describe(0, items[0])
    if layout.mesh.world.is_first:
        _LOG.info("the step's loss: %s", described)
        _warn_of_differences(model, made.cut.graph, weigher, items)
    updater = Updater(
        layout.world,
        made.accumulators,
        dealt.owned,
        process_of_stage=layout.process_of,
        optimizer=optimizer,
        scheduler=scheduler,
        data=dealt.data,
        tensor=held.tensor,
        rules=UpdateRules.of(
            asked.precision, clip_norm, asked.on_bad_numbers, layout.mesh.world, held.fakes.trainable_names
        ),
    )
    updater.spread()  # processes may have initialised them differently: the owner holds
    return Pipeline(
        Parts(
            model=model,
            loss=asked.loss,
            mesh=layout.mesh,
            world=layout.world,
            link=joined(asked, layout, made),
            stages=own,
            devices=layout.devices,
            recordings=made.recordings,
            updater=updater,
            fixed=FixedParameters(model),
            programs=layout.programs,
            splitter=layout.splitter,
            weigher=weigher,
            joining=asked.joining,
            reduction=described,
            shared_buffers=SharedBuffers(layout.mesh, made.recordings, layout.own),
            buffers=true_buffers(model, made.cut, layout.mesh, layout.placement),
            summaries=summaries(made.cut, layout.placement, asked.narrowing, made.owner, held.by_name),
            precision=asked.precision,
            narrowing=asked.narrowing,
            loaded=asked.load,
            plan=layout.decided.plan,
        )
    )


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
