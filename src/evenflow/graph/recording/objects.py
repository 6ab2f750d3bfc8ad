"""Objects that a program hands around or returns, neither tensors nor plain values: what stands for each.

One that is handed around is copied when it is first seen, before the program can change it; each microbatch
gets a copy of that. One that is returned is copied with references in place of its tensors.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from evenflow.errors import RecordError
from evenflow.graph.nouns.template import Ref, Shared, Shell
from evenflow.graph.python.outside import frozen, tensors_alike
from evenflow.graph.recording.values import Values


class Objects:
    """The objects of one run; `changing` has the numbers of those that are no longer as they first were."""

    def __init__(self, values: Values, modules: Iterable[torch.nn.Module]) -> None:
        self.changing: set[int] = set()
        self._values = values
        self._keep = {id(module): module for module in modules}  # a copy of a module would train apart
        self._shared: dict[int, tuple[object, Shared, Any]] = {}  # by id: object, stand-in, its first state
        self._generators: list[tuple[torch.Generator, torch.Tensor]] = []  # with their states

    def shared(self, thing: Any, used_by: str) -> Shared:
        """What stands for an object that is handed around."""
        if isinstance(thing, torch.Generator):
            self._generators.append((thing, thing.get_state()))
        state = None if _is_cache(thing) else tensors_alike(frozen(thing))
        if id(thing) not in self._shared:
            self._shared[id(thing)] = (thing, self._stand_in(thing, used_by), state)
        _, shared, before = self._shared[id(thing)]
        if state != before:
            self.changing.add(shared.number)
        return shared

    def _stand_in(self, thing: Any, used_by: str) -> Shared:
        # What is fake has no numbers to copy.
        fakes = {id(tensor): _LOST for tensor in self._values.tensors() if isinstance(tensor, FakeTensor)}
        return Shared(len(self._shared), _copied(thing, self._keep | fakes, used_by), self._keep)

    def shell(self, thing: Any, used_by: str) -> Shell | None:
        """What is returned in an object: the object without its tensors, and which they were."""
        refs = {id(tensor): Ref(number) for number, tensor in enumerate(self._values.tensors())}
        memo = _Used(refs | self._keep)
        prototype = _copied(thing, memo, used_by)
        return Shell(prototype, tuple(memo.used.values()), self._keep) if memo.used else None

    def put_back(self) -> None:
        """Give the program's own random generators the states that they had."""
        for generator, state in reversed(self._generators):
            generator.set_state(state)


def _copied(thing: Any, memo: dict[int, Any], used_by: str) -> Any:  # as `thing`
    try:
        return copy.deepcopy(thing, memo)
    except Exception as error:
        raise RecordError(
            f"{used_by} is handed a {type(thing).__name__}, which cannot be copied for each microbatch "
            f"({error}); pass tensors, numbers and containers of them"
        ) from error


def _is_cache(thing: object) -> bool:
    """Whether an object is a key/value cache of transformers, of which each layer touches its own part."""
    return type(thing).__module__.startswith("transformers.")


class _Used(dict[int, Any]):
    """A memo for `deepcopy` that knows which references were looked up in it."""

    def __init__(self, known: dict[int, Any]) -> None:
        super().__init__(known)
        self.used: dict[int, Ref] = {}

    def get(self, key: int, default: Any = None) -> Any:
        found = super().get(key, default)
        if isinstance(found, Ref):
            self.used[key] = found
        return found


class _Lost:
    """In the place of a tensor that did not exist when an object was copied."""

    def __deepcopy__(self, memo: Any) -> "_Lost":
        return self


_LOST = _Lost()
