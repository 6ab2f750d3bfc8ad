"""Problem: what a search is given, as plain arrays. Letters are the ops of a stage without the microbatch.

Microbatches are identical, so the ops of one kind and stage may run in the order of their microbatches
without loss. An order is then one string of *letters* for each rank: letter `stage` is that stage's forward,
`num_stages + stage` its input gradient, `2 * num_stages + stage` its weight gradient, and the n-th
occurrence of a letter belongs to microbatch n. Memory depends on the string alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from evenflow.errors import ScheduleError
from evenflow.ir.costs import ROUNDING
from evenflow.ir.timeline import Objective

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Edge: TypeAlias = tuple[int, int, float]
Order: TypeAlias = tuple[tuple[int, ...], ...]  # the letters of each rank


class Tables(NamedTuple):
    """A problem as the compiled kernels read it; arrays over letters, edges in compressed rows.

    `sources[source_start[a]:source_start[a + 1]]` are the letters that letter `a` waits for, `delays` their
    delays; `wakes` holds the ranks that may wait for a letter; `stages` the stages of each rank.
    """

    num_microbatches: int
    rank_of: Ints
    seconds: Floats
    source_start: Ints
    sources: Ints
    delays: Floats
    wake_start: Ints
    wakes: Ints
    stage_start: Ints
    stages: Ints
    taken: Floats
    freed: Floats
    cap: Floats
    work: Floats
    base: float
    from_zero: bool


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """One search problem. Arrays are per stage, except `cap_bytes`, which is per rank.

    `activations` and `gradients` are the edges `(source stage, target stage, delay in seconds)`; the delay
    is 0 on one rank. A forward takes `stored_bytes` at its start, an input gradient gives all but
    `kept_bytes` back at its end, and a weight gradient gives back `kept_bytes` at its end. The units are
    free: every quantity may as well be in microbatches of a rank.

    Raises `ScheduleError` where a rank cannot hold even one microbatch, with the numbers.

    >>> Problem.equal(range(2), num_microbatches=4, cap=1.0).num_stages
    2
    """

    num_microbatches: int
    rank_of: Ints
    forward_seconds: Floats
    input_seconds: Floats
    weight_seconds: Floats
    activations: tuple[Edge, ...]
    gradients: tuple[Edge, ...]
    stored_bytes: Floats
    kept_bytes: Floats
    cap_bytes: Floats

    def __post_init__(self) -> None:
        if self.num_stages > MOST_STAGES:
            raise ScheduleError(
                f"{self.num_stages} stages are more than the {MOST_STAGES} that can be searched: name a "
                "method instead"
            )
        faults = []
        for rank in range(self.num_ranks):
            # The last forward of a microbatch on a rank meets all its others still stored, where the flow
            # is a chain; weaker flows only make this test milder than the truth, and the search finds out.
            needed = self.stored_bytes[self.rank_of == rank].max(initial=0.0)
            if needed > self.cap_bytes[rank] * (1 + ROUNDING):
                faults.append(
                    f"rank {rank} needs {needed:g} for the forward of one microbatch and may use "
                    f"{self.cap_bytes[rank]:g}"
                )
        if faults:
            raise ScheduleError("; ".join(faults) + ": raise the memory cap or cut the stages finer")

    @property
    def num_stages(self) -> int:
        """How many stages there are."""
        return len(self.rank_of)

    @property
    def num_ranks(self) -> int:
        """How many ranks hold them."""
        return len(self.cap_bytes)

    def work_seconds(self) -> Floats:
        """Return each rank's seconds of work."""
        each = self.forward_seconds + self.input_seconds + self.weight_seconds
        return np.bincount(self.rank_of, each, self.num_ranks).astype(np.float64) * self.num_microbatches

    def with_microbatches(self, num_microbatches: int) -> "Problem":
        """Return the same problem for another number of microbatches."""
        return replace(self, num_microbatches=num_microbatches)

    def tables(self, objective: Objective) -> Tables:
        """Return the arrays that the kernels read."""
        num = self.num_stages
        edges = [[(source, delay) for source, to, delay in self.activations if to == s] for s in range(num)]
        edges += [
            [(s, 0.0)] + [(num + source, delay) for source, to, delay in self.gradients if to == s]
            for s in range(num)
        ]
        wakes: list[list[int]] = [[] for _ in range(2 * num)]
        for target, row in enumerate(edges):
            for source, _ in row:
                rank = int(self.rank_of[target % num])
                if rank not in wakes[source] and rank != self.rank_of[source % num]:
                    wakes[source].append(rank)
        local = [[s for s in range(num) if self.rank_of[s] == rank] for rank in range(self.num_ranks)]
        zeros = np.zeros(num)
        work = self.work_seconds()
        return Tables(
            num_microbatches=self.num_microbatches,
            rank_of=np.asarray(self.rank_of, np.int64),
            seconds=np.concatenate((self.forward_seconds, self.input_seconds, self.weight_seconds)),
            source_start=_starts(edges),
            sources=np.array([source for row in edges for source, _ in row], np.int64),
            delays=np.array([delay for row in edges for _, delay in row], np.float64),
            wake_start=_starts(wakes),
            wakes=np.array([rank for row in wakes for rank in row], np.int64),
            stage_start=_starts(local),
            stages=np.array([s for row in local for s in row], np.int64),
            taken=np.concatenate((self.stored_bytes, zeros, zeros)),
            freed=np.concatenate((zeros, self.stored_bytes - self.kept_bytes, self.kept_bytes)),
            cap=np.asarray(self.cap_bytes, np.float64) * (1 + ROUNDING),
            work=work,
            base=float(work.max()),
            from_zero=objective == "makespan",
        )

    @staticmethod
    def equal(
        rank_of: Sequence[int], *, num_microbatches: int, cap: float, latency: float = 0.0
    ) -> "Problem":
        """Return a chain where F, I and W of all stages of a rank take 1 second and 1 unit of memory each.

        `cap` is in the same unit: how many microbatches of a whole rank fit.

        >>> Problem.equal((0, 1, 1, 0), num_microbatches=4, cap=2.0).forward_seconds.tolist()
        [0.5, 0.5, 0.5, 0.5]
        """
        ranks = np.array(rank_of, np.int64)
        num_ranks = int(ranks.max()) + 1
        num = len(ranks)
        each = np.full(num, num_ranks / num)
        delay = [0.0 if ranks[s] == ranks[s + 1] else latency for s in range(num - 1)]
        return Problem(
            num_microbatches=num_microbatches,
            rank_of=ranks,
            forward_seconds=each,
            input_seconds=each,
            weight_seconds=each,
            activations=tuple((s, s + 1, delay[s]) for s in range(num - 1)),
            gradients=tuple((s + 1, s, delay[s]) for s in range(num - 1)),
            stored_bytes=each,
            kept_bytes=each,
            cap_bytes=np.full(num_ranks, cap),
        )


MOST_STAGES = 10_000  # three letters each, in 16 bits


def _starts(rows: Sequence[Sequence[object]]) -> Ints:
    return np.concatenate(([0], np.cumsum([len(row) for row in rows]))).astype(np.int64)
