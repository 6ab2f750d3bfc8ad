"""Activations offloaded: what autograd keeps of a microbatch waits for its backward in the host's memory.

When a microbatch's forward has ended, the large memories that autograd keeps for its backward are copied to
the host and let go of; they are brought back when the backward is next. So a stage holds on its device what
one microbatch saves, and not what all do that are on their way. Numbers are copied and never computed, so
every bit stays.

On CUDA the host's memory is pinned, copies run on a stream of their own beside the computing, and the
backward waits for each memory by its event. On the CPU the "host" is memory that no tensor has: nothing is
gained by that, but what the rank's tensors take can be measured as on a GPU.

What is there anyway (parameters, buffers, the batch) is not moved. Rejected: to copy each tensor as it is
saved, which would part one memory into its views, and miss what the forward changes of it afterwards.
"""

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, final

import numpy as np
import torch

from evenflow.errors import RecordError
from evenflow.graph.kernels.fakes import storage_of
from evenflow.plan.costs.offload import LEAST_BYTES

_FORBIDDEN = (
    "a stage calls torch.func.grad or one of its kin, which allow no hooks on what is kept; "
    "offload= needs them: leave offload= out"
)
_Buffer: TypeAlias = Any  # of a host: what it copies into


class _Host(Protocol):
    """Where memories wait. `bring` tells by an event when the copy is there; by None: at once."""

    def buffer(self, num_bytes: int) -> _Buffer: ...
    def take(self, memory: torch.Tensor, buffer: _Buffer) -> None: ...
    def bring(self, buffer: _Buffer) -> tuple[torch.Tensor, torch.cuda.Event | None]: ...


@final
class _OnCpu:
    """Memory of the process that belongs to no tensor."""

    def buffer(self, num_bytes: int) -> _Buffer:
        return np.empty(num_bytes, np.uint8)

    def take(self, memory: torch.Tensor, buffer: _Buffer) -> None:
        buffer[:] = memory.numpy()

    def bring(self, buffer: _Buffer) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        memory = torch.empty(len(buffer), dtype=torch.uint8)
        memory.numpy()[:] = buffer
        return memory, None


@final
class _OnHost:
    """Pinned memory beside a GPU. A stage's copies are all on one stream, so that buffers can be reused."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def buffer(self, num_bytes: int) -> _Buffer:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def take(self, memory: torch.Tensor, buffer: _Buffer) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            buffer.copy_(memory, non_blocking=True)
        memory.record_stream(self._stream)  # its memory is used again only after the copy

    def bring(self, buffer: _Buffer) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        with torch.cuda.stream(self._stream):  # waits for nothing that is being computed
            memory = torch.empty(len(buffer), dtype=torch.uint8, device=self._device)
            memory.copy_(buffer, non_blocking=True)
            return memory, self._stream.record_event()


@final
class Offload:
    """Moves what autograd keeps on a device to the host, and back: one for each stage."""

    def __init__(self, device: torch.device, *, least_bytes: float = LEAST_BYTES) -> None:
        self.device, self.least_bytes = device, least_bytes
        self.host: _Host = _OnHost(device) if device.type == "cuda" else _OnCpu()
        self._free: defaultdict[int, list[_Buffer]] = defaultdict(list)  # by size; made once, used each step

    def buffer(self, num_bytes: int) -> _Buffer:
        """A buffer on the host, for one memory."""
        free = self._free[num_bytes]
        return free.pop() if free else self.host.buffer(num_bytes)

    def give_back(self, buffer: _Buffer) -> None:
        """Take a buffer that nobody reads any more."""
        self._free[len(buffer)].append(buffer)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in its memory, and how that is read."""

    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    is_conj: bool
    is_neg: bool

    @staticmethod
    def of(tensor: torch.Tensor) -> "Place":
        """That of a tensor."""
        offset = int(tensor.storage_offset())
        return Place(tensor.dtype, offset, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())

    def over(self, memory: torch.UntypedStorage) -> torch.Tensor:
        """The tensor that lies there in another memory."""
        empty = torch.empty(0, dtype=self.dtype, device=memory.device)
        tensor = empty.set_(memory, self.offset, self.shape, self.stride)
        tensor = tensor.conj() if self.is_conj else tensor
        return torch._neg_view(tensor) if self.is_neg else tensor  # noqa: SLF001 (torch's only way)


