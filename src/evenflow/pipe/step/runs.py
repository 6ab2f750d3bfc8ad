"""Runs: a batch's microbatches through a program, on this process's ranks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from evenflow.ir.flow import Flow
from evenflow.ir.op import ReduceGrads
from evenflow.pipe.step.agree import Agreed
from evenflow.pipe.step.exhausted import Watch
from evenflow.pipe.step.parts import Parts
from evenflow.runtime.links.link import Manifest
from evenflow.runtime.notes.script import Script, script
from evenflow.runtime.program.rng import generators_restored
from evenflow.runtime.stages.executor import Executor, Job, Reading, Result
from evenflow.runtime.stages.nan_watch import NanWatch
from evenflow.validate import ProvenProgram

# Makes the program of so many microbatches.
ProgramOf = Callable[[int, Flow], ProvenProgram]


class Runs:
    """See the module."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._scripts: dict[int, tuple[ProvenProgram, Mapping[int, Script]]] = {}  # by the program's id
        self._orders: dict[int, tuple[ProvenProgram, Sequence[int]]] = {}  # of sums, as above
        self._manifests: dict[tuple[Any, ...], Manifest] = {}
        self._ran: set[tuple[int, int]] = set()  # programs, by their ids, with the recordings that they ran
        self.gauge: Callable[[], int] | None = None  # of memory, asked after each op

    def run(
        self,
        agreed: Agreed,
        program: ProgramOf,
        reading: Reading,
        *,
        step: int,
        share: float = 1.0,
        watch: NanWatch | None = None,
    ) -> tuple[list[Executor], list[Result] | None]:
        """Run it; its results, where the last stage lives here. `share` is a factor of every loss."""
        jobs = self.jobs(agreed, share=share)
        jobs = jobs if watch is None else watch.jobs(jobs)
        try:
            if self._parts.mesh.data.size > 1:
                self._expect(agreed, program)
            if not jobs:  # fewer microbatches than data ranks
                has_last = len(self._parts.devices) - 1 in self._parts.stages
                return [], [] if has_last else None
            return self.execute(jobs, self.proven(agreed, program), reading, step=step)
        finally:
            self._parts.updater.data.release()

    def jobs(self, agreed: Agreed, *, share: float = 1.0) -> list[Job]:
        """This process's microbatches."""
        numbers = self._parts.mesh.share(len(agreed.recordings))
        entries = [self._parts.recordings.entries[agreed.recordings[at]] for at in numbers]
        return [
            Job(
                agreed.batches[at],
                agreed.recordings[at],
                entry.cut,
                entry.works,
                agreed.shares.losses[at] * share,
                at,
            )
            for at, entry in zip(numbers, entries, strict=True)
        ]

    def proven(self, agreed: Agreed, program: ProgramOf) -> ProvenProgram:
        """The program of this process's microbatches."""
        return program(len(self._parts.mesh.share(len(agreed.recordings))), self._flow(agreed))

    def _expect(self, agreed: Agreed, program: ProgramOf) -> None:
        """Tell the data ranks what comes: they sum stages in the order of those with most microbatches."""
        parts = self._parts
        longest = program(parts.mesh.longest_share(len(agreed.recordings)), self._flow(agreed))
        if id(longest) not in self._orders:
            own = [op.stage for _, op in longest.order if isinstance(op, ReduceGrads)]
            self._orders[id(longest)] = longest, [stage for stage in own if stage in parts.stages]
        parts.updater.data.expect(self._orders[id(longest)][1])

    def _flow(self, agreed: Agreed) -> Flow:
        """That of all microbatches: data ranks run the same program, but for its length."""
        entries = self._parts.recordings.entries
        return Flow.union(entries[number].cut.flow for number in set(agreed.recordings))

    def execute(
        self, jobs: Sequence[Job], proven: ProvenProgram, reading: Reading, *, step: int
    ) -> tuple[list[Executor], list[Result] | None]:
        """Run a program on this process's ranks; its results, where the last stage lives here."""
        parts = self._parts
        placement = parts.programs.placement
        alone = parts.world.size == 1
        ranks = range(placement.num_ranks) if alone else (parts.world.rank,)
        kinds = {(id(proven), job.recording) for job in jobs}
        is_new = not kinds <= self._ran
        scripts = self._scripts_of(proven, ranks)
        draws = any(work.draws for job in jobs for work in job.works.values())
        executors: dict[int, Executor] = {}
        with (
            generators_restored(stage.device for stage in parts.stages.values() if draws),
            Watch(parts, proven, jobs, executors, step=step, is_new=is_new),
        ):
            for rank in ranks:
                executors[rank] = Executor(
                    proven,
                    rank,
                    script=scripts[rank],
                    stages={stage: parts.stages[stage] for stage in placement.stages_on(rank)},
                    devices=parts.devices,
                    jobs=jobs,
                    link=parts.link,
                    step=step,
                    reading=reading,
                    manifests=self._manifests,
                    narrowing=parts.narrowing,
                    data=parts.updater.data,
                )
                executors[rank].log.gauge = self.gauge
            if alone:
                for rank, _ in proven.order:
                    executors[rank].run_next()
                for executor in executors.values():
                    executor.finish()
            else:
                executor = executors[parts.world.rank]
                self._tell_watchdog(executor, step)
                executor.run()
            for executor in executors.values():
                executor.log.gauge = None  # the log is kept, and what it asked need not be
        self._ran |= kinds
        last = executors.get(placement.rank_of[-1])
        results = None if last is None else [last.results[at] for at in range(len(jobs))]
        return list(executors.values()), results

    def _tell_watchdog(self, executor: Executor, step: int) -> None:
        """Let others know where the executor is."""
        parts = self._parts
        if parts.mesh.world.whereabouts is not None:
            holders = [parts.world.members[rank] for rank in parts.programs.placement.rank_of]
            parts.mesh.world.whereabouts.follow(executor.log, step, holders)

    def _scripts_of(self, proven: ProvenProgram, ranks: Iterable[int]) -> Mapping[int, Script]:
        """The scripts of these ranks, made once for each program; alone, ranks take turns as in its proof."""
        if id(proven) not in self._scripts:
            alone = self._parts.world.size == 1
            ops = {
                rank: [op for at, op in proven.order if at == rank] if alone else proven.program.ranks[rank]
                for rank in ranks
            }
            self._scripts[id(proven)] = proven, {rank: script(own) for rank, own in ops.items()}
        return self._scripts[id(proven)][1]
