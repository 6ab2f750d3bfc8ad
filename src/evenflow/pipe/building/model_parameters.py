"""A model's parameters while its pipeline is built: as given, as fakes, and as this process has them."""

import logging
from collections import Counter
from collections.abc import Mapping

import torch

from evenflow.checkpoint.weights_in import find_weights
from evenflow.graph.kernels.fakes import FakeParameters
from evenflow.graph.nouns.dtensors import is_dtensor
from evenflow.pipe.building.asked import Asked
from evenflow.pipe.parameters.number_sources import Numbers
from evenflow.pipe.parameters.tensor_plan import part_of, share_modules
from evenflow.runtime.program.vocabulary_loss import Vocabulary
from evenflow.runtime.ranks.mesh import Mesh
from evenflow.runtime.ranks.tensor_ranks import TensorRanks
from evenflow.runtime.ranks.world import World
from evenflow.runtime.recorded.parameters import parameters_by_name
from evenflow.view.units import format_bytes

_LOG = logging.getLogger("evenflow")
_HOST = torch.device("cpu")


class ModelParameters:
    """See the module. `by_name` has the distinct ones under their first names, as they are by now.

    `tensor` are the ranks that share some of them, from now on, `vocabulary` the heads among these; the model
    is changed accordingly.
    """

    def __init__(self, asked: Asked, mesh: Mesh, device: torch.device) -> None:
        model, types, load = asked.model, asked.precision, asked.load
        given = dict(model.named_parameters(remove_duplicate=False))
        if mesh.tensor.size > 1:
            mesh.check_carried(device, "a mesh with tensor ranks")
        shared = share_modules(model, mesh, asked.tensor_plan)
        self.tensor = TensorRanks(mesh.tensor, shared.partial)
        self.vocabulary = Vocabulary(mesh.tensor, shared.heads)
        self.fakes, weights, stored = FakeParameters(model, device, types.dtype_of), None, {}
        if load is not None:
            weights = find_weights(model, load, self.fakes.tied)
            now = dict(model.named_parameters(remove_duplicate=False))
            names = {id(now[name]): first for name, first in self.fakes.tied.items()}
            stored = weights.dtypes
            self.fakes = FakeParameters(
                model, device, lambda each: types.dtype_of(each, stored.get(names[id(each)]))
            )
        self.by_name = parameters_by_name(model, self.fakes.tied)
        self._given = {name: given[name] for name in self.by_name}
        self._dtypes = {name: types.dtype_of(each, stored.get(name)) for name, each in self._given.items()}
        self._numbers = Numbers(model, self._given, self.fakes.tied, weights=weights, seed=asked.seed)
        _share_buffers(model, mesh.world, device)
        if load is not None and mesh.world.is_first:
            _LOG.info("parameters: %s, as far as they had no numbers as %s stores them", self._told(), load)

    def settle(self, homes: Mapping[str, torch.device]) -> None:
        """Give those that have a home here their numbers, or their part; the others become empty.

        Raises `ConfigError` where the weights of a folder do not fit.
        """
        parted = {name for name, parameter in self.by_name.items() if is_dtensor(parameter)}
        self._numbers.fill(
            self._given, {name: _HOST if name in parted else home for name, home in homes.items()}
        )
        for name in homes:
            self._given[name].data = self._given[name].data.to(self._dtypes[name])
        for name, parameter in list(self.by_name.items()):
            given = self._given.pop(name)
            if name in homes:
                mine = part_of(given, parameter) if name in parted else given
                mine.data = mine.data.to(homes[name])
                self.by_name[name] = mine
            elif name not in parted:
                empty = torch.empty_like(parameter, device="meta")
                self.by_name[name] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)

    def _told(self) -> str:
        """In which types they are, and how much memory they take on all ranks together."""
        sizes: Counter[torch.dtype] = Counter()
        for name, parameter in self._given.items():
            sizes[self._dtypes[name]] += parameter.numel() * self._dtypes[name].itemsize
        pairs = ((format_bytes(size), str(dtype).removeprefix("torch.")) for dtype, size in sizes.items())
        return ", ".join(f"{size} in {dtype}" for size, dtype in pairs)

    def put(self, used: Mapping[str, torch.nn.Parameter]) -> None:
        """Let the model's modules hold them; of some, by name, those that programs use in their place."""
        self.by_name |= used
        for module, key, fake in self.fakes.slots:
            module._parameters[key] = self.by_name[self.fakes.names[id(fake)]]


def _share_buffers(model: torch.nn.Module, world: World, device: torch.device) -> None:
    """Give every process the first one's buffers, which masks and tables are computed from on all of them."""
    for buffer in model.buffers() if world.size > 1 else ():
        moved = buffer.detach().to(device)
        world.broadcast(moved, 0).wait()
        buffer.detach().copy_(moved)
