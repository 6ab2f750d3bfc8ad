"""The module calls that are open while a program runs: where it is, at what time, and under what.

Time is a clock that goes on with each call, of a function or a module, and each return from a module: what
was made inside a call is told by it from what was there before. "Under what" is what torch was told:
autocast, checkpoints, settings.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from evenflow.graph.kernels.settings import Under, changed_since, settings_now
from evenflow.graph.nouns.template import NOTHING, Template
from evenflow.graph.nouns.tree import Call, ModuleCall
from evenflow.graph.python.modules import is_layer, reason_to_stay_whole


class OpenCalls:
    """The open calls, outermost first: `stack` begins with that of the program itself."""

    def __init__(self) -> None:
        self.stack = [ModuleCall("", 0, 0, NOTHING, True, autocast_now())]
        self.clock = 0
        self._counts: defaultdict[str, int] = defaultdict(int)  # of calls, by the module's path
        self._regions: dict[int, tuple[int, Any]] = {}  # by id of a checkpoint's hook, which is kept alive
        self._settings = settings_now()

    @property
    def innermost(self) -> ModuleCall:
        """The call that the program is in."""
        return self.stack[-1]

    @property
    def where(self) -> str:
        """The module that the program is in, as messages name it."""
        return self.innermost.path or "the loss function"

    def tick(self) -> int:
        """Let time go on; returns the new one."""
        self.clock += 1
        return self.clock

    def keep_whole(self, reason: str) -> None:
        """Say why the innermost call must not be taken apart; the first reason counts."""
        if self.innermost.whole is None:
            self.innermost.whole = reason

    def enter(self, module: torch.nn.Module, path: str, inputs: Template) -> ModuleCall:
        """Open the call of a module inside the innermost one."""
        clock, grad_enabled = self.tick(), torch.is_grad_enabled()
        call = ModuleCall(path, self._counts[path], clock, inputs, grad_enabled, autocast_now())
        call.region = self.region()
        call.whole, call.layer = reason_to_stay_whole(module), is_layer(module)
        told = changed_since(self._settings)
        call.foreign = f"it is called under other settings ({', '.join(told)})" if told else None
        self._counts[path] += 1
        self.innermost.children.append(call)
        self.stack.append(call)
        return call

    def leave(self) -> None:
        """Close the innermost call, whether it returned or raised."""
        call = self.stack.pop()
        self.innermost.looks |= call.looks
        self.tick()

    def forget_inside(self, call: ModuleCall) -> None:
        """Take a failed attempt's calls out of it, and out of the counts that name draws.

        What checkpoints among them would change again is the call's own from now on.
        """
        for inner in call.children:
            self._forget(inner, call)
        call.children.clear()

    def _forget(self, call: Call, whole: ModuleCall) -> None:
        if isinstance(call, ModuleCall):
            self._counts[call.path] -= 1
            whole.recomputed += call.recomputed
            for inner in call.children:
                self._forget(inner, whole)

    def region(self) -> int | None:
        """The checkpoint region that the program is in: a number of its own for each call of `checkpoint`.

        Non-reentrant checkpoints work through these hooks; torch has no public way to ask for them.
        """
        if self.innermost.region is not None:
            return self.innermost.region
        hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)  # a pair, or nothing
        if hooks is None:
            return None
        if getattr(hooks[0], "__module__", "") != "torch.utils.checkpoint":
            self.keep_whole("it runs under saved_tensors_hooks: enter them in a smaller module")
            return None
        number, _ = self._regions.setdefault(id(hooks[0]), (len(self._regions), hooks))
        return number

    def under_settings(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """A function as it is to be called again: under what torch was told since the program began."""
        told = changed_since(self._settings)
        if told and self.region() is not None:  # a checkpoint computes again under what is set by then
            self.keep_whole(f"it calls {name} in a checkpoint under other settings ({', '.join(told)})")
        return Under(function, told) if told else function


def autocast_now() -> tuple[tuple[str, Any], ...]:
    """The active autocasts, as a `FunctionCall` holds them."""
    kinds = ("cpu", "cuda")
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    active = ((kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind))
    return (*active, ("nesting", depth)) if depth else ()
