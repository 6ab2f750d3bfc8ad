"""Precision: the types in which a run computes, keeps its weights, and scales its loss.

- "fp32": all in float32. None: whatever types the model's parameters have, and those that have no numbers
  yet what the folder that they come from has.
- "bf16": parameters that are trained in float32, products in bfloat16, as torch.autocast chooses.
- "bf16-pure": batch, parameters, activations and gradients in bfloat16; the optimizer updates float32 copies.
- "fp16": as "bf16", in float16, whose small numbers vanish: the loss is scaled up and gradients down again.

Source: Micikevicius et al., "Mixed Precision Training", 2018.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from evenflow.errors import ConfigError
from evenflow.graph.nouns.graph import Graph


@dataclass(frozen=True, slots=True)
class Precision:
    """See the module. `autocast` is the type of products.

    `parameters` is that of floating-point parameters, None as they are; with `keeps_frozen` of those alone
    that are trained.
    """

    autocast: torch.dtype | None = None
    parameters: torch.dtype | None = None
    keeps_frozen: bool = False
    batch: torch.dtype | None = None  # that of the batch's floating-point tensors, None as they are
    has_masters: bool = False
    scales_loss: bool = False

    @staticmethod
    def of(name: str | None) -> "Precision":
        """Return what goes by that name; raises `ConfigError` where nothing does.

        >>> Precision.of("bf16").autocast
        torch.bfloat16
        """
        if name not in _PRECISIONS:
            known = ", ".join(map(repr, _PRECISIONS))
            raise ConfigError(f"precision={name!r} is none of {known}")
        return _PRECISIONS[name]

    def recording(self, kind: str) -> contextlib.AbstractContextManager[object]:
        """The context in which programs are recorded for a kind of device, and found again.

        Nothing else runs in it: nodes know how they were recorded, and a backward is not to be cast.
        """
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(kind, dtype=self.autocast)

    def dtype_of(self, parameter: torch.nn.Parameter, stored: torch.dtype | None = None) -> torch.dtype:
        """In which type the run keeps a parameter; `stored` is that of a file that its numbers come from."""
        stays = self.keeps_frozen and not parameter.requires_grad
        if stays or not parameter.is_floating_point():
            return parameter.dtype
        if self.parameters is None:
            return stored if stored is not None and parameter.is_meta else parameter.dtype
        return self.parameters

    def check(self, graph: Graph, parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
        """Raise `ConfigError` for a program that computes in float16 where nobody scales the loss."""
        if self.scales_loss:
            return
        remedy = 'pipeline(precision="fp16") keeps float32 parameters and scales the loss for all ranks'
        for name, parameter in parameters:
            if parameter.dtype is torch.float16 and parameter.requires_grad:
                raise ConfigError(
                    f"the parameter {name} is float16, whose gradients vanish below 6e-8: build the model in "
                    f"float32; {remedy}"
                )
        for node in graph.nodes:
            if any(dtype is torch.float16 for _, dtype in node.autocast):
                raise ConfigError(
                    f"{node.name} runs under autocast to float16, whose gradients vanish below 6e-8, and "
                    f"nobody scales the loss: leave autocast out of the loss function; {remedy}"
                )


_PRECISIONS: dict[str | None, Precision] = {
    None: Precision(),
    "fp32": Precision(parameters=torch.float32),
    "bf16": Precision(autocast=torch.bfloat16, parameters=torch.float32, keeps_frozen=True),
    "bf16-pure": Precision(parameters=torch.bfloat16, batch=torch.bfloat16, has_masters=True),
    "fp16": Precision(autocast=torch.float16, parameters=torch.float32, keeps_frozen=True, scales_loss=True),
}
