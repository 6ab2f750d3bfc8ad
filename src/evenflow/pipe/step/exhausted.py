"""Out of memory: one report of where, of what was planned and what was there, and of what would help.

What other ranks hold is not asked for: they are in the middle of a step, and wait.
"""

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import TracebackType

import torch
from torch.utils import _pytree as pytree

from evenflow.cluster.cluster import Cluster, Host
from evenflow.cluster.sizes import told_bytes
from evenflow.cost.cache import device_name
from evenflow.cost.estimate import estimate
from evenflow.cost.local_device import device_found, memory_bytes_of
from evenflow.errors import EvenflowError, OutOfMemoryError
from evenflow.graph.kernels.fakes import storage_of
from evenflow.ir.costs import Link
from evenflow.ir.schedule import Schedule
from evenflow.pipe.step.parts import Parts
from evenflow.plan.chain import Chain
from evenflow.plan.choice import Choice, Degrees
from evenflow.plan.rank_memory import RankMemory, TrainingState
from evenflow.plan.recompute import recomputed
from evenflow.plan.request import Request
from evenflow.plan.search.fit import Fit, at_cuts, groups_of
from evenflow.plan.shortage.remedies import peak_bytes, remedies, step_seconds
from evenflow.runtime.notes.host_memory import resident_bytes
from evenflow.runtime.notes.no_memory import is_out_of_memory
from evenflow.runtime.recorded.weights import rows_of
from evenflow.runtime.stages.executor import Executor, Job
from evenflow.validate import ProvenProgram

_NUM_LARGEST = 5
_NUM_REMEDIES = 3
_SAFE = 0.9  # of what there is, or of what was planned where that was too little: what a remedy may need
_FLOPS_PER_SECOND = 1e12  # of a device that nobody knows: remedies are told relative to what runs


class Watch:
    """While it is entered, an error that tells of no memory becomes the report of it.

    `executors` fills up meanwhile; `what` is done, where that is no op. A watchdog is told of it,
    and whether it `is_new`: its code may have to be compiled.
    """

    def __init__(
        self,
        parts: Parts,
        proven: ProvenProgram,
        jobs: Sequence[Job],
        executors: Mapping[int, Executor],
        *,
        step: int,
        what: str | None = None,
        is_new: bool = False,
    ) -> None:
        self._parts, self._proven, self._jobs = parts, proven, jobs
        self._is_new = is_new
        self._executors, self._step, self._what = executors, step, what

    def __enter__(self) -> None:
        self._whereabouts = self._parts.mesh.world.whereabouts
        if self._whereabouts is not None:
            self._whereabouts.begin(self._step, self._what or "running its ops", is_warming=self._is_new)

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._whereabouts is not None:
            self._whereabouts.end()
        if error is not None and is_out_of_memory(error) and not isinstance(error, EvenflowError):
            traceback.clear_frames(trace)  # what they hold would stay for as long as the error does
            raise OutOfMemoryError("\n".join(self._lines(error))) from error

    def _place(self) -> tuple[int, str]:
        """The rank that ran out, and what it was doing: the first of its ops that has no marks yet."""
        alone = self._parts.world.size == 1
        done = {rank: len(each.log.marks) for rank, each in self._executors.items()}
        order = self._proven.order
        rank = self._parts.world.rank
        if alone:
            rank = order[min(sum(done.values()), len(order) - 1)][0]
        if self._what is not None:
            return rank, self._what
        lines = self._executors[rank].script.lines if rank in done else ()
        return rank, str(lines[done[rank]].op) if len(lines) > done.get(rank, 0) else "its transfers"

    def _lines(self, error: BaseException) -> list[str]:
        parts, executors = self._parts, self._executors
        rank, where = self._place()
        stages = self._proven.program.schedule.placement.stages_on(rank)
        device = parts.devices[stages[0]]
        of_rank = f"rank {rank} ({device}, {told_bytes(_limit_bytes(device))})"
        of_stages = f"stage{'s' * (len(stages) > 1)} {', '.join(map(str, stages))}"
        said = (str(error).splitlines() or [type(error).__name__])[0]
        lines = [f"out of memory on {of_rank}, {of_stages}, in {where} of step {self._step}: {said}"]
        flying = Counter(stage for each in executors.values() for stage, _ in each.in_flight)
        # Whatever goes wrong here must not hide the error itself.
        with contextlib.suppress(Exception):
            measured = _measured(parts, executors, device)
            for each in executors.values():  # the report needs some memory, too
                each.drop()
            if self._proven.program.schedule.trains:
                estimated = _Estimate(parts, self._jobs, self._proven.program.schedule, device)
                lines += [*_table(estimated.planned(rank), measured), *estimated.largest(flying)]
                lines += estimated.remedies()
        return lines


