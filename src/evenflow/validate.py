"""Validate: prove that a program is right and cannot deadlock, or say everything that is wrong with it.

The proof is an execution on the weakest machine that we can think of: one serial queue per rank for computes
and transfers together, no buffers (a send ends only when its receive takes place), and matching by order and
not by tag. What lives there lives everywhere: buffers, tags and further channels only let ops happen earlier.
NCCL's `ncclSend` and `ncclRecv` promise no more: they have no tags, and each is "blocking for the GPU" (NCCL
User Guide, "Point To Point Communication Functions").

`prove` shares no code with `lower` but the rules and the checks of completeness: a fault of one is not hidden
by the same fault of the other.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass
from itertools import zip_longest
from typing import assert_never

from evenflow.ir.costs import Costs
from evenflow.ir.flow import Flow
from evenflow.ir.op import (
    CollectiveOp,
    ComputeOp,
    Exchange,
    Forward,
    Handoff,
    InputGrad,
    Op,
    Recv,
    ReduceGrads,
    Send,
    TransferOp,
    Unshard,
    parts,
)
from evenflow.ir.program import Program
from evenflow.ir.schedule import Schedule
from evenflow.memory import memory_faults
from evenflow.rules import Result, carriers, dependencies, reduced, results
from evenflow.soundness import flow_faults, refusal, schedule_faults

_MADE_BY_PROVE = object()


@dataclass(frozen=True, slots=True)
class ProvenProgram:
    """A program that `prove` has passed; nothing else can make one, and the executor takes nothing else.

    `order` is the witness: the `(rank, op)` steps of all ranks in the order in which the weakest machine
    performed them. A `Send` and its `Recv` are neighbours in it, the send first; an `Exchange` stands there
    as its single transfers. Raises `TypeError` where anybody else makes one.

    >>> from evenflow.ir.flow import Flow
    >>> from evenflow.lower import lower
    >>> from evenflow.schedules.gpipe import gpipe
    >>> proven = prove(lower(gpipe(num_ranks=2, stages_per_rank=1, num_microbatches=1), Flow.chain(2)))
    >>> print(*(f"{rank}:{op}" for rank, op in proven.order))
    0:0F0 0:S0>1F0 1:R0>1F0 1:1F0 1:1B0 1:S1>0B0 0:R1>0B0 0:0B0
    """

    program: Program
    order: tuple[tuple[int, Op], ...]
    made_by: InitVar[object]

    def __post_init__(self, made_by: object) -> None:
        if made_by is not _MADE_BY_PROVE:
            raise TypeError("a ProvenProgram is made by evenflow.validate.prove(program), which checks it")


def prove(program: Program, costs: Costs | None = None) -> ProvenProgram:
    """Return the program with the proof that it can run, or raise `ScheduleError` listing all its faults.

    Checked: the compute ops are the schedule's, complete, once each and on their ranks; each dependency is
    met, by a transfer that stands once on each side, behind the producer and before the consumer; there is no
    other transfer; no rank holds more than its cap, where `costs` are given and have caps; and the weakest
    machine comes to the end. That last check is made once the others pass, because with an op too few or too
    many the machine stands still for that reason alone.

    >>> from evenflow.ir.flow import Flow
    >>> from evenflow.lower import lower
    >>> from evenflow.schedules.gpipe import gpipe
    >>> program = lower(gpipe(num_ranks=2, stages_per_rank=1, num_microbatches=1), Flow.chain(2))
    >>> prove(Program(program.schedule, program.flow, (program.ranks[0][1:], program.ranks[1])))
    Traceback (most recent call last):
      ...
    evenflow.errors.ScheduleError: schedule 'gpipe' has 1 fault:
      - 0F0 is missing: rank 0 must run it
    in the queues:
      rank 0: S0>1F0 R1>0B0 0B0
      rank 1: R0>1F0 1F0 1B0 S1>0B0
    """
    schedule = program.schedule
    computes = [[op for op in queue if isinstance(op, ComputeOp)] for queue in program.ranks]
    faults = schedule_faults(schedule, program.flow, computes)
    if not faults:
        faults += _reordered(schedule, computes)
    if not flow_faults(program.flow, schedule.placement.num_stages):
        faults += _order_faults(program)
    if costs is not None:
        faults += memory_faults(schedule, costs)
    if faults:
        raise refusal(schedule.name, faults, program.ranks, [0] * len(program.ranks))
    machine = _WeakestMachine(program)
    machine.run()
    if machine.faults:
        starts = [max(0, head - 3) for head in machine.heads]
        raise refusal(schedule.name, machine.faults, program.ranks, starts)
    return ProvenProgram(program, tuple(machine.order), made_by=_MADE_BY_PROVE)


def _reordered(schedule: Schedule, computes: Sequence[Sequence[ComputeOp]]) -> Iterator[str]:
    for rank, (queue, wanted) in enumerate(zip_longest(computes, schedule.ranks, fillvalue=())):
        for position, (op, other) in enumerate(zip_longest(queue, wanted)):
            if op != other:
                found, said = op or "nothing", other or "nothing"
                yield f"rank {rank} runs {found} as its compute op {position}, its schedule says {said}"
                break


class _Places:
    """Where each result is made and each transfer stands: a rank's places, and the op that stands there."""

    def __init__(self, ranks: Sequence[Sequence[Op]]) -> None:
        self.ranks = ranks
        self.of: dict[tuple[int, Result | TransferOp | CollectiveOp], list[int]] = {}
        for rank, queue in enumerate(ranks):
            for place, op in enumerate(queue):
                for piece in _pieces(op):
                    self.of.setdefault((rank, piece), []).append(place)

    def wrong_order(
        self, rank: int, place: int, needed: Result | TransferOp | CollectiveOp, name: str | None = None
    ) -> Iterator[str]:
        """Yield a fault if an op stands before what it needs; what is missing or doubled is told elsewhere.

        The op that stands at `place` is called by `name`, or by its own.
        """
        other = self.of.get((rank, needed), [])
        if len(other) == 1 and place < other[0]:
            queue = self.ranks[rank]
            yield f"{name or queue[place]} stands before {queue[other[0]]} on rank {rank}, and needs it"


