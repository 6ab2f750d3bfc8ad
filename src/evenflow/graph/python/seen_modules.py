"""What a model's modules are made of, looked at before every step.

A model has hundreds of modules, most of which hold plain values, parameters and other modules. Those are told
from what they were last by what their tables hold, and not looked into again: that takes a tenth of the time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from evenflow.graph.python.outside import (
    BY_IDENTITY,
    HOOKS,
    MODULES_OWN,
    Freezer,
    Same,
    Snapshot,
    attributes,
    without_tensors,
)
from evenflow.graph.python.reach import is_library

# No tensors, which a step may leave behind: holding them for comparison would keep their graphs.
_PLAIN = {int, float, complex, str, bytes, bool, type(None), *BY_IDENTITY} - {torch.Tensor}


@dataclass(frozen=True, slots=True)
class _Known:
    """A module as it was: its tables, all that they held, so that no id is used again, and what was seen."""

    tables: Any
    held: tuple[Any, ...]
    found: Snapshot


class SeenModules:
    """Sees attributes, hooks, submodules, buffers, and values of classes.

    >>> model = torch.nn.Sequential(torch.nn.Dropout(0.1))
    >>> seen = SeenModules(model)
    >>> before = seen.now(frozenset())
    >>> model[0].p = 0.2
    >>> [name for name, value in seen.now(frozenset()).items() if value != before[name]]
    ['0.p']
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._known: dict[str, _Known] = {}

    def now(self, names: frozenset[str]) -> Snapshot:
        """What there is now; of objects those attributes whose `names` occur in the program's code."""
        modules = list(_named_modules(self._model))
        inside = {id(module) for _, module in modules}
        own, library = Freezer(names, inside), Freezer(None, inside)
        found: dict[str, Any] = {}
        kinds: dict[type[torch.nn.Module], None] = {}
        for path, module in modules:
            kind = type(module)
            kinds[kind] = None
            tables = _tables(module)
            known = self._known.get(path)
            if known is not None and known.tables == tables:
                found.update(known.found)
                continue
            freezer = library if is_library(kind) else own
            part = {
                f"{path}.{key}" if path else key: freezer.frozen(without_tensors(value))
                for key, value in attributes(module).items()
            }
            part[f"{path}: class and order"] = Same(kind), tuple(module._modules)
            found.update(part)
            if tables is not None and _is_plain(module):
                held = (*vars(module).values(), *module._modules.values(), *module._buffers.values())
                self._known[path] = _Known(tables, held, part)
        for kind in kinds:
            if not is_library(kind):
                found.update(own.class_values(kind))
                found.update(own.parts(kind.forward, f"{kind.__qualname__}.forward"))
        return found


def _named_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """As `model.named_modules()`, which steps through a generator for each module above."""
    waiting, seen = [("", model)], set()
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        prefix = f"{path}." if path else ""
        held = [(prefix + name, part) for name, part in module._modules.items() if part is not None]
        waiting += reversed(held)


def _tables(module: torch.nn.Module) -> Any:
    """What tells that a module's plain values are the same objects as before; None where it has hooks."""
    own = vars(module)
    if any(own[table] for table in HOOKS):
        return None
    modules, buffers, parameters = own["_modules"], own["_buffers"], own["_parameters"]
    return (
        (type(module), *own, *map(id, own.values())),
        (*modules, *map(id, modules.values())),
        (*buffers, *map(id, buffers.values())),
        [(name, part.requires_grad) for name, part in parameters.items() if part is not None],
    )


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether all that a module holds itself is what it is as long as it is the same object."""
    return all(type(value) in _PLAIN for key, value in vars(module).items() if key not in MODULES_OWN)
