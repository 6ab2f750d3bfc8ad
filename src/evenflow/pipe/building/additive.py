"""Where a pipelined loss cannot be the unsplit loss over the whole batch, and which module is to blame.

Microbatches run one by one, so whatever mixes rows (statistics of a batch, in-batch negatives, the balance
of experts) mixes those of a microbatch alone. That is no error, as gradient accumulation does the same, but
it is said once. Only what can be seen in the modules and in the recording is found: a loss that mixes rows
in some other way, or inside a module that was not taken apart, is not.
"""

from collections.abc import Iterator

import torch

from evenflow.graph.nouns.graph import FunctionTarget, Graph
from evenflow.graph.nouns.template import Ref
from evenflow.graph.nouns.tree import BatchLeaf

_NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm)
_PRODUCTS = {"matmul", "mm", "__matmul__", "__rmatmul__", "einsum", "inner", "addmm", "cdist"}


def differences(model: torch.nn.Module, graph: Graph, *, rows: int | None) -> Iterator[str]:
    """Say what differs from the unsplit model, for a batch of more than one microbatch.

    `rows` is the length of dim 0 of the recorded microbatch, where its tensors have a common one.

    >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    >>> empty = Graph((), (), None, (), (), {}, {}, {}, frozenset(), frozenset(), None)
    >>> next(differences(model, empty, rows=None))
    'BatchNorm (0) takes its statistics of each microbatch, not of the whole batch'
    """
    norms = [name for name, module in model.named_modules() if _takes_statistics(module)]
    if norms:
        yield f"BatchNorm ({_some(norms)}) takes its statistics of each microbatch, not of the whole batch"
    balanced = [name or type(module).__name__ for name, module in model.named_modules() if _balances(module)]
    if balanced:
        yield (
            f"the load balance of experts ({balanced[0]}) is computed in each microbatch, not over the whole "
            "batch"
        )
    if rows is not None and (product := _product_of_rows(graph, rows)) is not None:
        yield (
            f"{product} multiplies all rows with all rows, as contrastive losses do: each microbatch sees "
            "only its own"
        )


def _takes_statistics(module: torch.nn.Module) -> bool:
    return isinstance(module, _NORMS) and (module.training or module.running_mean is None)


def _balances(module: torch.nn.Module) -> bool:
    """Whether a Hugging Face model adds a loss that balances its experts."""
    config = vars(module).get("config")
    wanted = bool(getattr(config, "output_router_logits", False))
    return wanted and bool(getattr(config, "router_aux_loss_coef", 0.0))


def _product_of_rows(graph: Graph, rows: int) -> str | None:
    """The first product of two tensors computed from the batch that has a number for each pair of rows."""
    mixed: set[int] = {
        value.number for value in graph.values if isinstance(value.source, BatchLeaf) and value.info.shape
    }
    for node in graph.nodes:
        if not mixed.isdisjoint(node.inputs):
            mixed.update(node.makes)
        if node.glue or not isinstance(node.target, FunctionTarget):
            continue
        operands = [leaf.value for leaf in node.args.leaves if isinstance(leaf, Ref)][-2:]
        pairs = any(_is_square(graph.values[value].info.shape, rows) for value in node.results)
        named = getattr(node.target.function, "__name__", "") in _PRODUCTS
        if named and pairs and len(operands) == 2 and mixed.issuperset(operands):
            return node.name
    return None


def _is_square(shape: tuple[int, ...], rows: int) -> bool:
    """A number for each pair of rows, or of two views of each row."""
    return len(shape) == 2 and all(length in {rows, 2 * rows} for length in shape)


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