def _pieces(op: Op) -> tuple[Result | TransferOp | CollectiveOp, ...]:
    if isinstance(op, ComputeOp):
        return results(op)
    return op.transfers if isinstance(op, Exchange) else (op,)


def _order_faults(program: Program) -> Iterator[str]:
    """Yield what is wrong with the transfers and reductions, and with the order of the ops of one rank."""
    schedule, places = program.schedule, _Places(program.ranks)
    rank_of = schedule.placement.rank_of
    for rank, queue in enumerate(program.ranks):
        for place, op in enumerate(queue):
            if isinstance(op, ComputeOp):
                for part in parts(op):
                    if not 0 <= part.stage < len(rank_of):
                        continue  # told elsewhere
                    yield from places.wrong_order(rank, place, Unshard(part.stage))
                    for result in dependencies(part, program.flow):
                        # The last of what brings the result; it stands on the consumer's rank.
                        carrier = carriers(result, part.stage, schedule.placement)
                        yield from places.wrong_order(rank, place, carrier[-1] if carrier else result)
            elif isinstance(op, ReduceGrads):
                for result in reduced(op, schedule.num_microbatches):
                    yield from places.wrong_order(rank, place, result)
    wanted: set[tuple[int, TransferOp]] = set()
    for result, target in _edges(schedule, program.flow):
        source_rank, target_rank = rank_of[result.stage], rank_of[target]
        match carriers(result, target, schedule.placement):
            case ():
                raise AssertionError(f"{result} needs no transfer to stage {target}")
            case (leaving,):
                wanted.add((source_rank, leaving))
            case (leaving, recv):
                wanted |= {(source_rank, leaving), (target_rank, recv)}
            case never:
                assert_never(never)
        for place in places.of.get((source_rank, leaving), []):
            yield from places.wrong_order(source_rank, place, result, str(leaving))
    yield from _miscounted(places, wanted)
    yield from _misreduced(places, schedule)


def _edges(schedule: Schedule, flow: Flow) -> Iterator[tuple[Result, int]]:
    """Every result that must go to another stage, with that stage."""
    for stage in range(schedule.placement.num_stages):
        for microbatch in range(schedule.num_microbatches):
            ends = (Forward(stage, microbatch), InputGrad(stage, microbatch))
            for op in ends if schedule.trains else ends[:1]:
                for result in dependencies(op, flow):
                    if result.stage != stage:
                        yield result, stage


def _miscounted(places: _Places, wanted: set[tuple[int, TransferOp]]) -> Iterator[str]:
    for rank, op in sorted(wanted, key=str):
        if (rank, op) not in places.of:
            consumer = f"{op.target}{op.payload.value}{op.microbatch}"
            yield f"{op} is missing on rank {rank}: {consumer} needs it"
    for (rank, placed), found in places.of.items():
        if isinstance(placed, TransferOp):
            if (rank, placed) not in wanted:
                yield f"{placed} on rank {rank} is asked for by no edge of the flow: leave it out"
            elif len(found) > 1:
                yield f"{placed} stands {len(found)} times on rank {rank}: run it once"


def _misreduced(places: _Places, schedule: Schedule) -> Iterator[str]:
    """Of what data ranks do together each stands for every stage or for none, once, on the stage's rank."""
    rank_of = schedule.placement.rank_of
    for (rank, op), at in places.of.items():
        if not isinstance(op, CollectiveOp):
            continue
        if not 0 <= op.stage < len(rank_of):
            yield f"{op} on rank {rank}: there are only stages 0..{len(rank_of) - 1}"
        elif rank_of[op.stage] != rank:
            yield f"{op} on rank {rank}: stage {op.stage} lives on rank {rank_of[op.stage]}"
        elif len(at) > 1:
            yield f"{op} stands {len(at)} times on rank {rank}: run it once"
    kinds = {type(op) for _, op in places.of if isinstance(op, CollectiveOp)}
    for kind in sorted(kinds, key=lambda kind: kind.__name__):
        for stage, rank in enumerate(rank_of):
            if (rank, kind(stage)) not in places.of:
                done = "reduced" if kind is ReduceGrads else "gathered"
                yield f"{kind(stage)} is missing: rank {rank} must run it, as other stages are {done}"


