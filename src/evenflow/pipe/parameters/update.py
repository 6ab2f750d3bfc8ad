"""The end of a step: put gradients together, normalise and clip them, run the optimizers."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from evenflow.cost.optimizer import OptimizerFactory
from evenflow.errors import ConfigError
from evenflow.graph.nouns.dtensors import local_part, with_local
from evenflow.pipe.parameters.norm import clip_factor, piece_of
from evenflow.pipe.parameters.rules import UpdateRules
from evenflow.runtime.ranks.data_ranks import DataRanks, OneDataRank
from evenflow.runtime.ranks.tensor_ranks import TensorRanks
from evenflow.runtime.ranks.world import SingleProcess, World
from evenflow.runtime.recorded.parameters import Accumulators, Use
from evenflow.runtime.recorded.together import Together, as_one

SchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


class Updater:
    """The optimizers of this process's stages. `owned` maps a stage to its own parameters, by name.

    `world` are the ranks of its pipeline, `data` what its replicas do together.
    """

    def __init__(
        self,
        world: World,
        accumulators: Accumulators,
        owned: Mapping[int, Mapping[str, torch.nn.Parameter]],
        *,
        process_of_stage: Callable[[int], int],
        optimizer: OptimizerFactory | None,
        scheduler: SchedulerFactory | None,
        data: DataRanks | None = None,
        tensor: TensorRanks | None = None,
        rules: UpdateRules | None = None,
    ) -> None:
        self.world, self.accumulators, self.owned = world, accumulators, owned
        self.data = OneDataRank() if data is None else data
        self._tensor = TensorRanks(SingleProcess(), ()) if tensor is None else tensor
        self.rules = UpdateRules() if rules is None else rules
        self.process_of_stage = process_of_stage
        self.optimizers: dict[int, torch.optim.Optimizer] = {}
        self.schedulers: list[torch.optim.lr_scheduler.LRScheduler] = []
        for stage, parameters in owned.items():
            trainable = [
                (name, parameter)
                for name, parameter in parameters.items()
                if parameter.requires_grad and self.data.updates(name)
            ]
            if optimizer is not None and trainable:
                masters = self.rules.masters
                named = trainable if masters is None else masters.of(trainable)
                self.optimizers[stage] = _checked(optimizer(named))
                if scheduler is not None:
                    self.schedulers.append(_checked_scheduler(scheduler(self.optimizers[stage])))

    @property
    def parameters(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        return ((name, parameter) for stage in self.owned.values() for name, parameter in stage.items())

    def clear(self) -> None:
        """Forget all gradients."""
        for _, parameter in self.parameters:
            parameter.grad = None
        self.data.clear()
        self.accumulators.clear()

    @torch.no_grad()
    def combine(self, scale: float | None) -> None:
        """Add up the gradients of shared parameters, and of data ranks, then scale all gradients."""
        self.gather_shared()
        self.data.finish()
        scale = self.descaled(scale)
        if scale is not None:
            for gradient in self._gradients():
                gradient.mul_(scale)

    def descaled(self, scale: float | None) -> float | None:
        """A factor of gradients that also undoes that of the loss; None is 1."""
        loss_scale = self.rules.loss_scale
        return scale if loss_scale is None else (1.0 if scale is None else scale) / loss_scale.factor

    def step(self, norm: torch.Tensor | None) -> None:
        """Update the parameters and let every accumulator see the new numbers; collective.

        `norm` is that of all gradients. Where they overflowed in float16, nothing is updated, on any rank.
        """
        if norm is not None and self.rules.overflowed(norm):
            return
        self._clip(norm)
        masters = self.rules.masters
        if masters is not None:
            masters.take_gradients()
        for optimizer in self.optimizers.values():
            optimizer.step()
        for scheduler in self.schedulers:
            scheduler.step()
        if masters is not None:
            masters.publish()
        self.data.spread()
        self.spread()

    def norm(self) -> torch.Tensor | None:
        """The norm of all gradients once they are combined, where somebody wants it; collective."""
        if self.rules.norm is None:
            return None
        pieces = (
            piece_of(name, parameter.grad)
            for name, parameter in self.parameters
            if parameter.requires_grad and parameter.grad is not None and self.answers(name, parameter)
        )
        return self.rules.norm(piece for piece in pieces if piece is not None)

    def answers(self, name: str, parameter: torch.Tensor) -> bool:
        """Whether this process tells others of a parameter and its gradient, or of its part of them."""
        return self.data.answers(name) and self._tensor.answers(parameter)

    @torch.no_grad()
    def _clip(self, norm: torch.Tensor | None) -> None:
        if norm is not None and self.rules.clip_norm is not None:
            factor = clip_factor(norm, self.rules.clip_norm)
            for gradient in self._gradients():
                gradient.mul_(factor.to(gradient.device))

    def _gradients(self) -> Iterator[torch.Tensor]:
        """What this process has of each, to be changed in place."""
        for _, parameter in self.parameters:
            if parameter.grad is not None:
                yield local_part(parameter.grad)

    def spread(self) -> None:
        """Give the owner's numbers of every shared parameter to all that use it; collective."""
        for name, uses in self._shared():
            self._spread(name, uses)

    def _shared(self) -> list[tuple[str, list[Use]]]:
        return sorted(self.accumulators.uses.items())

    def _owner(self, name: str) -> int:
        return self.process_of_stage(self.accumulators.owner[name])

    def gather_shared(self) -> None:
        """Add the accumulators of shared parameters to their owners' gradients; collective."""
        held = {use: alias for name, _ in self._shared() for use, alias in self.accumulators.aliases(name)}
        elsewhere = [
            use
            for name, uses in self._shared()
            for use in uses
            if self.process_of_stage(use.stage) != self._owner(name)
        ]
        exists: dict[Use, bool] = {}
        if elsewhere:  # which accumulators got a gradient: only the process that holds one knows
            mine = [int(use in held and held[use].grad is not None) for use in elsewhere]
            rows = self.world.gather_numbers(mine)
            exists = {use: any(row[at] for row in rows) for at, use in enumerate(elsewhere)}
        with torch.no_grad():
            for name, uses in self._shared():
                for use in uses:
                    self._gather_one(name, use, held.get(use), exists)

    def _gather_one(
        self, name: str, use: Use, alias: torch.nn.Parameter | None, exists: Mapping[Use, bool]
    ) -> None:
        owner, holder = self._owner(name), self.process_of_stage(use.stage)
        gradient = None if alias is None else alias.grad
        if holder != owner and exists[use]:
            if self.world.rank == holder:
                assert gradient is not None
                self.world.send(local_part(gradient), owner)
            elif self.world.rank == owner:
                parameter = self._owned_parameter(name)
                gradient = with_local(parameter, self.world.receive(local_part(parameter), holder))
        if alias is not None:
            alias.grad = None
        if self.world.rank == owner and gradient is not None:
            parameter = self._owned_parameter(name)
            moved = gradient.to(parameter.device)
            parameter.grad = moved if parameter.grad is None else parameter.grad.add_(moved)

    def _owned_parameter(self, name: str) -> torch.nn.Parameter:
        return self.owned[self.accumulators.owner[name]][name]

    def _spread(self, name: str, uses: list[Use]) -> None:
        owner = self._owner(name)
        for process in sorted({self.process_of_stage(use.stage) for use in uses} - {owner}):
            if self.world.rank == owner:
                self.world.send(local_part(self._owned_parameter(name).data), process)
            elif self.world.rank == process:
                kept = local_part(self.accumulators.parameter(name).data)
                kept.copy_(self.world.receive(kept, owner))
        self.accumulators.publish(name)


def _checked(made: Any) -> torch.optim.Optimizer:  # whatever the user's function returned
    made = as_one(made)
    if not isinstance(made, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizer= returned a {type(made).__name__}; it must return a torch.optim.Optimizer"
        )
    members = made.members if isinstance(made, Together) else (made,)
    if any(isinstance(member, torch.optim.LBFGS) for member in members):
        raise ConfigError("optimizer= returned LBFGS, which runs the model itself; use one that does not")
    return made


def _checked_scheduler(made: Any) -> torch.optim.lr_scheduler.LRScheduler:  # as above
    kind = type(made).__name__
    if isinstance(made, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ConfigError(f"scheduler= returned {kind}, which must be told a loss; use one that counts steps")
    if not isinstance(made, torch.optim.lr_scheduler.LRScheduler):
        raise ConfigError(f"scheduler= returned a {kind}; it must return a torch LRScheduler")
    return made
