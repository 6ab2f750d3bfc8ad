"""Recipes: how the numbers of a tensor came about, kept as kernel calls that can be made again elsewhere.

A `Memory` is what a storage is to a recipe: who wrote it, in order. It hangs on torch's own storage object,
which lives exactly as long as the memory behind it: no ids that could be used twice, and a recipe that nobody
needs is collected with its tensors. A call refers to memories through `View`s (offset, shape, strides), so
that views, `.data` and `detach` need no record, and no recipe holds a tensor that was made on the way.

The numbers of a tensor are the backward slice over its memory, run again in the order of the calls. Draws
are keyed by the first tensor (in the model's order) whose slice they stand in and their place in that slice:
they depend on no other tensor, no split and no rank.
"""

import bisect
import hashlib
import itertools
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from evenflow.errors import ConfigError
from evenflow.graph.kernels.kernels import generator_of

# Kernels and initialisers that write every element of their first argument and read none of it.
OVERWRITING = frozenset(
    {"normal_", "uniform_", "zero_", "fill_", "copy_", "random_", "bernoulli_", "exponential_", "log_normal_"}
    | {"_no_grad_trunc_normal_", "orthogonal_", "sparse_", "dirac_"}
)
_LINK = "_evenflow_memory"  # the attribute of a storage that leads to its memory
_NUMBERS = itertools.count()  # of calls, in the order in which they were made


@dataclass(frozen=True, slots=True)
class Given:
    """Numbers that came from outside: all bytes of a storage, and what tells that they were changed since."""

    tensor: torch.Tensor
    version: int

    def copied(self, device: torch.device, owner: str) -> torch.UntypedStorage:
        """A copy of the storage; raises `ConfigError` where it has no numbers, or no longer those of then."""
        if not self.tensor.is_inference() and self.tensor._version != self.version:
            raise ConfigError(
                f"{owner} is initialised from a tensor of shape {list(self.tensor.shape)} that was changed "
                "after deferred_init(); leave that tensor as it is until the pipeline is built"
            )
        if self.tensor.is_meta:
            raise ConfigError(
                f"{owner} is initialised from a tensor of shape {list(self.tensor.shape)} without memory "
                "(device 'meta') that was made outside of deferred_init(); make it inside"
            )
        return whole(self.tensor.untyped_storage()).to(device, copy=True).untyped_storage()


@dataclass(slots=True, eq=False, weakref_slot=True)
class Memory:
    """A storage in recipes: its size, the numbers that it began with (None: a call made it), its writers."""

    num_bytes: int
    given: Given | None = None
    writers: list["KernelCall"] = field(default_factory=list)
    label: str = ""  # "Linear.weight", for messages
    twin: "weakref.ref[torch.UntypedStorage] | None" = None  # the empty storage that stands for a real one


