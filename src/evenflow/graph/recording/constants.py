"""Tensors of Python's own: there before the program began, in a closure, a global, a cache.

A constant is part of the recording, so two runs must meet the same ones: what an earlier run made and kept
is none, whoever holds it. A cache may hand over what a function once made of constants alone, so such
results count like them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from evenflow.errors import RecordError
from evenflow.graph.kernels.fakes import storage_of

_MOST_COMPARED = 2**20  # numbers of a constant that are compared between runs; of a larger one, its identity


@dataclass(frozen=True, slots=True)
class FirstRun:
    """What a run leaves to a second: tensors of Python's own, and those that it made of nothing else."""

    constants: dict[int, torch.Tensor]
    made: dict[int, torch.Tensor]  # all that it met
    born: frozenset[int]  # memory that the run made
    self_changed: frozenset[str]  # attributes that modules changed in their own forward


class Constants:
    """The constants that a run met, by the name that stands for each. `born`: memory that the run made."""

    def __init__(self, born: set[int], first: FirstRun | None) -> None:
        self.by_name: dict[str, torch.Tensor] = {}
        self._pure: dict[int, torch.Tensor] = {}  # by id: tensors that nothing but constants decide
        self._born, self._first = born, first

    def name(self, tensor: torch.Tensor, used_by: str) -> str | None:
        """The name of a tensor, met for the first time, that was there before; of another one, nothing."""
        if not self._was_there(tensor, used_by):
            return None
        name = f"constant {len(self.by_name)}"
        self.by_name[name] = self._pure[id(tensor)] = tensor
        return name

    def _was_there(self, tensor: torch.Tensor, used_by: str) -> bool:
        before = self._first
        if before is not None:
            kept = id(tensor) in before.made or storage_of(tensor) in before.born - self._born
            if kept and id(tensor) not in before.constants:
                raise RecordError(
                    f"{used_by} uses a tensor {list(tensor.shape)} that an earlier call of the "
                    "program made from "
                    "the batch or the parameters, and kept: evenflow cannot carry it from one "
                    "microbatch to the next; keep it in a buffer of a module"
                )
        if isinstance(tensor, FakeTensor) or storage_of(tensor) in self._born:
            return False
        if tensor.requires_grad:
            raise RecordError(
                f"{used_by} uses a tensor {list(tensor.shape)} that requires a gradient and is "
                "neither a parameter of the model nor in the batch: register it as a parameter"
            )
        return before is None or id(tensor) in before.constants

    def note_results(
        self,
        inputs: Iterable[torch.Tensor],
        made: Iterable[torch.Tensor],
        changed: Iterable[torch.Tensor],
        *,
        draws: bool,
    ) -> None:
        """Keep what a function made of constants alone: a cache may give it to the next run."""
        if not draws and all(id(tensor) in self._pure for tensor in inputs):
            self._pure |= {id(tensor): tensor for tensor in made if not isinstance(tensor, FakeTensor)}
        else:
            for tensor in changed:
                self._pure.pop(id(tensor), None)

    def _own(self) -> dict[int, torch.Tensor]:
        return self._pure | {id(tensor): tensor for tensor in self.by_name.values()}

    def numbers_among(self, tensors: Sequence[torch.Tensor]) -> dict[int, Any]:
        """By place, something that is equal for equal numbers, of those that constants alone decide."""
        own = self._own()
        return {at: _numbers_in(tensor) for at, tensor in enumerate(tensors) if id(tensor) in own}

    def as_first(self, met: Iterable[torch.Tensor], self_changed: Iterable[str]) -> FirstRun:
        """What this run leaves to another, with what it was left itself; `met` are its tensors."""
        constants, made = self._own(), {id(tensor): tensor for tensor in met}
        born = frozenset(self._born)
        if self._first is not None:
            constants |= self._first.constants
            made |= self._first.made
            born |= self._first.born
        return FirstRun(constants, made, born, frozenset(self_changed))


def _numbers_in(tensor: torch.Tensor) -> Any:
    """Something that is equal for tensors with equal numbers."""
    if type(tensor) is not torch.Tensor or tensor.numel() > _MOST_COMPARED or storage_of(tensor) < 0:
        return id(tensor)
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()
