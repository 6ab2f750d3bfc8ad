"""Saving: a torch.distributed.checkpoint folder that becomes visible only when it is whole."""

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_saver import save

from evenflow.runtime.world import World


def save_checkpoint(
    folder: Path,
    world: World,
    *,
    tensors: Mapping[str, torch.Tensor],
    optimizers: Mapping[int, Any],
    step: int,
) -> None:
    """Write `folder`: tensors under the model's own names, optimizer state by stage; collective.

    Every rank gives what it owns. An existing folder is replaced once the new one is complete.
    """
    state = {
        "model": {name: tensor.detach() for name, tensor in tensors.items()},
        "optimizer": {f"stage{stage}": optimizer.state_dict() for stage, optimizer in optimizers.items()},
        "step": step,
    }
    partial = folder.with_name(folder.name + ".partial")
    if world.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    world.gather(None)  # nobody writes before the old remains are gone
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # so it is, on purpose
        save(state, checkpoint_id=partial, no_dist=world.size == 1)
    if world.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    world.gather(None)  # nobody goes on before the folder is there
