"""Which value every tensor of a recorded run holds: identity, versions and aliases.

Tensors are known by `id`, so each is kept until the recording ends. A change in place gives a new value to
every tensor that shares the storage.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch

from evenflow.graph.kernels.fakes import storage_of
from evenflow.graph.nouns.tree import (
    BatchLeaf,
    BufferSource,
    CallSource,
    ParameterSource,
    Source,
    TensorInfo,
    Value,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Changes:
    """What a change in place did: (old value, new value) pairs, and the buffers and parameters it met.

    `unknown_to_autograd`: by way of `data`, so that it takes what it kept for the backward for unchanged.
    """

    rebinds: tuple[tuple[int, int], ...]
    buffers: tuple[str, ...]
    parameters: tuple[str, ...]
    unknown_to_autograd: bool


_NO_CHANGES = Changes((), (), (), False)


class Values:
    """The values of one run, in order of their numbers in `all`. `seen` is told of each when it is made."""

    def __init__(self, seen: Callable[[int, torch.Tensor], None] | None = None) -> None:
        self.all: list[Value] = []
        self._seen = seen
        self.changed_storages: set[int] = set()  # whatever was changed in place
        self._number_of: dict[int, int] = {}  # id(tensor) -> its current value
        self._version_of: dict[int, int] = {}  # id(tensor) -> its version when last seen
        self._holder: list[torch.Tensor] = []  # by value; holding a tensor keeps its id from being used again
        self._aliases: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self._renamed: list[tuple[int, int, int]] = []  # (id(tensor), value before, value after)

    def add(self, tensor: torch.Tensor, source: Source, clock: int = -1) -> int:
        """Number the tensor as it is now; `clock` is that of the call that made it."""
        number = len(self.all)
        stride = tuple(tensor.stride()) if tensor.layout == torch.strided else ()
        info = TensorInfo(tuple(tensor.shape), stride, tensor.dtype, tensor.requires_grad)
        storage = storage_of(tensor)
        self.all.append(Value(number, info, source, storage, clock))
        if id(tensor) not in self._number_of:
            self._aliases[storage].append(tensor)
        self._number_of[id(tensor)] = number
        self._version_of[id(tensor)] = tensor._version
        self._holder.append(tensor)
        if self._seen is not None:
            self._seen(number, tensor)
        return number

    def find(self, tensor: torch.Tensor) -> int | None:
        """The value that a tensor holds, if it was ever seen."""
        return self._number_of.get(id(tensor))

    def tensors(self) -> list[torch.Tensor]:
        """The tensors that held the values, in order of numbers."""
        return self._holder

    def tensor(self, number: int) -> torch.Tensor:
        """The tensor that held a value."""
        return self._holder[number]

    def changed_unseen(self, tensor: torch.Tensor) -> bool:
        """Whether a known tensor was changed since it was last seen; asks only once."""
        changed = tensor._version != self._version_of[id(tensor)]
        self._version_of[id(tensor)] = tensor._version
        return changed

    def change(self, tensors: Iterable[torch.Tensor], clock: int) -> Changes:
        """New versions for all that shares storage with tensors that a call changed."""
        pairs: list[tuple[int, int]] = []
        buffers: list[str] = []
        parameters: list[str] = []
        given = list(tensors)
        if not given:
            return _NO_CHANGES
        # Batch norms count no change of their statistics at all, which no backward needs.
        counted = {storage_of(t) for t in given if t._version != self._version_of.get(id(t))}
        storages = {storage_of(tensor) for tensor in given}
        self.changed_storages |= storages
        unknown = False
        for storage in storages:
            for tensor in self._aliases[storage]:
                old = self._number_of[id(tensor)]
                same = tensor._version == self._version_of[id(tensor)]
                unknown = unknown or (same and storage in counted)
                self._version_of[id(tensor)] = tensor._version
                match self.all[old].source:
                    case ParameterSource(name):
                        parameters.append(name)
                    case BufferSource(name):
                        buffers.append(name)  # one object for the whole run: its owner changes it in place
                    case _:
                        pairs.append((old, self.add(tensor, CallSource(), clock)))
        return Changes(tuple(pairs), tuple(buffers), tuple(parameters), unknown)

    def changed_leaves(self) -> frozenset[int]:
        """Places of the batch's tensors that were changed in place."""
        changed = (value.source for value in self.all if value.storage in self.changed_storages)
        return frozenset(source.index for source in changed if isinstance(source, BatchLeaf))

    def result(self, tensor: torch.Tensor, clock: int, *, changed: bool) -> None:
        """Number a function's result.

        One that is the very input (`contiguous`, `to`) gets a new number too: on real parameters the same
        call may return a copy, and what follows must use that.
        """
        known = self.find(tensor)
        if known is None:
            self.add(tensor, CallSource(), clock)
        elif isinstance(self.all[known].source, CallSource) and not changed:
            self._renamed.append((id(tensor), known, self.add(tensor, CallSource(), clock)))

    def mark(self) -> int:
        """A moment to which `restore` can go back."""
        return len(self._renamed)

    def restore(self, mark: int, returned: Iterable[torch.Tensor]) -> None:
        """Leaving a module: what it did not return or change has again the number that it came with."""
        kept = {id(tensor) for tensor in returned}
        for key, before, after in reversed(self._renamed[mark:]):
            if key not in kept and self._number_of[key] == after:
                self._number_of[key] = before

    def require_grad(self, number: int) -> None:
        """Let a value require a gradient, and the tensor that holds it now."""
        tensor = self._holder[number]
        if tensor.is_floating_point():
            if not tensor.requires_grad:
                tensor.requires_grad_()
            value = self.all[number]
            info = dataclasses.replace(value.info, requires_grad=True)
            self.all[number] = dataclasses.replace(value, info=info)

    @property
    def same_tensor(self) -> dict[int, int]:
        """A value -> the earlier value of which it was the very same tensor."""
        return {after: before for _, before, after in self._renamed}
