"""Stages whose parameters, gradients and optimizer states are parted over data ranks: torch's `fully_shard`.

A step gathers each stage once, before its first op, and parts its gradients when the last of them is there.
torch's own hooks sit on a module's forward and on autograd's graph, of which a stage runs neither: and with
weight gradients put off they would come before there are any. So a stage's group is told when to gather and
when to reduce, as torch's own pipeline stages tell it (`torch.distributed.pipelining.stage`), in part by
private calls. All of them are in this file.

What a program uses are the gathered parameters, objects that stay, with memory only during a step; what
optimizers and checkpoints see are DTensors over this rank's part. Parameters that several stages share stay
whole on every rank.

Source: Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", 2023.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from evenflow.errors import ConfigError
from evenflow.runtime.notes.whereabouts import awaited
from evenflow.runtime.ranks.data_ranks import DataRanks, Replicated, Turns
from evenflow.runtime.ranks.sums import Named
from evenflow.runtime.ranks.world import Pending, World


class ShardedStage:
    """One stage's parameters, parted. `module` holds them under names of its own, and nothing else is needed.

    `sharded` and `gathered` are the two forms of each, by the module's names; `whole` are left as they are.
    `world` are the data ranks, those of `mesh`.
    """

    def __init__(
        self, module: torch.nn.Module, mesh: DeviceMesh, whole: set[torch.nn.Parameter], world: World
    ) -> None:
        self._world = world
        names = [name for name, p in module.named_parameters(recurse=False) if p not in whole]
        _check_types([(name, module.get_parameter(name)) for name in names])
        made = fully_shard(module, mesh=mesh, reshard_after_forward=False, ignored_params=whole)
        assert isinstance(made, FSDPModule), "it has become one"
        self._module = made
        made.set_force_sum_reduction_for_comms(True)
        made.set_gradient_divide_factor(1.0)  # microbatches are weighed already
        made.set_is_last_backward(True)
        made.set_reshard_after_backward(True)
        made.set_requires_gradient_sync(True)
        self._state: Any = fully_shard.state(module)  # type: ignore[attr-defined]  # torch puts it there
        self._state._lazy_init()  # noqa: SLF001 (a forward would; see the module)
        self._handle: Any = None
        self.sharded = {name: module.get_parameter(name) for name in names}
        self.gather()
        self.gathered = {name: module.get_parameter(name) for name in names}
        self.release()

    def begin(self) -> None:
        """Begin to gather the parameters."""
        self._handle = self._module.unshard(async_op=True)

    def gather(self) -> None:
        """Have all parameters in memory."""
        with self._awaited("its part of the parameters"):
            if self._handle is not None:
                self._handle.wait()
                self._handle = None
            self._module.unshard()

    def release(self) -> None:
        """Keep this rank's part alone."""
        if self._handle is not None:  # nobody has used it: what is gathered now would be old later
            self.gather()
        self._module.reshard()

    def reduce(self) -> None:
        """Sum the gradients of the gathered parameters, and give each of the sharded ones its part."""
        with self._awaited("its part of the gradients"):
            for group in _groups(self._state):
                group.post_backward()
            self._state._root_post_backward_final_callback()  # noqa: SLF001 (as torch's own pipeline stage)

    def _awaited(self, what: str) -> AbstractContextManager[None]:
        return awaited(self._world.whereabouts, self._world.members, what)


def _groups(state: Any) -> Sequence[Any]:  # torch's groups of parameters: one in older versions
    found = getattr(state, "_fsdp_param_groups", None)
    one = state._fsdp_param_group if found is None else None  # noqa: SLF001 (as above)
    return found if found is not None else [one] if one is not None else []


def _check_types(named: Sequence[Named]) -> None:
    found = {parameter.dtype: name for name, parameter in named if parameter.requires_grad}
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise ConfigError(
            f'shard="fsdp" needs trained parameters of one type in a stage, and {first.replace("/", ".")} is '
            f'{one}, {second.replace("/", ".")} {other}: give precision=, or shard="zero1"'
        )


class FullySharded(DataRanks):
    """See the module. `stages` are this process's, `shared` sums what each rank has whole."""

    def __init__(self, world: World, stages: Mapping[int, ShardedStage], shared: Replicated) -> None:
        self._world, self._stages, self._shared = world, stages, shared
        self._turns = Turns()
        self._exist: list[tuple[list[str], int, torch.Tensor, Pending]] = []

    def expect(self, order: Sequence[int]) -> None:
        self._turns.expect(order)
        self._shared.expect(())
        for stage in sorted(self._stages):
            self._stages[stage].begin()

    def gather(self, stage: int) -> None:
        self._stages[stage].gather()

    def reduce(self, stage: int) -> None:
        for at in self._turns.ready(stage):
            self._reduce(at)

    def _reduce(self, number: int) -> None:
        """Ranks reduce the same parameters: one that has no gradient of some adds zeros."""
        stage = self._stages[number]
        trained = {name: p for name, p in stage.gathered.items() if p.requires_grad}
        missing = [name for name, parameter in trained.items() if parameter.grad is None]
        there = torch.tensor([parameter.grad is not None for parameter in trained.values()]).int()
        device = next(iter(trained.values())).device if trained else self._world.device
        exist = there.to(device)
        work = self._world.add_up(exist)
        for name in missing:
            trained[name].grad = torch.zeros_like(trained[name])
        self._exist.append((missing, number, exist, work))
        stage.reduce()

    def release(self) -> None:
        for stage in self._stages.values():
            stage.release()

    def finish(self) -> None:
        for late in self._turns.rest():
            self._reduce(late)
        for missing, number, exist, work in self._exist:
            work.wait()
            stage = self._stages[number]
            trained = [name for name, p in stage.gathered.items() if p.requires_grad]
            counts = dict(zip(trained, exist.tolist() if missing else (), strict=bool(missing)))
            for name in missing:
                if not counts[name]:
                    stage.sharded[name].grad = None
        self._exist.clear()
        self._shared.finish()

    def clear(self) -> None:
        self._exist.clear()
        self._shared.clear()
        for stage in self._stages.values():
            for parameter in stage.gathered.values():
                parameter.grad = None

    def summed(self, name: str, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        found = self._gathered(name)
        return self._shared.summed(name, parameter if found is None else found)

    def _gathered(self, name: str) -> torch.nn.Parameter | None:
        key = name.replace(".", "/")
        return next((s.gathered[key] for s in self._stages.values() if key in s.gathered), None)

    def updates(self, name: str) -> bool:
        return True

    def answers(self, name: str) -> bool:
        return self._gathered(name) is not None or self._shared.answers(name)

    def spread(self) -> None:
        pass
