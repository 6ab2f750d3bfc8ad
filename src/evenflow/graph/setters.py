"""Who set an attribute of a module: which of the calls that were open then are open still.

`for block in model.blocks: block.norm.eval()` says nothing to `block` when it is called. A call that stays
whole is repeated by its own code alone, so all calls that began after the setting must be taken apart.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from evenflow.graph.tree import ModuleCall


class Setters:
    """For each attribute that was set while a program ran, the calls that were open. `stack` is those now."""

    def __init__(self, stack: Sequence[ModuleCall]) -> None:
        self._stack = stack
        self._around: dict[tuple[int, str], tuple[ModuleCall, ...]] = {}  # by the module's id and the name

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note what is set meanwhile."""
        own = torch.nn.Module.__setattr__

        def setting(module: torch.nn.Module, name: str, value: Any) -> None:  # as Module.__setattr__
            self._around[id(module), name] = tuple(self._stack)
            own(module, name, value)

        torch.nn.Module.__setattr__ = setting  # type: ignore[assignment, method-assign]  # the patch is the point
        try:
            yield
        finally:
            torch.nn.Module.__setattr__ = own  # type: ignore[method-assign]

    def calls_since(self, module: torch.nn.Module, name: str) -> Sequence[ModuleCall]:
        """The open calls that began after the attribute was set; all modules' where nobody saw it set."""
        around = self._around.get((id(module), name.removeprefix("_buffers.")), self._stack[:1])
        return self._stack[sum(now is then for now, then in zip(self._stack, around, strict=False)) :]
