"""Saving: a torch.distributed.checkpoint folder that becomes visible only when it is whole."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_saver import save

from evenflow.checkpoint.whole import appearing
from evenflow.runtime.world import World


def save_checkpoint(
    folder: Path,
    world: World,
    *,
    tensors: Mapping[str, torch.Tensor],
    optimizers: Mapping[str, Any],
    step: int,
) -> None:
    """Write `folder`: tensors under the model's own names, optimizer states under theirs; collective.

    Every rank gives what it owns. An existing folder is replaced once the new one is complete.
    """
    state = {
        "model": {name: tensor.detach() for name, tensor in tensors.items()},
        "optimizer": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
        "step": step,
    }
    with appearing(folder, world) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # so it is, on purpose
        save(state, checkpoint_id=partial, no_dist=world.size == 1)
