"""Numbers of buffers that a backward will look at, kept as its microbatch's forward left them.

Autograd keeps tensors themselves. A buffer that the next microbatch's forward changes would raise an error in
the backward, or, if it is changed through `.data`, give wrong gradients. So whatever is kept of such a
buffer's memory is, when the forward ends, replaced by a copy: the numbers that a plain loop's backward, which
follows at once, would find. Rejected: copies for each reader, which would miss what is changed after it read.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch

from evenflow.graph.kernels.fakes import storage_of
from evenflow.runtime.program.offload import Away, Place, hooks_allowed


class _Kept:
    """A kept tensor; once the forward has ended, one over a copy of its memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@contextlib.contextmanager
def kept_as_left(buffers: Iterable[torch.Tensor], *, others: Away | None = None) -> Iterator[None]:
    """Let autograd keep the numbers that these buffers have when the context ends.

    `others` is handed whatever else it keeps: of several hooks on saved tensors torch calls the last alone.
    """
    memories = {storage_of(buffer) for buffer in buffers}
    found: list[_Kept] = []

    def pack(tensor: torch.Tensor) -> object:
        if storage_of(tensor) not in memories:
            return tensor if others is None else others.pack(tensor)
        found.append(_Kept(tensor))
        return found[-1]

    def unpack(packed: object) -> torch.Tensor:
        if isinstance(packed, _Kept):
            return packed.tensor
        if others is not None:
            return others.unpack(packed)
        assert isinstance(packed, torch.Tensor), "as it was packed"
        return packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack), hooks_allowed(_OF_BUFFERS):
        yield
    copies: dict[int, torch.UntypedStorage] = {}
    for kept in found:
        memory = storage_of(kept.tensor)
        if memory not in copies:
            copies[memory] = kept.tensor.untyped_storage().clone()
        kept.tensor = Place.of(kept.tensor).over(copies[memory])


_OF_BUFFERS = (
    "a stage calls torch.func.grad or one of its kin, and its backward may look at a buffer that the "
    "program changes: the one forbids what the other needs; hand functions a clone() of the buffer"
)


def buffers_at(model: torch.nn.Module, names: Iterable[str]) -> list[torch.Tensor]:
    """Those of a model's buffers, or of its modules' other attributes, that are tensors now."""
    places = (name.rpartition(".") for name in names)
    found = (getattr(model.get_submodule(path), key, None) for path, _, key in places)
    return [each for each in found if isinstance(each, torch.Tensor)]
