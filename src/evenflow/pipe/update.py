"""The end of a step: put shared gradients together, normalise what was accumulated, run the optimizers."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from evenflow.cost.optimizer import OptimizerFactory
from evenflow.errors import ConfigError
from evenflow.runtime.parameters import Accumulators, Use
from evenflow.runtime.together import Together, as_one
from evenflow.runtime.world import World

SchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


class Updater:
    """The optimizers of this process's stages. `owned` maps a stage to its own parameters, by name."""

    def __init__(
        self,
        world: World,
        accumulators: Accumulators,
        owned: Mapping[int, Mapping[str, torch.nn.Parameter]],
        *,
        process_of_stage: Callable[[int], int],
        optimizer: OptimizerFactory | None,
        scheduler: SchedulerFactory | None,
    ) -> None:
        if scheduler is not None and optimizer is None:
            raise ConfigError("scheduler= needs optimizer=: it is called with the optimizer that it steers")
        self.world, self.accumulators, self.owned = world, accumulators, owned
        self.process_of_stage = process_of_stage
        self.optimizers: dict[int, torch.optim.Optimizer] = {}
        self.schedulers: list[torch.optim.lr_scheduler.LRScheduler] = []
        for stage, parameters in owned.items():
            trainable = [
                (name, parameter) for name, parameter in parameters.items() if parameter.requires_grad
            ]
            if optimizer is not None and trainable:
                self.optimizers[stage] = _checked(optimizer(trainable))
                if scheduler is not None:
                    self.schedulers.append(_checked_scheduler(scheduler(self.optimizers[stage])))

    @property
    def parameters(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        return ((name, parameter) for stage in self.owned.values() for name, parameter in stage.items())

    def clear(self) -> None:
        """Forget all gradients."""
        for _, parameter in self.parameters:
            parameter.grad = None
        self.accumulators.clear()

    def combine(self, scale: float | None) -> None:
        """Add the accumulators of shared parameters to their owners' gradients, then scale all gradients."""
        self._gather_shared()
        if scale is not None:
            with torch.no_grad():
                for _, parameter in self.parameters:
                    if parameter.grad is not None:
                        parameter.grad.mul_(scale)

    def step(self) -> None:
        """Update the parameters and let every accumulator see the new numbers."""
        for optimizer in self.optimizers.values():
            optimizer.step()
        for scheduler in self.schedulers:
            scheduler.step()
        self.spread()

    def spread(self) -> None:
        """Give the owner's numbers of every shared parameter to all that use it; collective."""
        for name, uses in self._shared():
            self._spread(name, uses)

    def _shared(self) -> list[tuple[str, list[Use]]]:
        return sorted(self.accumulators.uses.items())

    def _owner(self, name: str) -> int:
        return self.process_of_stage(self.accumulators.owner[name])

    def _gather_shared(self) -> None:
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
                self.world.send(gradient, owner)
            elif self.world.rank == owner:
                gradient = self.world.receive(self.owned_parameter(name), holder)
        if alias is not None:
            alias.grad = None
        if self.world.rank == owner and gradient is not None:
            parameter = self.owned_parameter(name)
            moved = gradient.to(parameter.device)
            parameter.grad = moved if parameter.grad is None else parameter.grad.add_(moved)

    def owned_parameter(self, name: str) -> torch.nn.Parameter:
        return self.owned[self.accumulators.owner[name]][name]

    def _spread(self, name: str, uses: list[Use]) -> None:
        owner = self._owner(name)
        for process in sorted({self.process_of_stage(use.stage) for use in uses} - {owner}):
            if self.world.rank == owner:
                self.world.send(self.owned_parameter(name).data, process)
            elif self.world.rank == process:
                kept = self.accumulators.parameter(name).data
                kept.copy_(self.world.receive(kept, owner))
        self.accumulators.publish(name)


def _checked(made: Any) -> torch.optim.Optimizer:  # whatever the user's function returned
    made = as_one(made)
    kind = type(made).__name__
    if not isinstance(made, torch.optim.Optimizer):
        raise ConfigError(f"optimizer= returned a {kind}; it must return a torch.optim.Optimizer")
    members = made.members if isinstance(made, Together) else (made,)
    if any(isinstance(member, torch.optim.LBFGS) for member in members):
        kind = "LBFGS"
        raise ConfigError(f"optimizer= returned {kind}, which runs the model itself; use one that does not")
    return made


def _checked_scheduler(made: Any) -> torch.optim.lr_scheduler.LRScheduler:  # as above
    kind = type(made).__name__
    if isinstance(made, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ConfigError(f"scheduler= returned {kind}, which must be told a loss; use one that counts steps")
    if not isinstance(made, torch.optim.lr_scheduler.LRScheduler):
        raise ConfigError(f"scheduler= returned a {kind}; it must return a torch LRScheduler")
    return made
