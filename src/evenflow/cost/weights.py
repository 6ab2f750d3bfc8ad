"""A model's parameters, counted for planning."""

import torch

from evenflow.plan.shortage.weights import Weights


def weights_of(model: torch.nn.Module) -> Weights:
    """Count a model's parameters and the sizes of its linear layers; they need no memory.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2, bias=False))
    >>> weights_of(model.requires_grad_(False))
    Weights(num_elements=56, num_bytes=224, trained_elements=0, trained_bytes=0, linear_sizes=22)
    """
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    linear = (module for module in model.modules() if isinstance(module, torch.nn.Linear))
    return Weights(
        num_elements=sum(parameter.numel() for parameter in parameters),
        num_bytes=sum(parameter.nbytes for parameter in parameters),
        trained_elements=sum(parameter.numel() for parameter in trained),
        trained_bytes=sum(parameter.nbytes for parameter in trained),
        linear_sizes=sum(module.in_features + module.out_features for module in linear),
    )
