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

from evenflow.ir.op import Backward, ComputeOp, Forward, Handoff, Op, Recv, Send, TransferOp
from evenflow.ir.program import Program
from evenflow.ir.schedule import Schedule
from evenflow.rules import carriers, dependencies
from evenflow.soundness import complete_ops, flow_faults, refusal, schedule_faults

_MADE_BY_PROVE = object()


@dataclass(frozen=True, slots=True)
class ProvenProgram:
    """A program that `prove` has passed; nothing else can make one, and the executor takes nothing else.

    `order` is the witness: the `(rank, op)` steps of all ranks in the order in which the weakest machine
    performed them. A `Send` and its `Recv` are neighbours in it, the send first.

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


def prove(program: Program) -> ProvenProgram:
    """Return the program with the proof that it can run, or raise `ScheduleError` listing all its faults.

    Checked: the compute ops are the schedule's, complete, once each and on their ranks; each dependency is
    met, by a transfer that stands once on each side, behind the producer and before the consumer; there is no
    other transfer; and the weakest machine comes to the end. That last check is made once the others pass,
    because with an op too few or too many the machine stands still for that reason alone.

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
    computes = [[op for op in queue if isinstance(op, Forward | Backward)] for queue in program.ranks]
    faults = schedule_faults(schedule, program.flow, computes)
    if not faults:
        faults += _reordered(schedule, computes)
    if not flow_faults(program.flow, schedule.placement.num_stages):
        faults += _transfer_faults(program)
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
    """Where each op stands: the positions of an op in the queue of a rank."""

    def __init__(self, ranks: Sequence[Sequence[Op]]) -> None:
        self.positions: dict[tuple[int, Op], list[int]] = {}
        for rank, queue in enumerate(ranks):
            for position, op in enumerate(queue):
                self.positions.setdefault((rank, op), []).append(position)

    def wrong_order(self, rank: int, op: Op, needed: Op) -> Iterator[str]:
        """Yield a fault if `op` stands before `needed`; what is missing or doubled is told elsewhere."""
        own = self.positions.get((rank, op), [])
        other = self.positions.get((rank, needed), [])
        if len(own) == len(other) == 1 and own[0] < other[0]:
            yield f"{op} stands before {needed} on rank {rank}, and needs it"


def _transfer_faults(program: Program) -> Iterator[str]:
    """Yield what is wrong with the transfers, and with the order of the ops of one rank."""
    schedule, places = program.schedule, _Places(program.ranks)
    trains = any(isinstance(op, Backward) for _, op in places.positions)
    rank_of = schedule.placement.rank_of
    wanted: list[tuple[int, TransferOp]] = []
    for consumer in complete_ops(schedule, trains=trains):
        for producer in dependencies(consumer, program.flow):
            source, target = rank_of[producer.stage], rank_of[consumer.stage]
            match carriers(producer, consumer, schedule.placement):
                case ():
                    yield from places.wrong_order(target, consumer, producer)
                case (handoff,):
                    wanted.append((source, handoff))
                    yield from places.wrong_order(source, handoff, producer)
                    yield from places.wrong_order(target, consumer, handoff)
                case (send, recv):
                    wanted += [(source, send), (target, recv)]
                    yield from places.wrong_order(source, send, producer)
                    yield from places.wrong_order(target, consumer, recv)
                case never:
                    assert_never(never)
    yield from _miscounted(places, wanted)


def _miscounted(places: _Places, wanted: Sequence[tuple[int, TransferOp]]) -> Iterator[str]:
    for rank, op in wanted:
        if (rank, op) not in places.positions:
            consumer = f"{op.target}{op.payload.value}{op.microbatch}"
            yield f"{op} is missing on rank {rank}: {consumer} needs it"
    known = frozenset(wanted)
    for (rank, placed), positions in places.positions.items():
        match placed:
            case Forward() | Backward():
                pass
            case Send() | Recv() | Handoff():
                if (rank, placed) not in known:
                    yield f"{placed} on rank {rank} is asked for by no edge of the flow: leave it out"
                elif len(positions) > 1:
                    yield f"{placed} stands {len(positions)} times on rank {rank}: run it once"
            case _:
                assert_never(placed)


class _WeakestMachine:
    """One run of a program whose ops are all there: what happened, and before what each rank stands."""

    def __init__(self, program: Program) -> None:
        self.ranks = program.ranks
        self.rank_of = program.schedule.placement.rank_of
        self.heads = [0] * len(program.ranks)
        self.order: list[tuple[int, Op]] = []
        self.faults: list[str] = []
        # Ranks take turns, so that the witness interleaves them as a machine would. A rank that found its
        # peer elsewhere has no turn until the peer comes.
        self.turns = deque(range(len(program.ranks)))
        self.waiting: set[int] = set()

    def run(self) -> None:
        """Let the ranks take turns until nothing can happen any more."""
        while self.turns:
            rank = self.turns.popleft()
            match self.head(rank):
                case None:
                    pass
                case Forward() | Backward() | Handoff() as op:
                    self.step(rank, op)
                case Send() | Recv() as op:
                    self.meet(rank, op)
                case never:
                    assert_never(never)
        self.faults += self.standstill()

    def head(self, rank: int) -> Op | None:
        """Return the op before which a rank stands, or None if it has reached the end of its queue."""
        queue = self.ranks[rank]
        return queue[self.heads[rank]] if self.heads[rank] < len(queue) else None

    def step(self, rank: int, op: Op) -> None:
        """Perform one op, and give the rank its next turn."""
        self.order.append((rank, op))
        self.heads[rank] += 1
        self.turns.append(rank)

    def meet(self, rank: int, op: Send | Recv) -> None:
        """Pass a value if the peer waits in the opposite transfer with this rank; else wait for the peer."""
        peer = self.peer(op)
        # A peer that has its turn still to come will find this rank waiting: none ever has two turns.
        match op, self.head(peer) if peer in self.waiting else None:
            case (Send() as send, Recv() as recv) if self.peer(recv) == rank:
                self.pair(rank, send, peer, recv)
            case (Recv() as recv, Send() as send) if self.peer(send) == rank:
                self.pair(peer, send, rank, recv)
            case _:
                self.waiting.add(rank)

    def pair(self, source: int, send: Send, target: int, recv: Recv) -> None:
        """Let a send meet a receive: they match by order, so even the wrong value arrives."""
        if Recv(send.source, send.target, send.microbatch, send.payload) != recv:
            self.faults.append(f"mis-pairing: {send} on rank {source} meets {recv} on rank {target}")
        self.waiting -= {source, target}
        self.step(source, send)
        self.step(target, recv)

    def peer(self, op: Send | Recv) -> int:
        """Return the rank at the other side of a transfer."""
        match op:
            case Send():
                return self.rank_of[op.target]
            case Recv():
                return self.rank_of[op.source]
            case _:
                assert_never(op)

    def standstill(self) -> Iterator[str]:
        """Yield a fault for each circle of ranks that wait for one another, and for each rank behind one."""
        ops = {rank: self.ranks[rank][self.heads[rank]] for rank in sorted(self.waiting)}
        waits_for = {rank: self.peer(op) for rank, op in ops.items() if isinstance(op, Send | Recv)}
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
