"""What must not change under a pipeline: which parameters the model has, and which of them train."""

from collections.abc import Callable, Iterable

import torch

from evenflow.errors import ConfigError


class FixedParameters:
    """The parameters of a model as they were when its pipeline was built."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules = [
            (path, module, dict(module._parameters))
            for path, module in model.named_modules()
            if module._parameters
        ]
        self._trains = {
            id(parameter): parameter.requires_grad
            for _, _, held in self._modules
            for parameter in held.values()
            if parameter is not None
        }

    def check(self) -> None:
        """Raise `ConfigError` naming a parameter that was replaced, added, removed or unfrozen."""
        for path, module, held in self._modules:
            now = module._parameters
            for key in held.keys() | now.keys():
                parameter, before = now.get(key), held.get(key)
                name = f"{path}.{key}" if path else key
                if parameter is not before:
                    raise ConfigError(
                        f"the parameter {name} is another one than when the pipeline was built, which "
                        "the optimizer does not know: change its numbers in place (load_state_dict without "
                        "assign=True), or build the pipeline anew"
                    )
                if parameter is not None and parameter.requires_grad and not self._trains[id(parameter)]:
                    raise ConfigError(
                        f"the parameter {name} was frozen when the pipeline was built and is to be "
                        "trained now, which the optimizer does not know: build the pipeline anew"
                    )


def refuse_shared_hooks(names: Iterable[str], parameter_of: Callable[[str], torch.nn.Parameter]) -> None:
    """Raise `ConfigError` for a shared parameter with hooks: they would see only a part of its gradient."""
    for name in names:
        parameter = parameter_of(name)
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ConfigError(
                f"the parameter {name} carries a gradient hook and is used in several places, of "
                "which each has "
                "an accumulator of its own: the hook would see parts of the gradient; change "
                "gradients after the step (pipe.step(batch, update=False)), or use fewer stages"
            )
