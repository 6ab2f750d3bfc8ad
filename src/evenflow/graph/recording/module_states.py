"""The Python state of a model's modules while a program runs: who changed which attributes.

What a module changes in its own forward, that forward does again, whole or not. What other code changed
before the call (`for block in model.blocks: block.norm.eval()`) would be missing where the module runs by its
own code alone: so all calls that began after the setting must be taken apart.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from evenflow.errors import RecordError
from evenflow.graph.nouns.tree import ModuleCall
from evenflow.graph.python.modules import python_state
from evenflow.graph.python.outside import Snapshot, changed_names
from evenflow.graph.recording.observe import patched


class ModuleStates:
    """The states of all modules; `self_changed` are attributes that modules changed in their own forward.

    `stack` has the calls that are open at any time.
    """

    def __init__(self, modules: Mapping[str, torch.nn.Module], stack: Sequence[ModuleCall]) -> None:
        self.self_changed: set[str] = set()
        self._modules, self._stack = modules, stack
        # The calls that were open when an attribute was set, by the module's id and the name.
        self._around: dict[tuple[int, str], tuple[ModuleCall, ...]] = {}
        self._parameters = {path: tuple(module._parameters) for path, module in modules.items()}
        self._start = {path: python_state(module) for path, module in modules.items()}
        self._expected = dict(self._start)  # but for changes by code that is not their own

    def watching(self) -> contextlib.AbstractContextManager[None]:
        """Note which calls are open when an attribute of a module is set meanwhile."""
        own = torch.nn.Module.__setattr__

        def setting(module: torch.nn.Module, name: str, value: Any) -> None:  # as Module.__setattr__
            self._around[id(module), name] = tuple(self._stack)
            own(module, name, value)

        return patched(torch.nn.Module, "__setattr__", setting)

    def _calls_since(self, module: torch.nn.Module, name: str) -> Sequence[ModuleCall]:
        """The open calls that began after the attribute was set; all modules' where nobody saw it set."""
        around = self._around.get((id(module), name.removeprefix("_buffers.")), self._stack[:1])
        return self._stack[sum(now is then for now, then in zip(self._stack, around, strict=False)) :]

    def note_foreign(self, call: ModuleCall, module: torch.nn.Module, state: Snapshot) -> None:
        """Note where other code changed the module since the program began: run whole, it would not be so."""
        if state == self._start[call.path]:
            return
        for name in changed_names(self._expected[call.path], state):
            for later in self._calls_since(module, name):
                owner = "its" if later is call else f"{call.path}'s"
                later.foreign = later.foreign or (
                    f"{owner} attribute {name} is changed while the program runs, before it is called"
                )

    def note_own_changes(self, call: ModuleCall, module: torch.nn.Module, before: Snapshot) -> None:
        """Note what a call changed of its module's attributes: then it stays whole."""
        after = python_state(module)
        changed = changed_names(before, after)
        if not changed:
            return
        self._expected[call.path] = after
        call.changed = tuple(call.inside + name for name in changed)
        call.whole_besides = call.whole
        self.self_changed.update(call.changed)
        call.whole = f"it changes its own attributes while it runs: {', '.join(changed)}"
        call.stateful = True

    def note_inner_changes(self, call: ModuleCall) -> None:
        """Note which modules inside a call changed their attributes while nobody looked."""
        for path, module in self._modules.items():
            if path.startswith(call.inside) and path != call.path:
                state = python_state(module)
                changed = changed_names(self._expected[path], state)
                names = tuple(f"{path}.{key}" for key in changed)
                self.self_changed.update(names)
                self._expected[path], call.stateful = state, call.stateful or bool(changed)
                call.recomputed += names if call.recomputes else ()

    def note_real_run(self, call: ModuleCall, attributes: Iterable[str]) -> None:
        """Note what a call changed that ran for real, and whose changes were put back."""
        names = [call.inside + name for name in attributes]
        call.stateful = bool(names)
        self.self_changed.update(names)

    def check_parameters(self) -> None:
        """Refuse parameters that come or go while the program runs."""
        for path, module in self._modules.items():
            if tuple(module._parameters) != self._parameters[path]:
                raise RecordError(
                    f"{path or 'the model'} makes or removes parameters while it runs, which no "
                    "optimizer would know: run it once before the pipeline is built"
                )
