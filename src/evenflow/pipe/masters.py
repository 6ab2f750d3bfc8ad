"""Masters: float32 copies of parameters of fewer bits, which the optimizer updates in their place.

A small update of a bfloat16 number, 1 part in 1,000 say, would be rounded away.
Source: Micikevicius et al., "Mixed Precision Training", 2018.
"""

import torch

from evenflow.runtime.sums import Named


class Masters:
    """One for each parameter of less than 32 bits that this process updates.

    >>> parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    >>> masters = Masters()
    >>> ((_, master),) = masters.of([("w", parameter)])
    >>> master.data -= 0.001
    >>> masters.publish()
    >>> float(master.detach()), float(parameter.detach())
    (0.9990000128746033, 1.0)
    """

    def __init__(self) -> None:
        self.by_name: dict[str, torch.nn.Parameter] = {}
        self._pairs: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []

    def of(self, named: list[Named]) -> list[Named]:
        """The same parameters, with masters in the place of those that need one."""
        return [(name, self._master(name, parameter)) for name, parameter in named]

    def _master(self, name: str, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        if not parameter.is_floating_point() or parameter.dtype.itemsize >= 4:
            return parameter
        master = torch.nn.Parameter(parameter.detach().float())
        self._pairs.append((parameter, master))
        self.by_name[name] = master
        return master

    def take_gradients(self) -> None:
        """Give every master its parameter's gradient."""
        for parameter, master in self._pairs:
            master.grad = None if parameter.grad is None else parameter.grad.float()

    def publish(self) -> None:
        """Round the masters' new numbers for the parameters."""
        with torch.no_grad():
            for parameter, master in self._pairs:
                parameter.copy_(master)
                master.grad = None
