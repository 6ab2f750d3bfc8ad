"""What an update does beside the optimizers' own work: clipping, master copies, the scale of the loss."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from evenflow.pipe.loss_scale import LossScale
from evenflow.pipe.masters import Masters
from evenflow.pipe.norm import GradientNorm
from evenflow.pipe.on_bad_numbers import OnBadNumbers
from evenflow.pipe.precision import Precision
from evenflow.runtime.world import World


@dataclass(frozen=True, slots=True)
class UpdateRules:
    """See the module; None is nothing of the kind. `norm` is there where one of the others takes it."""

    clip_norm: float | None = None
    norm: GradientNorm | None = None
    loss_scale: LossScale | None = None
    masters: Masters | None = None

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
