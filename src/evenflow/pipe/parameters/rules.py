"""What an update does beside the optimizers' own work: clipping, masters, the loss's scale, bad numbers.

Source: Micikevicius et al., "Mixed Precision Training", 2018.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from evenflow.errors import ConfigError
from evenflow.pipe.given.precision import Precision
from evenflow.pipe.parameters.norm import GradientNorm
from evenflow.runtime.ranks.sums import Named
from evenflow.runtime.ranks.world import World

_GROWTH, _BACKOFF, INTERVAL = 2.0, 0.5, 2000


@dataclass(slots=True)
class LossScale:
    """The factor of the loss in float16, in whose small numbers gradients would vanish.

    It grows until a gradient overflows somewhere; that step is left out, on all ranks, and it shrinks. The
    rule and its numbers are those of `torch.amp.GradScaler`, which decides for each optimizer of each process
    alone: ranks would part. Here the norm of all gradients tells, which is the same on every rank. `num_good`
    steps in a row went well.

    >>> scale = LossScale(1024.0)
    >>> scale.update(overflowed=True)
    >>> scale.factor
    512.0
    """

    factor: float = 65536.0
    num_good: int = 0

    def go_on(self, factor: float, num_good: int) -> None:
        """Go on where another one was."""
        self.factor, self.num_good = factor, num_good

    def update(self, *, overflowed: bool) -> None:
        """Learn how a step went."""
        if overflowed:
            self.factor, self.num_good = self.factor * _BACKOFF, 0
            return
        self.num_good += 1
        if self.num_good == INTERVAL:
            self.factor, self.num_good = self.factor * _GROWTH, 0


class Masters:
    """Float32 copies of parameters of less than 32 bits, which the optimizer updates in their place.

    A small update of a bfloat16 number, 1 part in 1,000 say, would be rounded away.

    >>> parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    >>> masters = Masters()
    >>> ((_, master),) = masters.of([("w", parameter)])
    >>> master.data -= 0.001
    >>> masters.publish()
    >>> float(master.detach()), float(parameter.detach())
    (0.9990000128746033, 1.0)
    """

    def __init__(self) -> None:
        self.by_name: dict[str, torch.nn.Parameter] = {}
        self._pairs: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []

    def of(self, named: list[Named]) -> list[Named]:
        """The same parameters, with masters in the place of those that need one."""
        return [(name, self._master(name, parameter)) for name, parameter in named]

    def _master(self, name: str, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        if not parameter.is_floating_point() or parameter.dtype.itemsize >= 4:
            return parameter
        master = torch.nn.Parameter(parameter.detach().float())
        self._pairs.append((parameter, master))
        self.by_name[name] = master
        return master

    def take_gradients(self) -> None:
        """Give every master its parameter's gradient."""
        for parameter, master in self._pairs:
            master.grad = None if parameter.grad is None else parameter.grad.float()

    def publish(self) -> None:
        """Round the masters' new numbers for the parameters."""
        with torch.no_grad():
            for parameter, master in self._pairs:
                parameter.copy_(master)
                master.grad = None


@dataclass(frozen=True, slots=True)
class OnBadNumbers:
    """What a pipeline does with bad numbers: by a `policy` of None nothing.

    `watches`: whether each step is watched as it runs.
    """

    policy: Literal["stop", "skip"] | None = None
    watches: bool = False

    @staticmethod
    def of(bad_numbers: object, *, find_nan: object) -> "OnBadNumbers":
        """What these arguments of `pipeline` ask for; raises `ConfigError` for what is unknown.

        >>> OnBadNumbers.of(None, find_nan=True)
        OnBadNumbers(policy='stop', watches=True)
        """
        if not isinstance(find_nan, bool):
            raise ConfigError(f"find_nan={find_nan!r} must be True or False")
        match bad_numbers:
            case None:
                return OnBadNumbers("stop" if find_nan else None, find_nan)
            case "stop":
                return OnBadNumbers("stop", find_nan)
            case "skip":
                return OnBadNumbers("skip", find_nan)
            case _:
                raise ConfigError(f"bad_numbers={bad_numbers!r} is none of 'stop', 'skip' and None")


@dataclass(frozen=True, slots=True)
class UpdateRules:
    """See the module; None is nothing of the kind. `norm` is there where one of the others takes it."""

    clip_norm: float | None = None
    norm: GradientNorm | None = None
    loss_scale: LossScale | None = None
    masters: Masters | None = None
    on_bad_numbers: OnBadNumbers = OnBadNumbers()

    @staticmethod
    def of(
        precision: Precision,
        clip_norm: float | None,
        on_bad_numbers: OnBadNumbers,
        world: World,
        names: Sequence[str],
    ) -> "UpdateRules":
        """The rules of a run; `world` are all its processes, `names` those of all trained parameters."""
        wanted = clip_norm is not None or precision.scales_loss or on_bad_numbers.policy is not None
        return UpdateRules(
            clip_norm if clip_norm is not None and math.isfinite(clip_norm) else None,
            GradientNorm(world, names) if wanted else None,
            LossScale() if precision.scales_loss else None,
            Masters() if precision.has_masters else None,
            on_bad_numbers,
        )

    def overflowed(self, norm: torch.Tensor) -> bool:
        """Whether gradients of this norm overflowed in float16; the loss's next factor depends on it."""
        if self.loss_scale is None:
            return False
        overflowed = not math.isfinite(float(norm))
        self.loss_scale.update(overflowed=overflowed)
        return overflowed

    @property
    def loss_factor(self) -> float:
        """What every loss is multiplied by, before the backward."""
        return 1.0 if self.loss_scale is None else self.loss_scale.factor
