"""A model's parameters while its pipeline is built: as given, as fakes, and as this process has them."""

from collections.abc import Mapping
from pathlib import Path

import torch

from evenflow.graph.dtensors import is_dtensor
from evenflow.graph.fakes import FakeParameters
from evenflow.pipe.fill import Numbers
from evenflow.pipe.precision import Precision
from evenflow.pipe.tensor_plan import TensorPlan, part_of, share_modules
from evenflow.runtime.mesh import Mesh
from evenflow.runtime.parameters import parameters_by_name
from evenflow.runtime.tensor_ranks import TensorRanks
from evenflow.runtime.vocabulary_loss import Vocabulary

_HOST = torch.device("cpu")


class ModelParameters:
    """See the module. `by_name` has the distinct ones under their first names, as they are by now.

    `tensor` are the ranks that share some of them, from now on, `vocabulary` the heads among these; the model
    is changed accordingly.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        mesh: Mesh,
        tensor_plan: TensorPlan | None,
        types: Precision,
        device: torch.device,
        *,
        load: str | Path | None,
        seed: int,
    ) -> None:
        given = dict(model.named_parameters(remove_duplicate=False))
        shared = share_modules(model, mesh, tensor_plan)
        self.tensor = TensorRanks(mesh.tensor, shared.partial)
        self.vocabulary = Vocabulary(mesh.tensor, shared.heads)
        self.fakes = FakeParameters(model, device, types.dtype_of)
        self.by_name = parameters_by_name(model, self.fakes.tied)
        self._types = types
        self._given = {name: given[name] for name in self.by_name}
        self._numbers = Numbers(model, self._given, self.fakes.tied, load=load, seed=seed)

    def settle(self, homes: Mapping[str, torch.device]) -> None:
        """Give those that have a home here their numbers, or their part; the others become empty.

        Raises `ConfigError` where the weights of a folder do not fit.
        """
        parted = {name for name, parameter in self.by_name.items() if is_dtensor(parameter)}
        self._numbers.fill(
            self._given, {name: _HOST if name in parted else home for name, home in homes.items()}
        )
        self._types.convert(self._given[name] for name in homes)
        for name, parameter in list(self.by_name.items()):
            given = self._given.pop(name)
            if name in homes:
                mine = part_of(given, parameter) if name in parted else given
                mine.data = mine.data.to(homes[name])
                self.by_name[name] = mine
            elif name not in parted:
                empty = torch.empty_like(parameter, device="meta")
                self.by_name[name] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)

    def put(self) -> None:
        """Let the model's modules hold them."""
        for module, key, fake in self.fakes.slots:
            module._parameters[key] = self.by_name[self.fakes.names[id(fake)]]
