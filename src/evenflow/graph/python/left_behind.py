"""What a forward leaves in attributes of modules, and what another kind of microbatch must not depend on.

A module may keep a tensor of its last call (`self.last = x`), or set a flag, though the same kind of call
never reads it: then it is taken apart, and a replay does not write it. But another kind of call might read
it, and would miss what the last replay did not write. So each kind is asked what it does when it is there.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from evenflow.graph.python.outside import frozen
from evenflow.graph.python.reach import PLAIN

_A_TENSOR = torch.empty(0)  # in the place of any


class LeftBehind:
    """The attributes that calls of a model's modules left changed, by full name, and values for each.

    Two values at most: a flag has no more, and a cache's length may be another after each call.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.values: dict[str, list[Any]] = {}
        self._model = model

    @property
    def tensors(self) -> frozenset[str]:
        """The attributes in which tensors were left."""
        return frozenset(name for name, values in self.values.items() if values[0] is _A_TENSOR)

    def learn(self, changed: Collection[str], pure: Collection[int]) -> None:
        """Note what a run put into attributes: numbers, and tensors but for those of ids `pure`."""
        for name in changed:
            _, own, key = self._place(name)
            match own.get(key):
                case torch.Tensor() as tensor if id(tensor) not in pure:
                    self.values[name] = [_A_TENSOR]
                case value if key in own and isinstance(value, PLAIN):
                    values = self.values.setdefault(name, [])
                    if len(values) < 2 and frozen(value) not in map(frozen, values):
                        values.append(value)

    def now(self) -> dict[str, Any]:
        """What those attributes are now, the value of their module's class where it has none of its own."""
        found: dict[str, Any] = {}
        for name in self.values:
            module, own, key = self._place(name)
            found[name] = own.get(key, getattr(type(module), key, None))
        return found

    @contextlib.contextmanager
    def by_others(self, before: Mapping[str, Any]) -> Iterator[list[str]]:
        """Put there what others left and this run, which found `before`, did not; gives the names."""
        now = {name: frozen(value) for name, value in self.now().items()}
        names = [name for name in sorted(self.values) if now[name] == frozen(before.get(name))]
        others = {name: [v for v in self.values[name] if frozen(v) != now[name]] for name in names}
        names = [name for name in names if others[name]]
        places = [self._place(name)[1:] for name in names]
        own_values = [{key: own[key]} if key in own else {} for own, key in places]
        try:
            for name, (own, key) in zip(names, places, strict=True):
                own[key] = others[name][0]
            yield names
        finally:
            for (own, key), value in zip(places, own_values, strict=True):
                own.pop(key, None)
                own.update(value)

    def _place(self, name: str) -> tuple[torch.nn.Module | None, dict[str, Any], str]:
        """An attribute's module, all attributes of that, and its name there; of a hook or a buffer, none."""
        path, _, key = name.rpartition(".")
        module = dict(self._model.named_modules()).get(path)
        return module, {} if module is None else module.__dict__, key
