"""Several optimizers of one stage, stepped as one: Muon for matrices, say, and AdamW for the rest."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from evenflow.errors import ConfigError


class Together(torch.optim.Optimizer):
    """Steps each of its optimizers; groups and states are theirs, so that one scheduler steers all.

    Raises `ConfigError` for a parameter that two of them have.

    >>> a, b = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    >>> both = Together([torch.optim.SGD([a], lr=0.5), torch.optim.SGD([b], lr=0.25)])
    >>> a.grad = b.grad = torch.ones(1)
    >>> both.step()
    >>> a.item(), b.item(), [group["lr"] for group in both.param_groups]
    (0.5, 0.75, [0.5, 0.25])
    """

    def __init__(self, members: Sequence[torch.optim.Optimizer]) -> None:
        seen: set[int] = set()
        groups = [group for member in members for group in member.param_groups]
        for group in groups:
            for at, parameter in enumerate(group["params"]):
                if id(parameter) in seen:
                    name = (group.get("param_names") or {at: f"of shape {list(parameter.shape)}"})[at]
                    raise ConfigError(
                        f"optimizer= returned {len(members)} optimizers, of which two have the parameter "
                        f"{name}; give each parameter to one of them"
                    )
                seen.add(id(parameter))
        self.members = tuple(members)
        super().__init__([{"params": group["params"]} for group in groups], {})

    # torch's constructor sets both of these; here they are looked up, for `load_state_dict` makes new ones.

    @property
    def state(self) -> Any:  # torch's own type: a defaultdict
        """The members' states, of all their parameters."""
        return dict(itertools.chain.from_iterable(member.state.items() for member in self.members))

    @state.setter
    def state(self, _: Any) -> None:
        """Nothing: the members keep theirs."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The members' own groups, in order."""
        return [group for member in self.members for group in member.param_groups]

    @param_groups.setter
    def param_groups(self, _: Any) -> None:
        """Nothing: the members keep theirs."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Nothing: torch's constructor calls it; parameters are added to a member."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # the runtime calls it without
        """Step each of them, in order."""
        assert closure is None, "a pipeline runs the model itself"
        for member in self.members:
            member.step()

    def state_dict(self) -> dict[str, Any]:
        """Those of the members, by their place."""
        return {str(at): member.state_dict() for at, member in enumerate(self.members)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` returned."""
        for at, member in enumerate(self.members):
            member.load_state_dict(state_dict[str(at)])


def as_one(made: Any) -> Any:  # whatever the user's function returned
    """One optimizer that steps all of a list or tuple of them; anything else as it is."""
    if isinstance(made, list | tuple) and made and all(isinstance(m, torch.optim.Optimizer) for m in made):
        return made[0] if len(made) == 1 else Together(made)
    return made
