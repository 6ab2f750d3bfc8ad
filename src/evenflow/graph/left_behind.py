"""What a forward leaves in attributes of modules, and what another kind of microbatch must not depend on.

A module may keep a tensor of its last call (`self.last = x`), or set a flag, though the same kind of call
never reads it: then it is taken apart, and a replay does not write it. But another kind of call might read
it, and would miss what the last replay did not write. So each kind is asked what it does when it is there.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from evenflow.graph.outside import PLAIN


class LeftBehind:
    """The attributes that calls of a model's modules left changed, by full name, and a value for each.

    The first value alone: a cache's length may be another after each call, and a flag has but two.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.values: dict[str, Any] = {}
        self._model = model

    @property
    def tensors(self) -> frozenset[str]:
        """The attributes in which tensors were left."""
        return frozenset(name for name, value in self.values.items() if isinstance(value, torch.Tensor))

    def learn(self, changed: Collection[str], pure: Collection[int]) -> None:
        """Note what attributes that a run changed hold now: numbers, and tensors but for those of ids `pure`."""
        for name in changed:
            own, key = self._place(name)
            match own.get(key):
                case torch.Tensor() as tensor if id(tensor) not in pure:
                    self.values.setdefault(name, torch.empty(0))
                case value if key in own and isinstance(value, PLAIN):
                    self.values.setdefault(name, value)

    def now(self) -> dict[str, Any]:
        """What those attributes hold now; without those that are not set."""
        places = {name: self._place(name) for name in self.values}
        return {name: own[key] for name, (own, key) in places.items() if key in own}

    @contextlib.contextmanager
    def by_others(self, before: Mapping[str, Any]) -> Iterator[list[str]]:
        """Put there what others left and this run, which found `before`, did not; gives the names."""
        now = self.now()
        names = [name for name in sorted(self.values) if now.get(name, self) is before.get(name, self)]
        try:
            for name in names:
                own, key = self._place(name)
                own[key] = self.values[name]
            yield names
        finally:
            for name in names:
                own, key = self._place(name)
                own.pop(key, None)
                own.update({key: now[name]} if name in now else {})

    def _place(self, name: str) -> tuple[dict[str, Any], str]:
        """The attributes that one is among, and its name there; of a hook or a buffer, none."""
        path, _, key = name.rpartition(".")
        module = dict(self._model.named_modules()).get(path)
        return ({} if module is None else vars(module)), key
