"""Blocks compiled by torch.compile, each as a whole: what fuses inside one never reaches over a cut.

A block is a module that stays whole and holds others. torch compiles the code of a class once, not each
block. What it cannot be trusted with stays as it is: draws, which are keyed by hooks, and modules that
change Python values or put hooks on their backward.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from evenflow.errors import ConfigError
from evenflow.graph.graph import ModuleTarget, Node


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
        compiled: Callable[..., Any] = torch.compile(module, backend=self.backend)
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


def told(nodes: Iterable[Node], model: torch.nn.Module, *, splits: bool) -> str:
    """What is compiled of a stage's nodes, for people; `splits`: its schedule parts backwards."""
    why = {node.name: refusal(node, model) for node in nodes}
    compiled = sum(1 for reason in why.values() if reason is None)
    kinds = dict.fromkeys(reason for reason in why.values() if reason is not None)
    examples = (next(name for name, found in why.items() if found == reason) for reason in kinds)
    left = ", ".join(f"{name} {reason}" for name, reason in zip(examples, kinds, strict=True))
    whole = "; the gradients of their weights come with those of their inputs" if splits and compiled else ""
    return f"compiles {compiled} of {len(why)} nodes{f' ({left})' if left else ''}{whole}"
