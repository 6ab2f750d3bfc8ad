"""What kernels did, as far as the recording must know: of the function that runs, and to memory.

Kernels see what Python does not: draws, FLOPs, shapes that numbers decide, changes in place of tensors that
nobody handed over.
"""

from collections.abc import Iterable

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from evenflow.graph.kernels.fakes import storage_of
from evenflow.graph.recording.needs_numbers import no_subclass
from evenflow.graph.recording.open_calls import OpenCalls


class KernelNotes:
    """What is noted; `own` are tensors that the run may work on.

    - Of the function that runs: `num_draws` and `flops`; `deciding`, what decides the shape of a kernel's
      result by its numbers; `known`, results of a kernel on fakes that are real, for other arguments decide
      them; `changed`, the ids of tensors that a kernel changes without saying so.
    - `born`: memory that the run made, by `storage_of`.
    - Inside a whole function, `within` is the memory that it was given or made; `captured` says whether it
      used other memory.
    - `all_fake` makes fake what a kernel would make of nothing: a mask of all positions.
    """

    def __init__(self, calls: OpenCalls, own: Iterable[torch.Tensor]) -> None:
        self.num_draws = self.flops = 0
        self.deciding: list[torch.Tensor] = []
        self.known: list[torch.Tensor] = []
        self.changed: set[int] = set()
        self.born = {storage_of(tensor) for tensor in own}
        self.within: set[int] | None = None
        self.captured = False
        self.all_fake: FakeTensorMode | None = None
        self._calls = calls
        self._outside: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # written to: (it, a copy)

    def reset(self) -> None:
        """Another function begins."""
        self.num_draws = self.flops = 0
        self.deciding.clear()
        self.known.clear()
        self.changed.clear()

    def no_subclass(self, name: str, kind: type[torch.Tensor]) -> Exception:
        """What to raise where a subclass of Tensor meets a fake one."""
        return no_subclass(name, kind, self._calls.where)

    def write_outside(self, tensor: torch.Tensor) -> None:
        """Remember the numbers of a tensor that is not the run's own, to put them back."""
        if storage_of(tensor) not in self.born and id(tensor) not in self._outside:
            self._outside[id(tensor)] = (tensor, tensor.detach().clone())

    def put_back(self) -> None:
        """Give tensors that are not the run's own their numbers back."""
        for written, before in self._outside.values():
            with torch.no_grad():
                written.copy_(before)
