"""Other numbers for a while in a pipeline's parameters: averaged ones, to evaluate or export with."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from evenflow.pipe.given.refuse import refuse_together
from evenflow.pipe.parameters.update import Updater
from evenflow.runtime.ranks.world import World


@contextmanager
def swapped(
    updater: Updater, world: World, names: frozenset[str], given: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    """The parameters have `given` numbers inside, and their own again afterwards; collective.

    `world` are all processes, `names` all parameters of the model. Each rank takes what it owns of `given`,
    and hands on what others use of it.
    """
    own = dict(updater.parameters)
    refuse_together(world, "swapped()", _problem(own, names, given))
    kept = {name: own[name].detach().clone() for name in given if name in own}
    try:
        _put(updater, own, {name: given[name] for name in kept})
        yield
    finally:
        _put(updater, own, kept)


def _put(
    updater: Updater, own: Mapping[str, torch.nn.Parameter], numbers: Mapping[str, torch.Tensor]
) -> None:
    with torch.no_grad():
        for name, tensor in numbers.items():
            own[name].copy_(tensor)
    updater.spread()


def _problem(
    own: Mapping[str, torch.nn.Parameter], names: frozenset[str], given: Mapping[str, torch.Tensor]
) -> str | None:
    for name, tensor in given.items():
        if name not in names:
            return f"the model has no parameter {name!r}; names are those of pipe.named_parameters()"
        if name in own and own[name].shape != tensor.shape:
            return f"{name} has shape {list(own[name].shape)}, and is given {list(tensor.shape)}"
    return None