@dataclass(frozen=True, slots=True)
class _Measured:
    """Bytes by category, as in `RankMemory`, of what is known; all that the device (or process) has."""

    known: Mapping[str, float]
    now: float | None  # None where nobody tells
    most: float | None


def _measured(parts: Parts, executors: Mapping[int, Executor], device: torch.device) -> _Measured:
    parameters = [parameter for _, parameter in parts.updater.parameters]
    parameters += parts.updater.accumulators.copies()
    known = {
        "parameters": _bytes_of(parameters),
        "gradients": _bytes_of(p.grad for p in parameters if p.grad is not None),
        "optimizer": _optimizer_bytes(parts),
        "boundary": _bytes_of(parcel for each in executors.values() for parcel in each.parcels()),
    }
    if device.type == "cuda":
        memory = torch.cuda.memory_stats(device)
        names = "allocated_bytes.all.current", "allocated_bytes.all.peak"
        return _Measured(known, *(float(memory[name]) for name in names))
    return _Measured(known, resident_bytes("now"), resident_bytes("most"))


def _optimizer_bytes(parts: Parts) -> float:
    states = [list(each.state.values()) for each in parts.updater.optimizers.values()]
    return _bytes_of(pytree.tree_leaves(states))


def _bytes_of(things: Iterable[object]) -> float:
    """Bytes of the tensors among them that have memory; what several have is counted once."""
    tensors = [thing for thing in things if isinstance(thing, torch.Tensor) and not thing.is_meta]
    given = [t for t in tensors if t.layout is torch.sparse_coo]
    sparse = [part for t in given for part in (t._indices(), t._values())]  # noqa: SLF001 (as they are)
    dense = [t for t in (*tensors, *sparse) if t.layout is torch.strided]
    return float(sum({storage_of(t): t.untyped_storage().nbytes() for t in dense}.values()))


def _limit_bytes(device: torch.device) -> float:
    limit = memory_bytes_of(device)
    with contextlib.suppress(ImportError):
        import resource  # (not everywhere)

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if device.type == "cpu" and soft != resource.RLIM_INFINITY:
            limit = min(limit, float(soft))
    return limit


