"""Blocks compiled by torch.compile, each as a whole: what fuses inside one never reaches over a cut.

A block is a module that stays whole and holds others. What it cannot be trusted with stays as it is: draws,
which are keyed by hooks, and modules that change Python values or put hooks on their backward.
"""

import inspect
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from evenflow.errors import ConfigError
from evenflow.graph.nouns.graph import ModuleTarget, Node


@dataclass(frozen=True, slots=True)
class Compiling:
    """Compile blocks with this backend of torch.compile."""

    backend: str

    @staticmethod
    def of(choice: bool | str) -> "Compiling | None":
        """What `pipeline(compile=…)` asks for. Raises `ConfigError` for a backend that torch does not know.

        >>> Compiling.of(True), Compiling.of(False)
        (Compiling(backend='inductor'), None)
        """
        if choice is False:
            return None
        backend = "inductor" if choice is True else choice
        known = torch.compiler.list_backends(exclude_tags=())
        if backend not in known:
            raise ConfigError(
                f"compile={choice!r} is neither True nor False, nor a backend of torch.compile here: "
                f"{', '.join(known)}"
            )
        return Compiling(backend)

    def of_module(self, module: torch.nn.Module) -> Callable[..., Any]:
        """What to call in the place of a module."""
        # Else blocks of one class share a limit of recompilations, beyond which some would run uncompiled.
        apart: dict[str, Any] = {"isolate_recompiles": True}
        apart = apart if apart.keys() <= inspect.signature(torch.compile).parameters.keys() else {}
        compiled: Callable[..., Any] = torch.compile(module, backend=self.backend, **apart)
        # torch notes that on the module itself, where the next recording would see another model.
        vars(module).pop("_is_torch_compile", None)
        return compiled


def refusal(node: Node, model: torch.nn.Module) -> str | None:
    """Why a node is not compiled, in words that follow its name; None where it is."""
    if not isinstance(node.target, ModuleTarget):
        return "is no module"
    if next(model.get_submodule(node.target.path).children(), None) is None:
        return "holds no other module"
    if node.target.draws:
        return "draws random numbers"
    if node.stateful or node.hooks or node.opaque or node.kept_buffers:
        return "keeps what one call leaves to another, or has hooks"
    return None


def told(nodes: Iterable[Node], compiled: Collection[int], model: torch.nn.Module, *, splits: bool) -> str:
    """What of a stage's nodes is `compiled`, for people; `splits`: its schedule parts backwards."""
    why = {
        node.name: refusal(node, model) or "has parameters that others share"
        for node in nodes
        if node.index not in compiled
    }
    examples = {reason: name for name, reason in reversed(why.items())}  # the first of each
    left = ", ".join(f"{name} {reason}" for reason, name in reversed(examples.items()))
    whole = "; the gradients of their weights come with those of their inputs" if splits and compiled else ""
    number = len(compiled) + len(why)
    return f"compiles {len(compiled)} of {number} nodes{f' ({left})' if left else ''}{whole}"
