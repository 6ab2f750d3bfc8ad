"""A model's state apart from its parameters' numbers: kept, and put back after runs that changed it."""

import random
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from evenflow.graph.kernels.kernels import generator_of
from evenflow.graph.python.modules import PythonState


class Snapshot:
    """Gradients, buffers, other tensors that modules keep, attributes, random generators, the batch.

    `parameters` are all whose gradients count, `batch` tensors that a run may change in place.

    >>> layer = torch.nn.BatchNorm1d(2)
    >>> kept = Snapshot(layer, layer.parameters(), batch=[], devices=[])
    >>> _ = layer(torch.ones(4, 2))
    >>> kept.put_back()
    >>> layer.running_mean.tolist(), int(layer.num_batches_tracked)
    ([0.0, 0.0], 0)
    """

    def __init__(
        self,
        model: torch.nn.Module,
        parameters: Iterable[torch.nn.Parameter],
        *,
        batch: Iterable[torch.Tensor],
        devices: Sequence[torch.device],
    ) -> None:
        modules = list(model.modules())
        self._gradients = [(parameter, parameter.grad) for parameter in parameters]
        self._python = PythonState(model)
        self._buffers = [
            (m, key, buffer) for m in modules for key, buffer in m._buffers.items() if buffer is not None
        ]
        attributes = [value for module in modules for value in vars(module).values()]
        tensors = [
            *(value for value in attributes if isinstance(value, torch.Tensor)),
            *(buffer for _, _, buffer in self._buffers),
            *batch,
        ]
        self._tensors = [(tensor, tensor.detach().clone()) for tensor in tensors]
        generators = [value for value in attributes if isinstance(value, torch.Generator)]
        generators += [generator_of(torch.device("cpu")), *(generator_of(device) for device in devices)]
        self._generators = [(each, each.get_state()) for each in generators]
        self._host = random.getstate(), np.random.get_state()

    def clear_gradients(self) -> None:
        """Let a run begin without any."""
        for parameter, _ in self._gradients:
            parameter.grad = None

    def put_back(self) -> None:
        """Leave everything as it was."""
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._python.restore()
        for module, key, buffer in self._buffers:
            module._buffers[key] = buffer
        with torch.no_grad():
            for tensor, copy in self._tensors:
                if not torch.equal(tensor, copy):
                    tensor.detach().copy_(copy)
        for generator, state in self._generators:
            generator.set_state(state)
        random.setstate(self._host[0])
        np.random.set_state(self._host[1])
