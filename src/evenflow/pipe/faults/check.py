"""Checking a split: one step of it against one step of the untouched model, number by number.

Both runs start from the same state and change nothing that lasts. Gradients, buffers, losses and outputs are
compared. Where something differs, both runs are repeated: the split one tells what every node made, the whole
one is recorded with the parameters' own numbers, and the first node in program order whose values differ is
named. That holds all activations of all microbatches, twice.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from evenflow.errors import ConfigError, EvenflowError
from evenflow.graph.nouns.graph import Graph, Node
from evenflow.graph.nouns.template import is_plain
from evenflow.pipe.faults.check_report import CheckReport, Compared, FirstGradient, FirstNode
from evenflow.pipe.faults.compare import INFINITE, compared, leaves_compared
from evenflow.pipe.faults.snapshot import Snapshot
from evenflow.pipe.faults.whole import Outcome, PlainLoop, run_on_one_stage
from evenflow.pipe.parameters.update import Updater
from evenflow.pipe.step.parts import Parts
from evenflow.runtime.recorded.microbatch import tensors
from evenflow.runtime.recorded.parameters import Accumulators, stages_of_parameters
from evenflow.runtime.stages.executor import Job, Result
from evenflow.runtime.stages.stage import Stage

# Gradients of shared parameters add up in another order, so that their last bits differ.
SHARED_TOLERANCE = 1e-6

_Run = Callable[[Sequence[Job]], Sequence[Result] | None]


def refuse_uncheckable(parts: Parts) -> None:
    """Refuse what cannot be compared with the whole model in one process, on one device."""
    remedy = "run `evenflow check MODULE:FUNCTION`, which needs one process and the CPU alone"
    if parts.mesh.world.size > 1:
        raise ConfigError(
            f"check runs the whole model in one process; here are {parts.mesh.world.size}: {remedy}"
        )
    if len(set(parts.devices)) > 1:
        raise ConfigError(f"check runs the whole model on one device; here are several: {remedy}")
    if parts.recordings.compiles or parts.narrowing.dtype is not None:
        raise ConfigError(
            "check compares with the model itself, which compiles nothing and rounds nothing between "
            "stages: leave compile= and boundary_dtype= out"
        )


def check_step(
    parts: Parts,
    jobs: Sequence[Job],
    items: Sequence[Any],
    *,
    step: int,
    run: _Run,
    progress: Callable[[str], None],
) -> CheckReport:
    """Compare a step of the pipeline with one of its whole model. `run` executes jobs; `items` are theirs."""
    return _Check(parts, jobs, items, step, run, progress).report()


class _Check:
    """One comparison. Everything is as it was before once `report` has returned, or raised."""

    def __init__(
        self,
        parts: Parts,
        jobs: Sequence[Job],
        items: Sequence[Any],
        step: int,
        run: _Run,
        progress: Callable[[str], None],
    ) -> None:
        self.parts, self.jobs, self.items, self.step = parts, jobs, items, step
        self.run, self.progress = run, progress
        self.first = next(iter(parts.stages.values()))
        draws = any(work.draws for job in jobs for work in job.works.values())
        streams = self.first.streams.another() if draws else None
        self.plain = PlainLoop(parts.loss, parts.model, self.first.device, streams, step)
        accumulators = parts.updater.accumulators
        aliases = [alias for name in accumulators.uses for _, alias in accumulators.aliases(name)]
        batch = {id(tensor): tensor for item in items for tensor in tensors(item)}
        self.before = Snapshot(
            parts.model,
            [*parts.model.parameters(), *aliases],
            batch=batch.values(),
            devices=[self.first.device],
        )
        self.names = _names_of_objects(parts.model, parts.recordings.first_names)
        twofold = {name for name, objects in self.names.items() if len(objects) > 1}
        self.shared = twofold | accumulators.uses.keys()

    def report(self) -> CheckReport:
        try:
            split, whole = self._split(), self._whole()
            rows = list(self._rows(split, whole))
            reference = "the untouched model in a plain loop"
            if self.plain.streams is not None:
                reference += ", its draws keyed alike"
            if self.parts.recordings.exact and self.shared:
                rows.extend(self._rows_of_one_stage(split))
                reference += ", and shared parameters against one stage"
            found = CheckReport(reference, len(self.parts.devices), len(self.jobs), tuple(rows))
            return found if found.equal else self._located(found)
        finally:
            self.before.put_back()

    # -- the runs

    def _split(self) -> Outcome:
        self.progress("one step, split")
        self.before.clear_gradients()
        results = self.run(self.jobs)
        assert results is not None, "the last stage lives in this process"
        self.parts.updater.combine(None)
        return self._outcome(results, lambda name: self._owned[name].grad)

    def _whole(self) -> Outcome:
        self.progress("one step, whole")
        results = self.plain.run(self.items, [job.weight for job in self.jobs])
        return self._outcome(results, lambda name: _sum([one.grad for one in self.names[name]]))

    def _outcome(self, results: Sequence[Result], gradient: Callable[[str], torch.Tensor | None]) -> Outcome:
        """What a run made; then all is as before, for the next."""
        gradients = {name: gradient(name) for name, p in self._owned.items() if p.requires_grad}
        buffers = {name: buffer.detach().clone() for name, buffer in self.parts.model.named_buffers()}
        self.before.put_back()
        self.before.clear_gradients()
        return Outcome(results, gradients, buffers)

    @property
    def _owned(self) -> Mapping[str, torch.nn.Parameter]:
        return dict(self.parts.updater.parameters)

    # -- the comparison

    def _rows(self, split: Outcome, whole: Outcome) -> Iterator[Compared]:
        losses = [compared(a.loss, b.loss) for a, b in zip(split.results, whole.results, strict=True)]
        share, note = _worst(losses)
        yield Compared("loss", "loss", None, share, note=note)
        outputs: dict[str, list[tuple[float, str]]] = {}
        for mine, theirs in zip(split.results, whole.results, strict=True):
            for path, share, note in leaves_compared(mine.rest, theirs.rest):
                outputs.setdefault(path, []).append((share, note))
        if any(result.rest is not None for result in (*split.results, *whole.results)):
            for path, all_found in outputs.items():
                share, note = _worst(all_found)
                yield Compared("output", path, None, share, note=note)
        for name, gradient in whole.gradients.items():
            share, note = compared(split.gradients[name], gradient)
            yield Compared("gradient", name, self._owner(name), share, self._allowed(name), note)
        for name in dict.fromkeys((*whole.buffers, *split.buffers)):
            share, note = compared(split.buffers.get(name), whole.buffers.get(name))
            yield Compared("buffer", name, None, share, note=note)

    def _allowed(self, name: str) -> float:
        """How far a parameter's gradient may be from the whole model's, as a share of its largest number.

        Under autocast the whole model adds a shared one's up in the smaller type, in each microbatch.
        """
        if name not in self.shared:
            return 0.0
        nodes = (node for job in self.jobs for node in job.cut.graph.nodes if name in node.parameters)
        modes = {mode for node in nodes for _, mode in node.autocast}
        types = {self._owned[name].dtype, *(mode for mode in modes if isinstance(mode, torch.dtype))}
        small = [torch.finfo(dtype).eps for dtype in types if dtype.itemsize < 4]
        return max([SHARED_TOLERANCE, *(len(self.jobs) * eps for eps in small)])

    def _rows_of_one_stage(self, split: Outcome) -> Iterator[Compared]:
        """With `exact` a shared parameter has the same bits at every cut: those of one stage."""
        self.progress("one step, on one stage")
        device = self.first.device
        stage = Stage(0, device, self.first.streams.another(), self.first.buffers_at)
        accumulators = Accumulators(dict(self._owned), (device,), exact=True)
        recordings = self.parts.recordings
        try:
            works = {
                number: recordings.uncut(number, stage, accumulators)
                for number in {job.recording for job in self.jobs}
            }
            run_on_one_stage(stage, self.jobs, works.__getitem__, self.step)
            updater = Updater(
                self.parts.world,
                accumulators,
                {0: self._owned},
                process_of_stage=lambda _: 0,
                optimizer=None,
                scheduler=None,
            )
            updater.combine(None)
            whole = self._outcome((), lambda name: self._owned[name].grad)
        finally:
            stage.streams.unhook()
        for name in sorted(self.shared & whole.gradients.keys()):
            share, note = compared(split.gradients[name], whole.gradients[name])
            yield Compared("gradient (one stage)", name, self._owner(name), share, note=note)

    def _owner(self, name: str) -> int:
        return next(stage for stage, held in self.parts.updater.owned.items() if name in held)

    # -- where a difference begins

    def _located(self, found: CheckReport) -> CheckReport:
        self.progress("looking for the first node that differs")
        gradient = self._first_gradient(found)
        try:
            node = self._first_node()
        except EvenflowError as error:  # it did what it did not do when it was recorded
            remark = f"no node can be named, because the model cannot be recorded any more: {error}"
            return replace(found, first_gradient=gradient, remark=remark)
        numbers = [row for row in found.rows if not row.fits and row.kind in ("loss", "output")]
        if node is not None:
            remark = ""
        elif numbers:
            remark = (
                "run again, every node made the same: what differs does not come from a node, or not every "
                "time (does the loss function use the time, or a counter of its own?)"
            )
        else:
            remark = (
                "forward, every node made the same: the difference arises in the backward, or in a buffer"
            )
        return replace(found, first_node=node, first_gradient=gradient, remark=remark)

    def _first_gradient(self, found: CheckReport) -> FirstGradient | None:
        """Backward order is program order from behind, by the last node that uses a parameter."""
        cut = self.jobs[0].cut
        last = {name: node for node in cut.graph.nodes for name in node.parameters}
        wrong = [row for row in found.rows if row.kind.startswith("gradient") and not row.fits]
        wrong = [row for row in wrong if row.name in last]
        if not wrong:
            return None
        row = max(wrong, key=lambda row: last[row.name].index)
        stage = stages_of_parameters(cut)[row.name][-1]
        return FirstGradient(row.name, last[row.name].name, stage, row.difference, row.note)

    def _first_node(self) -> FirstNode | None:
        made = self._made_by_nodes()
        for number, (job, item) in enumerate(zip(self.jobs, self.items, strict=True)):
            before = Snapshot(self.parts.model, [], batch=tensors(item), devices=[self.first.device])
            with self.plain.keyed(number):
                graph, values = self.parts.recordings.tracing.observe(self.parts.loss, item)
            before.put_back()
            twin = _Twin(job.cut.graph, graph, values)
            found = twin.first_difference({key[1:]: made[key] for key in made if key[0] == number})
            if found is not None:
                return FirstNode(found.node, found.stage, number, found.difference, found.note)
            self.plain.forward(item, number)  # for what it leaves to the next microbatch
        return None

    def _made_by_nodes(self) -> dict[tuple[int, int, int], dict[int, Any]]:
        """What each node made in the split run, by (microbatch, node, stage): value number to value."""
        made: dict[tuple[int, int, int], dict[int, Any]] = {}

        def note(microbatch: int, stage: int, node: Node, values: Mapping[int, Any]) -> None:
            kept = {v: values[v] for v in node.makes if isinstance(values.get(v), torch.Tensor)}
            made[microbatch, node.index, stage] = {v: t.detach().clone() for v, t in kept.items()}

        watched = [
            replace(job, works={s: work.watched(partial(note, number, s)) for s, work in job.works.items()})
            for number, job in enumerate(self.jobs)
        ]
        self.run(watched)
        self.before.put_back()
        self.before.clear_gradients()
        return made


@dataclass(frozen=True, slots=True)
class _Found:
    node: str
    stage: int
    difference: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class _Twin:
    """A recording, and one of the same program with the parameters' own numbers, whose `values` are known."""

    recorded: Graph
    observed: Graph
    values: Mapping[int, torch.Tensor]

    def first_difference(self, made: Mapping[tuple[int, int], Mapping[int, Any]]) -> _Found | None:
        """The first node that made something else. `made`: (node, stage) to value number to value."""
        stages: dict[int, list[int]] = {}
        for index, stage in sorted(made):
            stages.setdefault(index, []).append(stage)
        for node, other in zip(self.recorded.nodes, self.observed.nodes, strict=False):
            homes = stages.get(node.index, [])
            if node.name != other.name:
                stage = homes[0] if homes else 0
                return _Found(node.name, stage, INFINITE, f"the whole model ran {other.name} in its place")
            for stage in homes:
                found = self._of_node(node, other, made[node.index, stage])
                if found[0] > 0:
                    return _Found(node.name, stage, found[0], found[1])
        return None

    def _of_node(self, node: Node, other: Node, made: Mapping[int, Any]) -> tuple[float, str]:
        pairs = [
            (made[v], self.values[w]) for v, w in zip(node.makes, other.makes, strict=False) if v in made
        ]
        share, note = _worst([compared(mine, theirs) for mine, theirs in pairs])
        if share == 0:
            return 0.0, ""
        leaves = zip(node.args.leaves, other.args.leaves, strict=False)
        for was, now in leaves:
            if is_plain(was) and is_plain(now) and repr(was) != repr(now):
                text = f"it was recorded with {was!r} and is called with {now!r} now"
                return share, f"{share:.1e} of its largest number: {text}"
        return share, note


def _worst(found: Sequence[tuple[float, str]]) -> tuple[float, str]:
    return max(found, key=lambda each: each[0], default=(0.0, ""))


def _sum(gradients: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """The gradient of a parameter that the model holds as several objects over the same memory."""
    found = [gradient for gradient in gradients if gradient is not None]
    if len(found) < 2:
        return found[0] if found else None
    return torch.stack(found).sum(0)


def _names_of_objects(
    model: torch.nn.Module, first_names: Mapping[str, str]
) -> dict[str, list[torch.nn.Parameter]]:
    """The parameter objects behind each first name: several where they share memory without being one."""
    found: dict[str, dict[int, torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in first_names:
            found.setdefault(first_names[name], {})[id(parameter)] = parameter
    return {name: list(objects.values()) for name, objects in found.items()}
