"""An accelerator that prepares nothing: the pipeline places the model, and every rank reads every batch."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils import _pytree as pytree


class Alone:
    """Stands in a trainer for its `accelerate.Accelerator`, and behaves as one of a single process does.

    Accelerate would give each rank rows of its own, wrap the model and gather what ranks computed; under a
    pipeline all ranks work on one batch, and results are the same everywhere. What is not named here is the
    accelerator's own. `data_seed` is that of the training arguments.
    """

    def __init__(self, accelerator: Accelerator, *, data_seed: int | None) -> None:
        self._accelerator, self._data_seed = accelerator, data_seed

    def __getattr__(self, name: str) -> Any:  # whatever the accelerator has under that name
        return getattr(self._accelerator, name)

    def prepare(self, *things: Any) -> Any:  # as accelerate: one thing for one, a tuple for several
        """Loaders, so that they can be reproduced epoch by epoch; anything else as it is."""
        prepared = tuple(self._prepared(thing) for thing in things)
        return prepared[0] if len(prepared) == 1 else prepared

    def prepare_model(self, model: torch.nn.Module, **_: Any) -> torch.nn.Module:
        """The model as it is."""
        return model

    def gather(self, tensor: Any) -> Any:  # any tree of tensors
        """What this rank has, as all ranks have the same."""
        return tensor

    def gather_for_metrics(self, data: Any, use_gather_object: bool = False) -> Any:
        """What this rank has; of the last batch as many rows as the data set has left."""
        state = self._accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return data
        return pytree.tree_map(
            lambda leaf: leaf[: state.remainder] if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf,
            data,
        )

    def pad_across_processes(self, tensor: Any, **_: Any) -> Any:  # any tree of tensors
        """What this rank has: shapes are the same on all."""
        return tensor

    def _prepared(self, thing: Any) -> Any:
        if not isinstance(thing, torch.utils.data.DataLoader):
            return thing
        return prepare_data_loader(
            thing,
            num_processes=1,
            process_index=0,
            dispatch_batches=False,
            use_seedable_sampler=True,
            data_seed=self._data_seed,
        )