@dataclass(frozen=True, slots=True)
class View:
    """A tensor in a recipe: where it lies in a memory."""

    memory: Memory
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def over(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """The same view of real (or empty) bytes."""
        return torch.empty(0, dtype=self.dtype, device=storage.device).set_(
            storage, self.offset, self.shape, self.strides
        )

    def overlaps(self, other: "View") -> bool:
        """Whether the two spans of bytes meet."""
        (a, b), (c, d) = self.span(), other.span()
        return self.memory is other.memory and a < d and c < b

    def span(self) -> tuple[int, int]:
        """The first byte, and the one after the last."""
        if 0 in self.shape:
            return 0, 0
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        item = self.dtype.itemsize
        return self.offset * item, (self.offset + last + 1) * item


@dataclass(slots=True, eq=False)
class KernelCall:
    """One kernel that ran: its arguments with views for tensors, what it read, made and wrote."""

    kernel: Any  # an OpOverload
    args: Any
    kwargs: Any
    read: tuple[Memory, ...]
    made: tuple[tuple[int, Memory], ...]  # (place among the results, memory that this call made)
    overwritten: Memory | None  # whose earlier numbers do not matter any more
    draws: bool
    looked_at: bool = False  # its numbers decided what the code did next
    number: int = field(default_factory=lambda: next(_NUMBERS))


def memory_of(tensor: torch.Tensor) -> Memory | None:
    """The memory of a tensor that a recipe knows."""
    try:
        link = vars(tensor.untyped_storage()).get(_LINK)
    except (NotImplementedError, RuntimeError):  # sparse and other tensors without a storage
        return None
    return link() if isinstance(link, weakref.ref) else link


def learn(storage: torch.UntypedStorage, memory: Memory, *, weak: bool = False) -> None:
    """Let a storage lead to its memory: `weak` where the memory holds that very storage for its numbers."""
    setattr(storage, _LINK, weakref.ref(memory) if weak else memory)


def forget(storage: torch.UntypedStorage) -> None:
    """From now on take what a storage holds for numbers from outside."""
    vars(storage).pop(_LINK, None)


def view_of(tensor: torch.Tensor) -> View:
    """Where a tensor lies; one that no recorded call made is numbers from outside."""
    memory = memory_of(tensor)
    if memory is None:
        storage = tensor.untyped_storage()
        memory = Memory(storage.nbytes(), _given(tensor if type(tensor) is torch.Tensor else tensor.detach()))
        learn(storage, memory, weak=True)
    return View(memory, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def twin_of(tensor: torch.Tensor) -> torch.Tensor:
    """An empty tensor over the memory of a real one: what is written to either is written to both."""
    view = view_of(tensor)
    memory = view.memory
    storage = memory.twin() if memory.twin is not None else None
    if storage is None:
        storage = torch.empty(memory.num_bytes, dtype=torch.uint8, device="meta").untyped_storage()
        learn(storage, memory)
        memory.twin = weakref.ref(storage)
    return view.over(storage)


def keep_before_writing(tensor: torch.Tensor) -> None:
    """Copy numbers from outside that a recipe refers to, because the tensor is about to be changed."""
    memory = memory_of(tensor)
    if memory is not None and memory.given is not None:
        ours, theirs = memory.given.tensor.untyped_storage(), tensor.untyped_storage()
        if ours._cdata == theirs._cdata:
            memory.given = _given(whole(theirs).clone())


def whole(storage: torch.UntypedStorage) -> torch.Tensor:
    """All bytes of a storage as one tensor."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(
        storage, 0, (storage.nbytes(),), (1,)
    )


def _given(tensor: torch.Tensor) -> Given:
    return Given(tensor, 0 if tensor.is_inference() else tensor._version)


def slice_of(memories: Iterable[Memory]) -> list[KernelCall]:
    """The calls that the present numbers of these memories came from, in order."""
    calls: dict[int, KernelCall] = {}
    seen: dict[Memory, float] = {}
    todo: list[tuple[Memory, float]] = [(memory, float("inf")) for memory in memories]
    while todo:
        memory, before = todo.pop()
        if seen.get(memory, -1) >= before:
            continue
        seen[memory] = before
        end = bisect.bisect_left(memory.writers, before, key=lambda call: call.number)
        for call in reversed(memory.writers[:end]):
            if call.number not in calls:
                calls[call.number] = call
                todo += [(read, call.number) for read in call.read]
            if call.overwritten is memory:
                break
    return [calls[number] for number in sorted(calls)]


class Replay:
    """Real bytes for the memories of some calls that are made again."""

    def __init__(self, device: torch.device, owner: str) -> None:
        self._device, self._owner = device, owner
        self._storages: dict[Memory, torch.UntypedStorage] = {}

    def run(self, calls: Iterable[KernelCall], seeds: Mapping[int, int]) -> None:
        """Make the calls; `seeds` has one for each call that draws, by its number."""
        with torch.no_grad():
            for call in calls:
                if call.draws:
                    generator_of(self._device).manual_seed(seeds[call.number])
                result = call.kernel(*self.real(call.args), **self.real(call.kwargs))
                leaves = pytree.tree_leaves(result)
                for place, memory in call.made:
                    storage = leaves[place].untyped_storage()
                    assert storage.nbytes() == memory.num_bytes, f"{call.kernel} made another shape"
                    if "empty" in call.kernel.__name__:
                        whole(storage).zero_()  # what nobody initialises is at least the same everywhere
                    self._storages[memory] = storage

    def real(self, tree: Any) -> Any:
        """The arguments with real tensors on the device."""
        if isinstance(tree, View):
            return self.tensor(tree)
        if isinstance(tree, (list, tuple)):
            return type(tree)([self.real(leaf) for leaf in tree])
        if isinstance(tree, dict):
            return {key: self.real(leaf) for key, leaf in tree.items()}
        return self._device if isinstance(tree, torch.device) else tree

    def tensor(self, view: View) -> torch.Tensor:
        """A real tensor."""
        memory = view.memory
        if memory not in self._storages:
            if memory.given is None:  # whatever made it was overwritten
                self._storages[memory] = torch.empty(
                    memory.num_bytes, dtype=torch.uint8, device=self._device
                ).untyped_storage()
            else:
                self._storages[memory] = memory.given.copied(self._device, self._owner)
        return view.over(self._storages[memory])


class Recipes:
    """The recipes of a model's tensors, and the key of every draw in them.

    `tensors` are all that may be wanted, by name and in the model's order, on every rank the same ones: a
    draw that several of them come from is keyed by the first.

    >>> with torch.device("meta"):
    ...     weight = torch.nn.Parameter(torch.empty(3))
    >>> Recipes({"weight": weight}, seed=0).unknown
    ['weight']
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], *, seed: int) -> None:
        found = {name: memory_of(tensor) for name, tensor in tensors.items() if tensor.is_meta}
        self.unknown = [name for name, memory in found.items() if memory is None]
        self._views = {name: view_of(tensors[name]) for name, memory in found.items() if memory is not None}
        self._seeds: dict[int, int] = {}
        for name, view in self._views.items():
            for ordinal, call in enumerate(call for call in slice_of([view.memory]) if call.draws):
                if call.looked_at:
                    raise ConfigError(
                        f"the initialisation of {name} looks at the random numbers that it has drawn, "
                        "inside deferred_init(), which draws others later; initialise without looking, or "
                        "build the model without deferred_init()"
                    )
                self._seeds.setdefault(call.number, _key(seed, name, ordinal))

    def __contains__(self, name: str) -> bool:
        return name in self._views

    def overlapping(self) -> tuple[str, str] | None:
        """Two tensors that are different views of the same bytes: made apart, they would no longer be."""
        by_memory: dict[Memory, list[str]] = {}
        for name, view in self._views.items():
            for other in by_memory.setdefault(view.memory, []):
                if view != self._views[other] and view.overlaps(self._views[other]):
                    return other, name
            by_memory[view.memory].append(name)
        return None

    def materialise(self, name: str, device: torch.device) -> torch.Tensor:
        """The tensor's numbers, in memory of its own on the device; nothing else is left allocated.

        Raises `ConfigError` where numbers that were given from outside have changed since. The generators
        are left as they were.
        """
        view = self._views[name]
        replay = Replay(device, name)
        generator = generator_of(device)
        state = generator.get_state()
        try:
            replay.run(slice_of([view.memory]), self._seeds)
        finally:
            generator.set_state(state)
        made = replay.tensor(view)
        is_part = made.numel() * made.element_size() != view.memory.num_bytes
        return made.clone() if is_part else made  # a part would keep all of it


def _key(seed: int, name: str, ordinal: int) -> int:
    text = f"{seed}/{ordinal}/{name}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
