"""A model that is cut in many ways is recorded once: how it is cut does not enter a recording."""

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from evenflow.graph.kernels.fakes import FakeParameters
from evenflow.graph.nouns.tree import CallTree
from evenflow.runtime.recorded import tracing


@contextlib.contextmanager
def recorded_once(trees: dict[Hashable, CallTree], *same: Hashable) -> Iterator[None]:
    """While this is entered what was recorded once is taken from `trees`, for whatever is the `same`.

    That is what makes the model; the program, the microbatch and whether it trains are looked at here.
    """
    record: Callable[..., CallTree] = tracing.record

    def known(
        program: Callable[[Any, Any], Any], model: torch.nn.Module, microbatch: Any, **options: Any
    ) -> CallTree:
        if options.get("first") or options.get("seen") or not isinstance(options["fakes"], FakeParameters):
            return record(program, model, microbatch, **options)
        leaves, spec = pytree.tree_flatten(microbatch)
        contents = (
            (leaf.dtype, leaf.shape, str(leaf.tolist())) if isinstance(leaf, torch.Tensor) else leaf
            for leaf in leaves
        )
        key = (*same, program, *contents, str(spec), model.training, torch.is_grad_enabled())
        if key not in trees:
            trees[key] = record(program, model, microbatch, **options)
        elif between := options.get("between"):
            between()
        return trees[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "record", known)
        yield
