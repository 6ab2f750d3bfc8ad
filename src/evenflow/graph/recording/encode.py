"""Writing arguments and results down: each tensor as the number of the value that it holds.

What cannot be seen is never guessed. A tensor that appears from nowhere (`torch.from_numpy`, say) marks the
module call that used it as `whole`: it will run as the module's own code.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from evenflow.graph.nouns.template import NOTHING, Ref, Template, flatten_tree, is_plain, is_tensor
from evenflow.graph.nouns.tree import BufferSource, CallSource, FunctionCall, never
from evenflow.graph.recording.constants import Constants
from evenflow.graph.recording.objects import Objects
from evenflow.graph.recording.open_calls import OpenCalls
from evenflow.graph.recording.values import Values

PLAIN_KINDS = {torch.Tensor, torch.nn.Parameter, FakeTensor}  # no subclass of a user's


class Encoder:
    """Makes templates of trees. `unseen` has the tensors, by id, that came from nowhere."""

    def __init__(
        self,
        calls: OpenCalls,
        values: Values,
        constants: Constants,
        objects: Objects,
        modules: Mapping[str, torch.nn.Module],
    ) -> None:
        self.unseen: dict[int, torch.Tensor] = {}
        self._calls, self._values, self._constants = calls, values, constants
        self._objects, self._modules = objects, modules

    def encode(self, tree: Any, used_by: str) -> Template:  # any tree
        """The template of arguments or of a result."""
        leaves, spec = flatten_tree(tree)
        return Template(tuple(self.leaf(leaf, used_by) for leaf in leaves), spec)

    def returned(self, result: Any) -> Template:
        """What the program returned; tensors inside its objects are returned too."""
        leaves, spec = flatten_tree(result)
        what = "the result of the loss function"
        shells = (
            None if is_tensor(leaf) or is_plain(leaf) else self._objects.shell(leaf, what) for leaf in leaves
        )
        encoded = (
            self.leaf(leaf, what) if shell is None else shell
            for leaf, shell in zip(leaves, shells, strict=True)
        )
        return Template(tuple(encoded), spec)

    def leaf(self, leaf: Any, used_by: str) -> Any:  # any leaf, and what stands for it
        """One leaf of a template."""
        if is_tensor(leaf):
            return Ref(self.number(leaf, used_by))
        if is_plain(leaf):
            return leaf
        if isinstance(leaf, torch.Generator):
            self._calls.keep_whole(f"{used_by} draws from a torch.Generator of its own")
        return self._objects.shared(leaf, used_by)

    def number(self, tensor: torch.Tensor, used_by: str) -> int:
        """The value that this tensor holds now; one of unseen origin marks the current call as whole."""
        known = self._values.find(tensor)
        if known is not None:
            if self._values.changed_unseen(tensor):
                self._calls.keep_whole(
                    f"a tensor was changed in place, before {used_by}, by something that cannot be recorded"
                )
            return known
        for path, module in self._modules.items():
            for key, attribute in vars(module).items():
                if attribute is tensor:
                    return self._values.add(tensor, BufferSource(f"{path}.{key}" if path else key))
        constant = self._constants.name(tensor, used_by)
        if constant is not None:
            return self._values.add(tensor, BufferSource(constant))
        return self._from_nowhere(tensor, used_by)

    def _from_nowhere(self, tensor: torch.Tensor, used_by: str) -> int:
        """The current call stays whole, and may have used any parameter inside it."""
        shape, kind = list(tensor.shape), type(tensor)
        plain = kind in PLAIN_KINDS
        self._calls.keep_whole(
            f"a {tensor.dtype} {'tensor' if plain else kind.__name__} of shape {shape}, used by "
            f"{used_by or 'the model'}, came from an operation that cannot be recorded"
            + ("" if plain else " (as_subclass); hand plain tensors to layers with parameters")
        )
        inside = self._calls.innermost
        inside.unseen = True
        self.unseen[id(tensor)] = tensor
        clock = self._calls.tick()
        number = self._values.add(tensor, CallSource(), clock)
        output = Template((Ref(number),), NOTHING.spec)
        inside.children.append(
            FunctionCall(never, "an unseen operation", inside.path, clock, NOTHING, output)
        )
        return number
