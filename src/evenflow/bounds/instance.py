"""Instance: what is to be scheduled, in plain numbers, before anyone asks in which order."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from evenflow.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Instance:
    """What is to be scheduled: stages on ranks, their costs, delays and memory, and the ranks' caps.

    `rank_of[stage]` uses every rank from 0 up. Seconds of one microbatch, for each stage: `forward_seconds`
    (F), `input_grad_seconds` (I) and `weight_grad_seconds` (W; all 0 if I does both). `up_seconds[s]` passes
    from the end of F of stage s to the start of F of stage s + 1, `down_seconds[s]` from the end of I of
    stage s + 1 to the start of I of stage s; 0 on one rank. Memory, in any one unit: `held_memory` from the
    start of F to the end of I, then `kept_memory` (at most as much) to the end of W. `caps[rank]` limits the
    sum on a rank; None is no limit. Raises `ConfigError` for numbers that make no instance.

    >>> Instance.uniform((0, 1), num_microbatches=4, cap=2).caps
    (2, 2)
    """

    rank_of: tuple[int, ...]
    num_microbatches: int
    forward_seconds: tuple[float, ...]
    input_grad_seconds: tuple[float, ...]
    weight_grad_seconds: tuple[float, ...]
    up_seconds: tuple[float, ...]
    down_seconds: tuple[float, ...]
    held_memory: tuple[float, ...]
    kept_memory: tuple[float, ...]
    caps: tuple[float | None, ...]
    # Derived: the stages by rank.
    _stages: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        num_stages = len(self.rank_of)
        if not self.rank_of or set(self.rank_of) != set(range(max(self.rank_of) + 1)):
            raise ConfigError(f"rank_of {self.rank_of} must use every rank from 0 up, at least one")
        if self.num_microbatches < 1:
            raise ConfigError(f"num_microbatches must be at least 1, got {self.num_microbatches}")
        lengths = {
            "forward_seconds": num_stages,
            "input_grad_seconds": num_stages,
            "weight_grad_seconds": num_stages,
            "up_seconds": num_stages - 1,
            "down_seconds": num_stages - 1,
            "held_memory": num_stages,
            "kept_memory": num_stages,
            "caps": self.num_ranks,
        }
        for name, length in lengths.items():
            values = getattr(self, name)
            if len(values) != length:
                raise ConfigError(f"{name} has {len(values)} numbers, and {length} are needed")
            if wrong := [value for value in values if value is not None and not 0 <= value < math.inf]:
                raise ConfigError(f"{name} must be finite and at least 0, got {wrong}")
        for stage, (held, kept) in enumerate(zip(self.held_memory, self.kept_memory, strict=True)):
            if kept > held:
                raise ConfigError(
                    f"stage {stage} keeps {kept} after its input gradient, and held only {held}"
                )
        stages: list[list[int]] = [[] for _ in range(self.num_ranks)]
        for stage, rank in enumerate(self.rank_of):
            stages[rank].append(stage)
        object.__setattr__(self, "_stages", tuple(map(tuple, stages)))

    @property
    def num_ranks(self) -> int:
        """How many ranks there are."""
        return max(self.rank_of) + 1

    def stages_on(self, rank: int) -> tuple[int, ...]:
        """Return the stages of one rank, ascending.

        >>> Instance.uniform((0, 1, 1, 0), num_microbatches=1).stages_on(1)
        (1, 2)
        """
        return self._stages[rank]

    @staticmethod
    def uniform(
        rank_of: Sequence[int],
        *,
        num_microbatches: int,
        seconds: tuple[float, float, float] = (1.0, 1.0, 1.0),
        transfer_seconds: float = 0.0,
        cap: float | None = None,
    ) -> "Instance":
        """Return equal stages, each rank's together taking `seconds` of F, I and W and 1 unit of memory.

        Weight gradients keep all that was held; `transfer_seconds` pass between different ranks; `cap`, the
        same on every rank, counts activations of a whole rank.

        >>> Instance.uniform((0, 1, 1, 0), num_microbatches=1, transfer_seconds=0.1).up_seconds
        (0.1, 0.0, 0.1)
        """
        num_ranks = max(rank_of, default=-1) + 1
        share = num_ranks / max(len(rank_of), 1)
        delays = tuple(
            0.0 if rank_of[stage] == rank_of[stage + 1] else transfer_seconds
            for stage in range(len(rank_of) - 1)
        )
        forward, input_grad, weight_grad = ((each * share,) * len(rank_of) for each in seconds)
        memory = (share,) * len(rank_of)
        return Instance(
            tuple(rank_of),
            num_microbatches,
            forward,
            input_grad,
            weight_grad,
            delays,
            delays,
            memory,
            memory,
            (cap,) * num_ranks,
        )
