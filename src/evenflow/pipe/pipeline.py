"""`Pipeline`: a model cut into stages, ready to train. Made by `evenflow.pipeline`."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from evenflow.bill import Bill
from evenflow.errors import ConfigError
from evenflow.ir.timeline import Timeline
from evenflow.journal.last_step import LastStep
from evenflow.pipe.faults.bad_numbers import Guard, Guarded
from evenflow.pipe.faults.check import check_step, refuse_uncheckable
from evenflow.pipe.faults.check_report import CheckReport
from evenflow.pipe.given.default_programs import call_model
from evenflow.pipe.given.reading import read_loss, read_prediction
from evenflow.pipe.restorable import Restorable
from evenflow.pipe.step.accumulated import OverBatches
from evenflow.pipe.step.agree import Agreed
from evenflow.pipe.step.batches import Batches, fed
from evenflow.pipe.step.exhausted import Watch
from evenflow.pipe.step.outcome import Gather, check_gather, outcome, prediction
from evenflow.pipe.step.parts import Parts
from evenflow.pipe.step.result import StepResult
from evenflow.pipe.step.runs import ProgramOf, Runs
from evenflow.pipe.times.last_step import last_step
from evenflow.pipe.times.logs import Every, LogHook
from evenflow.pipe.times.meter import Meter
from evenflow.pipe.times.times import Marks
from evenflow.runtime.recorded.tracing import Program
from evenflow.runtime.stages.executor import Executor, Reading, Result
from evenflow.runtime.stages.nan_watch import NanWatch


class Pipeline(Restorable):
    """Trains a model cut into stages; `evenflow.pipeline` makes it.

    `cut` tells what each stage holds, `reduction` how the step's loss is put together from the microbatches',
    and `plan` is the plan that the pipeline follows, its own or a given one (None where there is none).
    `is_main` is true on the one process that should print and write files.

    >>> from evenflow.pipe.build import pipeline
    >>> batch, model = torch.ones(8, 4), torch.nn.Linear(4, 1, bias=False)
    >>> pipe = pipeline(
    ...     model,
    ...     loss=lambda model, b: model(b).mean(),
    ...     example=batch,
    ...     optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    ...     stages=1,
    ... )
    >>> losses = [float(pipe.step(each).loss) for each in pipe.feed([batch] * 3)]
    >>> losses[2] > float(pipe.evaluate(batch).loss)
    True
    >>> pipe.num_updates, pipe.epoch, [name for name, _ in pipe.named_parameters()], len(pipe.optimizers)
    (3, 1, ['weight'], 1)
    >>> predicted, measured = pipe.timelines()
    >>> len(measured.spans), pipe.last_step().stages[0].num_parameters
    (8, 4)
    >>> pipe.close()
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._batches, self._runs = Batches(parts), Runs(parts)
        self._guard = Guard(parts, self._runs)
        if parts.mesh.world.whereabouts is not None:
            parts.mesh.world.whereabouts.costs = parts.programs.costs
            parts.mesh.world.whereabouts.end()

    def __repr__(self) -> str:
        stages = f"{len(self.cut)} stages" if len(self.cut) > 1 else "1 stage"
        return f"Pipeline({stages}, loss: {self.reduction})"

    # -- training

    @torch.enable_grad()
    def step(self, batch: Any, *, update: bool = True) -> StepResult:
        """Run one batch forward and backward and, unless `update=False`, update the parameters.

        With `update=False` gradients accumulate: the next update uses those of the mean loss over all rows,
        or tokens (see `reduction`), seen since the last one; where losses are sums, of their sum. Gradients
        stay readable until the next step. Every rank calls this, with the same batch or with what `feed`
        yields. Raises `ConfigError` for a batch that cannot work, before anything has run, and `PeerError`
        when another rank is lost; for bad numbers see `bad_numbers` of `pipeline`. An error in mid-step, and
        a step that is left out, drop all gradients since the last update.
        """
        if torch.is_inference_mode_enabled():
            raise ConfigError("step() was called in inference mode, in which nothing can be trained")
        if self._is_swapped:
            raise ConfigError("step() was called inside swapped(): the numbers that it trained would be lost")
        marks = Marks(time.perf_counter())
        self._logs.begin()
        agreed = self._batches.agree(self._parts.loss, batch, training=True)
        if self._updated:
            self._parts.updater.clear()
            self._accumulated.clear()
            self._updated = False
        share = self._accumulated.add(agreed.shares) * self._parts.updater.rules.loss_factor
        guarded = self._guard.over(agreed, share=share, step=self._step)
        try:
            programs = self._parts.programs
            reduces = update and self._parts.mesh.data.size > 1
            program = programs.reducing if reduces else programs.training
            result, executors = self._outcome(agreed, program, share=share, watch=guarded.watch)
            self._parts.shared_buffers.spread()
            self._logs.note(result, agreed.shares)
            rates = self._logs.rates(self._num_updates + 1, self.optimizers)  # the update changes them
            if update:
                start = time.perf_counter()
                self._update(executors, result, guarded)
                marks.update_seconds = time.perf_counter() - start
            marks.end_seconds = time.perf_counter()
            if not self._updated and guarded.refuses(result):
                num_batches = self._accumulated.num_batches
                result.bad_numbers = self._guard.dealt_with(guarded, result, num_batches)
                self._drop()
        except Exception:
            self._drop()
            raise
        self._step += 1
        logs = [executor.log for executor in executors]
        self._times.note(executors[0].proven, logs, marks, executors[0].jobs[0].cut)
        if self._parts.mesh.world.whereabouts is not None:
            self._parts.mesh.world.whereabouts.stepped(self._step, logs)
        if self._updated:
            self._num_updates += 1
            self._logs.updated(self._num_updates, rates)
        return result

    def evaluate(self, batch: Any) -> StepResult:
        """Loss and metrics of one batch in evaluation mode, without gradients.

        Changes nothing but the buffers that the model itself changes in evaluation mode.
        """
        with self._evaluating():
            agreed, results = self._evaluated(self._parts.loss, batch, read_loss)
            return outcome(self._parts, results, agreed, self._batches.graph(agreed))

    def evaluate_all(self, loader: Iterable[Any]) -> StepResult:
        """Loss and metrics of all of a loader's batches in evaluation mode, as if they were one batch.

        The loss is the mean over all rows, or tokens (see `reduction`), and not over batches; metrics are put
        together over all microbatches as `pipeline(metrics=…)` says. Only the first rank reads, as with
        `feed`; the result is the same on every rank. Raises `ConfigError` for a loader without a batch.

        >>> from evenflow.pipe.build import pipeline
        >>> batches, model = [torch.ones(8, 4), torch.zeros(2, 4)], torch.nn.Linear(4, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 0.25)
        >>> pipe = pipeline(model, loss=lambda model, b: model(b).mean(), example=batches[0], stages=1)
        >>> round(float(pipe.evaluate_all(batches).loss), 6)
        0.8
        """
        together, graph = OverBatches(), None
        with self._evaluating():
            for batch in fed(self._parts.mesh.world, loader, iter):
                agreed, results = self._evaluated(self._parts.loss, batch, read_loss)
                together.add(agreed, results)
                graph = self._batches.graph(agreed)
            agreed = together.agreed()
            assert graph is not None, "there was a batch"
            return outcome(self._parts, together.results, agreed, graph)

    def predict(self, batch: Any, function: Program | None = None, *, gather: Gather = True) -> Any:
        """What `function(model, microbatch)` returns in evaluation mode, joined over a batch's microbatches.

        By default `model(**microbatch)` (or `model(microbatch)` for a batch that is no mapping). Tensors are
        concatenated along dim 0. With `gather=True` it comes to every rank; large ones, such as logits,
        travel less with "main", to the first rank alone, and not at all with False: they stay on the device
        of the rank that has the last stage (data ranks put theirs together there, on the host). Where it does
        not come to, None is returned. Every rank calls.

        >>> from evenflow.pipe.build import pipeline
        >>> batch, model = torch.randn(8, 4), torch.nn.Linear(4, 1)
        >>> pipe = pipeline(model, loss=lambda model, b: model(b).mean(), example=batch, stages=1)
        >>> pipe.predict(batch, gather="main").shape
        torch.Size([8, 1])
        """
        check_gather(gather)
        with self._evaluating():
            agreed, results = self._evaluated(function or call_model, batch, read_prediction)
            return prediction(self._parts, results, agreed, gather)

    def feed(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Yield the loader's batches for `step`; only the first rank reads, others are sent their share.

        After a `load` the first pass goes on where the run was saved, behind what was trained on.
        """
        batches = self._position.counted(partial(fed, self._parts.mesh.world, loader))
        yield from self._logs.fed(batches)

    def log_to(self, hook: LogHook, *, every: Every = 1, all_ranks: bool = False) -> Callable[[], None]:
        """Call `hook(step, numbers)` on the main rank for each `every`th update, which `step` counts.

        Returns a function that takes the hook away again.

        `every` may also say for which numbers, as a function. Numbers have names: `loss` (of all batches
        since the last update), `grad_norm` where it is known, `learning_rate` (of the main rank's first
        stage; `learning_rate/0`, … where groups differ), `metrics/…`; since the hook was last called,
        evaluations left out, `rows_per_second`, `tokens_per_second` where the loss is a mean over them, and
        for an update `step_seconds` and, of those, `wait_seconds` for what `feed` yields; of the last step
        `bubble/rank0`; of all steps, where it is known, the most memory held, `peak_bytes/rank0`, and what
        there is, `cap_bytes/rank0` (see docs/training.md). With `all_ranks` those of each rank, and `bubble`
        over all: then every rank must call this, and take the hook away, alike, which else they may. Raises
        `ConfigError` for a hook that is no function.

        >>> from evenflow.pipe.build import pipeline
        >>> batch, model = torch.ones(8, 4), torch.nn.Linear(4, 1)
        >>> pipe = pipeline(model, loss=lambda model, b: model(b).mean(), example=batch, stages=1)
        >>> _ = pipe.log_to(lambda step, numbers: print(step, *numbers))
        >>> _ = pipe.step(batch)
        1 loss bubble bubble/rank0 peak_bytes/rank0 rows_per_second step_seconds
        """
        return self._logs.add(hook, every, all_ranks=all_ranks)

    # -- looking inside

    @property
    def optimizers(self) -> Mapping[int, torch.optim.Optimizer]:
        """The optimizers of this process, by the stage whose parameters they train."""
        return self._parts.updater.optimizers

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """(name, parameter) of this process's stages, under the model's names; shared ones at their owner."""
        yield from self._parts.updater.parameters

    def named_gradients(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """(name, gradient) of this process's trainable parameters, as the update uses them.

        A collective call. None where nothing reached the parameter; after an update also where another data
        rank has updated it (`shard="zero1"`), which alone has the sum.
        """
        updater = self._parts.updater
        if not self._updated:
            updater.gather_shared()
        scale = None if self._updated else updater.descaled(self._accumulated.scale)
        found: list[tuple[str, torch.Tensor | None]] = []  # whole before any is told: ranks do this together
        for name, parameter in updater.parameters:
            if parameter.requires_grad:
                gradient = parameter.grad if self._updated else updater.data.summed(name, parameter)
                found.append((name, gradient if gradient is None or scale is None else gradient * scale))
        yield from found

    @torch.enable_grad()
    def check(self, batch: Any, *, progress: Callable[[str], None] | None = None) -> CheckReport:
        """Run one step of `batch` split and one whole, update nothing, and compare all that they made.

        Whole is the model itself, called by the loss function on each microbatch in a plain loop; where it
        draws random numbers they are keyed as the pipeline keys them. Print the report for a table. Nothing
        is changed. `progress` is told what begins.

        Raises `ConfigError` for a batch that cannot work, or where the stages live in several processes or on
        several devices: `evenflow check` runs them all in one process, on the CPU.

        >>> from evenflow.pipe.build import pipeline
        >>> batch = {"x": torch.randn(8, 4)}
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> pipe = pipeline(model, loss=lambda model, b: model(b["x"]).mean(), example=batch, stages=2)
        >>> pipe.check(batch).equal
        True
        """
        parts = self._parts
        refuse_uncheckable(parts)
        if batch is None:
            raise ConfigError("there is no batch to check: pass one batch, as to step")
        agreed = self._batches.agree(parts.loss, batch, training=True)
        proven = self._runs.proven(agreed, parts.programs.training)
        return check_step(
            parts,
            self._runs.jobs(agreed),
            agreed.items,
            step=self._step,
            run=lambda jobs: self._runs.execute(jobs, proven, read_loss, step=self._step)[1],
            progress=progress or (lambda _: None),
        )

    def timelines(self) -> tuple[Timeline, Timeline]:
        """(predicted, measured) timeline of the last step, over all ranks; a collective call.

        Predicted: the simulator, fed with each stage's median times of the steps before, in several processes
        with what handing values over took.
        """
        last = self._times.last(self._parts.world)
        return last.predicted, last.measured

    def bills(self) -> tuple[tuple[Bill, ...], tuple[Bill, ...]]:
        """(predicted, measured) bill of the last step, a `Bill` for each rank; a collective call.

        Where the step went: computing, waiting for the schedule, for unequal stages, for transfers, the
        host's own work, the update. The parts add up to the step.
        Raises `ConfigError` before the first step.

        >>> from evenflow.pipe.build import pipeline
        >>> batch, model = torch.randn(8, 4), torch.nn.Linear(4, 1)
        >>> pipe = pipeline(model, loss=lambda model, b: model(b).mean(), example=batch, stages=1)
        >>> _ = pipe.step(batch)
        >>> _, (measured,) = pipe.bills()
        >>> measured.compute > 0
        True
        """
        last = self._times.last(self._parts.world)
        return last.predicted_bills, last.measured_bills

    def last_step(self) -> LastStep:
        """The last step op by op, predicted and measured, with its bills and the cut; a collective call.

        What it holds in memory is there once `meter.peak_bytes` has watched a step like it.
        Raises `ConfigError` before the first step.
        """
        return last_step(self._parts, self._times)

    @property
    def meter(self) -> Meter:
        """What the steps took, on all ranks: seconds of each stage, idle time, memory."""
        return Meter(self._parts, self._times, self._runs, self._logs)

    def close(self) -> None:
        """Wait for what is being saved; leave modules without hooks of ours, and this process unwatched."""
        self._saver.close()
        for stage in self._parts.stages.values():
            stage.streams.unhook()
        if self._parts.mesh.world.whereabouts is not None:
            self._parts.mesh.world.whereabouts.ended.set()

    # -- one step

    def _outcome(
        self, agreed: Agreed, program: ProgramOf, *, share: float, watch: NanWatch | None
    ) -> tuple[StepResult, list[Executor]]:
        """Run a batch, and tell every rank what came of it."""
        executors, results = self._runs.run(
            agreed, program, read_loss, step=self._step, share=share, watch=watch
        )
        proven, jobs = executors[0].proven, executors[0].jobs
        with Watch(self._parts, proven, jobs, {}, step=self._step, what="what follows the ops"):
            return outcome(self._parts, results, agreed, self._batches.graph(agreed)), executors

    def _update(self, executors: Sequence[Executor], result: StepResult, guarded: Guarded) -> None:
        """Let the optimizers step with the gradients that these executors' programs have left, if good."""
        proven, jobs = executors[0].proven, executors[0].jobs
        updater, what = self._parts.updater, "the optimizer's update"
        with Watch(self._parts, proven, jobs, {}, step=self._step, what=what):
            updater.combine(self._accumulated.scale)
            result.grad_norm = updater.norm()
            if not guarded.refuses(result):
                updater.step(result.grad_norm)
                self._updated = True
                self._guard.updated()

    def _drop(self) -> None:
        """Give up the batches since the last update: part of a step's gradients is no gradient."""
        self._parts.updater.clear()
        self._accumulated.clear()
        self._logs.drop()

    def _evaluated(
        self, program: Program, batch: Any, reading: Reading
    ) -> tuple[Agreed, Sequence[Result] | None]:
        """Run a batch forward alone; its results are there on the last stage's process."""
        agreed = self._batches.agree(program, batch, training=False)
        return agreed, self._runs.run(agreed, self._parts.programs.evaluation, reading, step=self._step)[1]

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        modes = [(module, module.training) for module in self._parts.model.modules()]
        self._parts.model.eval()
        try:
            with torch.no_grad(), self._logs.paused():
                yield
        finally:
            for module, training in modes:
                module.training = training