class _WeakestMachine:
    """One run of a program whose ops are all there: what happened, and before what each rank stands."""

    def __init__(self, program: Program) -> None:
        self.ranks = program.ranks
        self.rank_of = program.schedule.placement.rank_of
        self.heads = [0] * len(program.ranks)
        self.order: list[tuple[int, Op]] = []
        self.faults: list[str] = []
        # Ranks take turns, so that the witness interleaves them as a machine would. A rank that stands in
        # transfers has no turn until the last of them has met its other side.
        self.turns = deque(range(len(program.ranks)))
        self.standing: dict[int, list[Send | Recv]] = {}

    def run(self) -> None:
        """Let the ranks take turns until nothing can happen any more."""
        while self.turns:
            rank = self.turns.popleft()
            if self.heads[rank] == len(self.ranks[rank]):
                continue
            op = self.ranks[rank][self.heads[rank]]
            if isinstance(op, Send | Recv):
                self.stand(rank, (op,))
            elif isinstance(op, Exchange):
                self.stand(rank, op.transfers)
            # A collective op takes the same rank of every replica, and all of them begin these in one order:
            # as they stand here, or, where a replica has fewer microbatches, as in the longest one's program
            # (see `data_ranks`). So one replica's run stands for all.
            elif isinstance(op, ComputeOp | Handoff | CollectiveOp):
                self.order.append((rank, op))
                self.go_on(rank)
            else:
                assert_never(op)
        self.faults += self.standstill()

    def go_on(self, rank: int) -> None:
        """Move a rank to its next op."""
        self.heads[rank] += 1
        self.turns.append(rank)

    def stand(self, rank: int, transfers: Sequence[Send | Recv]) -> None:
        """Let a rank stand in transfers, and pass what can be passed; it goes on when none is left."""
        self.standing[rank] = list(transfers)
        for op in transfers:
            peer = self.peer(op)
            mine = self.first(rank, peer, type(op))
            other = self.first(peer, rank, Recv if isinstance(op, Send) else Send)
            # (A rank that sends to itself never goes on: lowering writes a handoff there.)
            match mine, other:
                case (Send() as send, Recv() as recv):
                    self.pair(rank, send, peer, recv)
                case (Recv() as recv, Send() as send):
                    self.pair(peer, send, rank, recv)

    def first(self, rank: int, peer: int, kind: type[Send] | type[Recv]) -> Send | Recv | None:
        """Return the first transfer of a kind with `peer` in which `rank` stands: they match by order."""
        return next(
            (op for op in self.standing.get(rank, ()) if isinstance(op, kind) and self.peer(op) == peer), None
        )

    def pair(self, source: int, send: Send, target: int, recv: Recv) -> None:
        """Let a send meet a receive: they match by order, so even the wrong value arrives."""
        if Recv(send.source, send.target, send.microbatch, send.payload) != recv:
            self.faults.append(f"mis-pairing: {send} on rank {source} meets {recv} on rank {target}")
        self.order += [(source, send), (target, recv)]
        for rank, op in ((source, send), (target, recv)):
            self.standing[rank].remove(op)
        for rank in (source, target):
            if not self.standing[rank]:
                del self.standing[rank]
                self.go_on(rank)

    def peer(self, op: Send | Recv) -> int:
        """Return the rank at the other side of a transfer."""
        return self.rank_of[op.target if isinstance(op, Send) else op.source]

    def standstill(self) -> Iterator[str]:
        """Yield a fault for each circle of ranks that wait for one another, and for each rank behind one."""
        ops = {rank: self.ranks[rank][self.heads[rank]] for rank in sorted(self.standing)}
        # A rank goes on when its last transfer has met, so any one that has not will do to find a circle.
        waits_for = {rank: self.peer(self.standing[rank][0]) for rank in ops}
        stances = {
            rank: f"rank {rank} stands before {ops[rank]} and waits for rank {peer}"
            for rank, peer in waits_for.items()
        }
        circles = _circles(waits_for)
        for circle in circles:
            yield "deadlock: " + ", ".join(stances[rank] for rank in circle)
        for rank in sorted(waits_for.keys() - {rank for circle in circles for rank in circle}):
            yield f"held up by a deadlock: {stances[rank]}"


def _circles(waits_for: Mapping[int, int]) -> list[list[int]]:
    """Return the circles in a map from each waiting rank to the one that it waits for."""
    circles = []
    seen: set[int] = set()
    for start in waits_for:
        rank = start
        path = []
        while rank in waits_for and rank not in seen:
            seen.add(rank)
            path.append(rank)
            rank = waits_for[rank]
        if rank in path:
            circles.append(path[path.index(rank) :])
    return circles
