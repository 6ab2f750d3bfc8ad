"""Beats: what each rank tells its peers of itself now and then, and what follows when one stands still.

Who waits for whom is a graph. From a rank that has waited too long it leads to those that are to blame: ranks
that no longer give a sign of life, or that wait for nobody and do not move; or round in a ring.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of life of a rank: the `number`th, from where and which process.

    `at` is where it is, in words, `op` the op in which (or ""), `before` the ops that came before, `line` the
    user's line. It has `stood_seconds` there; `waits_for` the ranks `waits_on` something of. What it does may
    take `patience` times as long as usual. `board` is its open file (see `Board`). `steps` have ended; in the
    last few it computed for `worked_seconds` each, where `planned_seconds` (0: no plan) were planned.
    """

    rank: int
    number: int
    host: str
    machine: str
    pid: int
    parent: int
    started: int
    board: int
    at: str
    op: str
    before: Sequence[str]
    line: str
    stood_seconds: float
    waits_for: Sequence[int]
    waits_on: str
    patience: int
    has_left: bool
    steps: int
    worked_seconds: float
    planned_seconds: float

    def told(self) -> str:
        """As text, for `heard`."""
        return json.dumps(asdict(self))

    @property
    def who(self) -> str:
        """The rank and its process."""
        return f"rank {self.rank} ({self.host}, process {self.pid})"


def heard(told: str | bytes) -> Beat:
    """The beat that `told` made text of."""
    return Beat(**json.loads(told))


@dataclass(frozen=True, slots=True)
class Blame:
    """Whose fault it is that `waiter` waits. `silent`: they give no sign of life; no culprits: a ring."""

    waiter: int
    culprits: tuple[int, ...]
    silent: bool


def blame(
    beats: Mapping[int, Beat], silent: Collection[int], waiter: int, *, timeout_seconds: float
) -> Blame | None:
    """Who is to blame for the wait of a rank that has waited for longer than the timeout; None: nobody yet.

    Ranks that have not moved for so long, that is: while any that is waited for is at work, others have to
    wait. `silent` are the ranks of all that have given no sign of life for long. Where somebody stands for
    no reason that is known, they are it: not every wait is noted.
    """
    before = {waiter: waiter}  # who waits for it
    ahead = [waiter]
    for rank in ahead:
        for other in beats[rank].waits_for if rank in beats and rank not in silent else ():
            if other not in before:
                before[other] = rank
                ahead.append(other)
    gone = [rank for rank in ahead if rank in silent or rank not in beats or beats[rank].has_left]
    if gone:
        return Blame(before[gone[0]], tuple(sorted(gone)), silent=True)
    at_work = [beats[rank] for rank in ahead if not beats[rank].waits_for]
    still = {rank for rank in ahead if beats[rank].stood_seconds >= timeout_seconds * beats[rank].patience}
    stuck = [beat for beat in at_work if beat.rank in still]
    if not stuck and (at_work or len(still) < len(ahead)):
        return None
    if silent:
        return Blame(waiter, tuple(sorted(silent)), silent=True)
    if stuck:
        return Blame(before[stuck[0].rank], tuple(sorted(beat.rank for beat in stuck)), silent=False)
    return Blame(waiter, (), silent=False)