class _Memory:
    """One memory of the device, which waits on the host. It lives while autograd keeps any tensor in it."""

    def __init__(self, memory: torch.Tensor, offload: Offload) -> None:
        self._offload, self.num_bytes = offload, len(memory)
        self._buffer: _Buffer | None = offload.buffer(len(memory))
        offload.host.take(memory, self._buffer)
        self._memory: torch.Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def bring(self) -> torch.Tensor:
        """The memory on the device, or on its way there."""
        if self._memory is None:
            self._memory, self._event = self._offload.host.bring(self._buffer)
            self._offload.give_back(self._buffer)
            self._buffer = None
        return self._memory

    def there(self) -> torch.UntypedStorage:
        """The memory on the device, for what is computed next."""
        memory = self.bring()
        if self._event is not None:
            stream = torch.cuda.current_stream(self._offload.device)
            stream.wait_event(self._event)
            memory.record_stream(stream)
        return memory.untyped_storage()


class _Kept:
    """A tensor that autograd keeps; once its memory has left, only its place in that."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor: torch.Tensor | None = tensor
        self._version = tensor._version  # (torch counts changes in place there)
        self._changed = False
        self._memory: _Memory | None = None
        self._place = Place.of(tensor)

    def leave(self, memories: dict[int, _Memory], offload: Offload) -> _Memory:
        """Let go of the tensor; its memory is copied where no other's with it was."""
        tensor = self._tensor
        assert tensor is not None, "it leaves once"
        number = storage_of(tensor)
        if number not in memories:
            flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
            memories[number] = _Memory(flat, offload)
        self._changed = tensor._version != self._version
        self._memory, self._tensor = memories[number], None
        return self._memory

    def tensor(self) -> torch.Tensor:
        """The tensor, brought back if it has left."""
        if self._changed:  # as autograd says it of what it keeps itself, which hooks cannot have it do
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace "
                "operation after it was saved"
            )
        if self._tensor is not None:
            return self._tensor
        assert self._memory is not None, "it has left"
        return self._place.over(self._memory.there())


@contextlib.contextmanager
def hooks_allowed(otherwise: str) -> Iterator[None]:
    """Say what to do where torch.func.grad is called, which allows no hooks on what is kept."""
    try:
        yield
    except RuntimeError as error:
        if "support saved tensor hooks" not in str(error):
            raise
        raise RecordError(otherwise) from error


@final
class Away:
    """What of one microbatch of one stage waits on the host.

    >>> away = Away(Offload(torch.device("cpu"), least_bytes=64), fixed=())
    >>> x = torch.ones(32, requires_grad=True)
    >>> with away.hooks(), away.leaving():
    ...     y = (x * 2).exp()
    >>> away.num_bytes, float(torch.autograd.grad(y.sum(), x)[0][0])
    (128, 14.7781...)
    """

    def __init__(self, offload: Offload, *, fixed: Iterable[torch.Tensor]) -> None:
        self._offload = offload
        self._fixed = {storage_of(tensor) for tensor in fixed}
        self._found: list[_Kept] = []
        self._left: list[weakref.ref[_Memory]] = []
        self.num_bytes = 0

    def pack(self, tensor: torch.Tensor) -> object:
        """What autograd is to keep in the place of a tensor."""
        if not self._moves(tensor):
            return tensor
        self._found.append(_Kept(tensor))
        return self._found[-1]

    def unpack(self, packed: object) -> torch.Tensor:
        """The tensor itself."""
        if isinstance(packed, _Kept):
            return packed.tensor()
        assert isinstance(packed, torch.Tensor), "as it was packed"
        return packed

    def _moves(self, tensor: torch.Tensor) -> bool:
        return (
            type(tensor) is torch.Tensor
            and tensor.layout is torch.strided
            and tensor.device == self._offload.device
            and tensor.untyped_storage().nbytes() >= self._offload.least_bytes
            and storage_of(tensor) not in self._fixed
        )

    def hooks(self) -> contextlib.AbstractContextManager[object]:
        """Around what keeps tensors."""
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """Around a microbatch's forward: what it kept leaves when it has ended."""
        with hooks_allowed(_FORBIDDEN):
            yield
        memories: dict[int, _Memory] = {}
        for kept in self._found:
            kept.leave(memories, self._offload)
        self._found.clear()
        self.num_bytes = sum(memory.num_bytes for memory in memories.values())
        self._left = [weakref.ref(memory) for memory in memories.values()]

    def bring_back(self) -> None:
        """Begin to bring all of it back: what was kept last, which the backward takes first, comes first."""
        for reference in reversed(self._left):
            memory = reference()
            if memory is not None:
                memory.bring()
        self._left.clear()
