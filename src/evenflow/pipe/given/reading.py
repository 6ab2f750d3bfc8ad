"""What a program returned: where its loss is, and what the rest is."""

from typing import Any

import torch
from torch.utils import _pytree as pytree

from evenflow.errors import ConfigError
from evenflow.graph.nouns.graph import Graph
from evenflow.graph.nouns.template import Ref
from evenflow.runtime.recorded.joining import Joining


def read_loss(output: Any) -> tuple[torch.Tensor | None, Any]:
    """Split what a loss function returned into (loss, metrics)."""
    return output if isinstance(output, tuple) and len(output) == 2 else (output, None)


def read_prediction(output: Any) -> tuple[torch.Tensor | None, Any]:
    """What `predict` computed has no loss: all of it is the rest."""
    return None, output


def has_metrics(graph: Graph) -> bool:
    """Whether the loss function returned metrics beside the loss."""
    return len(graph.output.leaves) > 1


def check_metrics(graph: Graph, joining: Joining) -> None:
    """Refuse metrics that `joining` does not suit; raises `ConfigError` naming them."""
    joining.check(read_loss(_returned(graph))[1], lambda leaf: isinstance(leaf, Ref))


def check_loss(graph: Graph) -> None:
    """Refuse a loss function whose result is no loss; raises `ConfigError` saying what it returned."""
    output = _returned(graph)
    loss: Any = read_loss(output)[0]
    if not isinstance(loss, Ref):
        raise ConfigError(
            f"the loss function returned {_named(output)}; "
            "it must return a scalar tensor, or (scalar tensor, metrics)"
        )
    info = graph.values[loss.value].info
    if len(info.shape) > 0:
        raise ConfigError(
            f"the loss function returned a tensor {info}, not a scalar; reduce it, for example with .mean()"
        )
    if not info.dtype.is_floating_point:
        raise ConfigError(
            f"the loss function returned a tensor {info}, which has no gradient; return a floating one"
        )


def check_trainable(graph: Graph) -> None:
    """Refuse a loss that no trainable parameter reaches."""
    ref = graph.output.leaves[0]
    assert isinstance(ref, Ref), "checked by check_loss"
    if not graph.values[ref.value].info.requires_grad:
        raise ConfigError(
            "the loss does not depend on any trainable parameter (computed under no_grad, or detached?)"
        )


def _returned(graph: Graph) -> Any:  # any tree
    """What the program returned, with a `Ref` wherever a tensor will stand."""
    return pytree.tree_unflatten(list(graph.output.leaves), graph.output.spec)


def _named(output: Any) -> str:
    if isinstance(output, Ref):
        return "a tensor"
    return f"a {type(output).__name__}" if output is not None else "nothing"
