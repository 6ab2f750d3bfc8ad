"""A model that is cut in many ways is recorded once: how it is cut does not enter a recording."""

import contextlib
import copy
import functools
from collections.abc import Callable, Hashable, Iterator
from types import FunctionType, MethodType
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from evenflow.graph.kernels.fakes import FakeParameters
from evenflow.graph.nouns.template import Shared, Shell, Template
from evenflow.graph.nouns.tree import Call, CallTree, ReadCall, walk
from evenflow.runtime.recorded import tracing


@contextlib.contextmanager
def recorded_once(trees: dict[Hashable, CallTree], *same: Hashable) -> Iterator[None]:
    """While this is entered what was recorded once is taken from `trees`, for whatever is the `same`.

    That is what makes the model; what else a recording depends on is looked at here: the program, the
    microbatch, parameters as they will be, whether it trains, the device, autocast. What differed when it ran
    again is not kept: the second recording, which decides, must meet what the first left behind. Nor is what
    changed the model, which is looked at afterwards, or holds modules, which are those of one model.
    """
    record: Callable[..., CallTree] = tracing.record

    def known(
        program: Callable[[Any, Any], Any], model: torch.nn.Module, microbatch: Any, **options: Any
    ) -> CallTree:
        if options.get("first") or options.get("seen") or not isinstance(options["fakes"], FakeParameters):
            return record(program, model, microbatch, **options)
        fakes = [(fake.dtype, fake.requires_grad) for _, _, fake in options["fakes"].slots]
        modes = (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
        leaves, spec = pytree.tree_flatten(microbatch)
        contents = (
            (leaf.dtype, leaf.shape, str(leaf.tolist())) if isinstance(leaf, torch.Tensor) else leaf
            for leaf in leaves
        )
        key = (*same, program, *contents, str(spec), *fakes, options["device"], model.training, *modes)
        if key not in trees:
            made = record(program, model, microbatch, **options)
            if made.difference is None and not made.as_first.self_changed and not holds_modules(made):
                trees[key] = made
            return made
        if between := options.get("between"):
            between()
        return trees[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "record", known)
        yield


def holds_modules(tree: CallTree) -> bool:
    """Whether a call was handed, or gave, a module, what is bound to one, or an object with one inside."""
    templates = [template for call in walk(tree.root) for template in _written(call)]
    return any(_holds_modules(leaf) for template in templates for leaf in template.leaves)


def _written(call: Call) -> list[Template]:
    return [call.args] if isinstance(call, ReadCall) else [call.args, call.output]


def _holds_modules(leaf: Any) -> bool:
    match leaf:
        case torch.nn.Module() | MethodType() | FunctionType() | functools.partial():
            return True
        case Shared(prototype=prototype, keep=keep) | Shell(prototype=prototype, keep=keep):
            met = _Met(keep)
            copy.deepcopy(prototype, met)
            return met.any
    return False


class _Met(dict[int, Any]):
    """A memo for `deepcopy` that knows whether anything was found that was in it from the beginning."""

    def __init__(self, keep: dict[int, Any]) -> None:
        super().__init__(keep)
        self.kept, self.any = frozenset(map(id, keep.values())), False

    def get(self, key: int, default: Any = None) -> Any:
        self.any |= key in self.kept
        return super().get(key, default)