class _Estimate:
    """The run as planning sees it: estimated from its recording, on devices like this rank's."""

    def __init__(self, parts: Parts, jobs: Sequence[Job], schedule: Schedule, device: torch.device) -> None:
        self._device, self._plan, cut = device, parts.plan, jobs[0].cut
        # All ranks in one process on one device, where they take turns.
        self._is_shared = parts.world.size == 1 and len(set(parts.devices)) == 1
        rows = rows_of(list(jobs[0].batch.values())) or 1
        kind = device_found(device_name(device), memory_bytes_of(device), _FLOPS_PER_SECOND)
        if parts.world.device.type == "cpu":  # as a single process's is: nothing travels over NCCL
            kind = replace(kind, communicator_bytes=0.0)
        rate = next(iter(kind.flops_per_second))  # times are told as shares alone
        chain = estimate(cut.graph, parts.model, [kind], num_rows=rows, dtype=rate)
        again = parts.recordings.entries[jobs[0].recording].again.nodes
        if again:  # nothing more is to be gained there
            chain = recomputed(chain, [at for at, n in enumerate(cut.graph.chain) if n.index in again])
            chain = replace(chain, recomputable=(False,) * chain.num_nodes)
        self.chain: Chain = chain
        self._offloads = any(stage.offload is not None for stage in parts.stages.values())
        num_ranks = schedule.placement.num_ranks
        self.request = Request(
            lambda _: self.chain,
            (rows,),
            Cluster((Host((kind,) * num_ranks, Link()),)),
            batch_rows=rows * len(jobs),
            row_tokens=1.0,
            max_leaf_share=1.0,
            state=_state(parts),
        )
        on_each = schedule.placement.num_stages // num_ranks
        self.choice = Choice(Degrees(num_ranks), on_each, schedule.name, rows, len(jobs), "none")
        groups = groups_of(self.request.cluster, self.choice.degrees)
        self.now: Fit = at_cuts(
            *(self.request, self.choice, self.chain, cut.positions, groups),
            schedule=schedule,
            offloads=self._offloads,
        )

    def planned(self, rank: int) -> RankMemory:
        """What the plan says that a rank needs, or all that share its memory; the estimate without a plan."""
        memory = self.now.memory if self._plan is None else [each.memory for each in self._plan.ranks]
        own = memory if self._is_shared else [memory[rank]]
        return RankMemory(*(sum(getattr(each, field.name) for each in own) for field in fields(RankMemory)))

    def remedies(self) -> Iterator[str]:
        """What would help, in words."""
        alone = self._is_shared
        most, seconds = peak_bytes(self.now, alone=alone), step_seconds(self.now, alone=alone)
        room = _SAFE * min(_limit_bytes(self._device), most)
        beside = self._device.type == "cuda" and not self._offloads
        found = remedies(self.request, self.choice, self.now, room, alone=alone, offloads=beside)
        if found:
            who = "all ranks together need" if alone else "the fullest rank needs"
            yield f"what would help, estimated; now {who} {told_bytes(most)}:"
        for each in found[:_NUM_REMEDIES]:
            yield (
                f"  {each.what}: {told_bytes(each.peak_bytes)}, and a step takes "
                f"{each.step_seconds / seconds:.2f} times as long"
            )

    def largest(self, flying: Mapping[int, int]) -> Iterator[str]:
        """The largest things that autograd holds; `flying` says how many microbatches each stage has."""
        held = []
        for stage, number in flying.items():
            own = self.now.stages[stage]
            for each in self.chain.saved:
                nodes = [node for node in each.nodes if own.start <= node < own.end]
                if nodes:
                    held.append((number * each.num_bytes, number, each.num_bytes, nodes[0]))
        if held:
            yield "the largest that is held for backwards, estimated:"
        for total, number, size, node in sorted(held, reverse=True)[:_NUM_LARGEST]:
            times = f"{number} microbatch{'es' * (number > 1)} x {told_bytes(size)}"
            yield f"  {told_bytes(total):>12}  {self.chain.names[node]} ({times})"


def _state(parts: Parts) -> TrainingState:
    """What the optimizers keep for each element; before their first step, what Adam would."""
    elements = sum(p.numel() for _, p in parts.updater.parameters if p.requires_grad)
    kept = _optimizer_bytes(parts)
    if not parts.updater.optimizers:
        return TrainingState(optimizer_bytes=0.0, update_bytes=0.0)
    return TrainingState(optimizer_bytes=kept / elements) if kept and elements else TrainingState()


def _table(planned: RankMemory, measured: _Measured) -> Iterator[str]:
    yield f"{'':16}{'planned':>12}{'measured':>12}"
    for each in fields(planned):
        size = measured.known.get(each.name)
        if size is not None or getattr(planned, each.name):
            found = "" if size is None else told_bytes(size)
            yield f"{each.name:16}{told_bytes(getattr(planned, each.name)):>12}{found:>12}"
    together = f"{'together':16}{told_bytes(planned.allocated):>12}"
    if measured.now is None or measured.most is None:
        yield together
        return
    rest = max(0.0, measured.now - sum(measured.known.values()))
    yield f"{'all the rest':16}{'':12}{told_bytes(rest):>12}  (activations among it)"
    yield f"{together}{told_bytes(measured.now):>12}  (at most {told_bytes(measured.most)})"
