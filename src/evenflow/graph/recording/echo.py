"""Running a recorded program once more without computing anything, to see whether it does the same again.

Every torch function gives back what it gave in the first run, the very same objects, so that only Python's
own work is repeated. If the program then calls other functions, or the same ones on other numbers, Python
told it something else than before: a counter, a clock, a cache that was filled, a random number.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch

from evenflow.graph.nouns.template import flatten_tree
from evenflow.graph.python.handed import made_of
from evenflow.graph.python.reach import PLAIN
from evenflow.graph.recording.observe import Invocation, observed_by, quiet, unwatched


@dataclass(frozen=True, slots=True)
class Noted:
    """One call of a torch function in the first run: `args` as `described`, and what it gave or raised."""

    name: str
    args: tuple[Any, ...]
    result: Any
    error: Exception | None = None


class Differs(BaseException):
    """The program does something else; no program's `except Exception` may swallow it."""


def described(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """Leaves as they can be compared between runs: tensors by identity, plain values by contents."""
    return tuple(_described(leaf) for leaf in leaves)


def _described(leaf: Any) -> Any:  # any leaf
    if isinstance(leaf, torch.Tensor):
        return id(leaf)
    if isinstance(leaf, PLAIN):
        return type(leaf), repr(leaf)
    if isinstance(leaf, FunctionType):
        return type(leaf), made_of(leaf)
    return repr(leaf) if isinstance(leaf, slice) else type(leaf)


def echo(
    program: Callable[[], Any],
    noted: Sequence[Noted],
    *,
    paths: dict[int, str],
    opaque: dict[tuple[str, int], Any],
    unseen: dict[int, torch.Tensor],
    result: Any,
) -> str | None:
    """Run the program again; returns what it does differently, or nothing.

    `paths` names the model's modules by id. `opaque` holds what those calls returned that were not looked
    into, by path and number of the call; `unseen` the tensors, by id, whose makers nobody saw: they are
    made anew.
    """
    listener = _Echo(noted, paths, opaque, unseen)
    try:
        with observed_by(listener, listener), quiet():
            again = program()
        listener.finish()
        if listener.described(flatten_tree(again)[0]) != described(flatten_tree(result)[0]):
            return "its result"
    except Differs as difference:
        return str(difference)
    except Exception as error:  # noqa: BLE001 (whatever goes wrong only now is a difference)
        return f"it raises {type(error).__name__} the second time ({error})"
    return None


class _Echo:
    def __init__(
        self,
        noted: Sequence[Noted],
        paths: dict[int, str],
        opaque: dict[tuple[str, int], Any],
        unseen: dict[int, torch.Tensor],
    ) -> None:
        self.noted, self.paths, self.opaque, self.unseen = noted, paths, opaque, unseen
        self.blind = False
        self.position = 0
        self.stack = [""]
        self.calls: defaultdict[str, int] = defaultdict(int)
        self.anew: dict[int, tuple[torch.Tensor, int]] = {}  # an unseen tensor, and the id of its first one

    def module(self, asked: Invocation) -> Any:
        call = (asked.path, self.calls[asked.path])
        self.calls[asked.path] += 1
        if call in self.opaque:
            return self.opaque[call]
        self.stack.append(asked.path)
        try:
            return asked.make()
        finally:
            self.stack.pop()

    def custom_function(self, apply: MethodType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with unwatched():
            return self.function(apply, args, kwargs, name=name_of(apply))

    def whole_function(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, name: str
    ) -> Any:
        with unwatched():
            return self.function(function, args, kwargs, name=name)

    def function(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, name: str = ""
    ) -> Any:
        name = name or name_of(function)
        if name in INDEXING:
            args = (args[0], without_tensors_in_slices(args[1], self.whole_number), *args[2:])
        where = f"{self.stack[-1] or 'the loss function'}: {name}"
        if self.position == len(self.noted):
            raise Differs(f"{where} is called, and nothing was the first time")
        noted = self.noted[self.position]
        self.position += 1
        found = self.described(flatten_tree((args, kwargs))[0], noted.args)
        if noted.name != name:
            raise Differs(f"{where} is called, and {noted.name} the first time")
        if found != noted.args:
            raise Differs(f"{where} is called with {_difference(found, noted.args)} the first time")
        if noted.error is not None:
            raise noted.error
        return noted.result

    def whole_number(self, tensor: torch.Tensor) -> Any:
        return self.function(torch.Tensor.__index__, (tensor,), {})

    def described(self, leaves: Sequence[Any], first: Sequence[Any] = ()) -> tuple[Any, ...]:
        """Leaves as `described`, where one that nobody saw made counts as the one of the first run."""
        found = list(described(leaves))
        for at, leaf in enumerate(leaves):
            if not isinstance(leaf, torch.Tensor):
                continue
            if id(leaf) in self.anew:
                found[at] = self.anew[id(leaf)][1]
            elif at < len(first) and first[at] in self.unseen and id(leaf) != first[at]:
                before = self.unseen[first[at]]
                if (leaf.shape, leaf.dtype) == (before.shape, before.dtype):
                    self.anew[id(leaf)] = leaf, id(before)
                    found[at] = id(before)
        return tuple(found)

    def finish(self) -> None:
        if self.position < len(self.noted):
            raise Differs(f"{self.noted[self.position].name} is not called, and was the first time")


# Functions whose index may hold slices of tensors.
INDEXING = ("__getitem__", "__setitem__")


def name_of(function: Callable[..., Any]) -> str:
    """What a torch function is called."""
    if isinstance(function, MethodType) and isinstance(function.__self__, type):
        return f"{function.__self__.__name__}.{function.__name__}"
    return getattr(function, "__name__", repr(function))


def without_tensors_in_slices(index: Any, number: Callable[[torch.Tensor], Any]) -> Any:
    """An index whose slices hold numbers: one that is a tensor is read with `number`, as indexing does."""
    if isinstance(index, tuple):
        return tuple(without_tensors_in_slices(each, number) for each in index)
    if not isinstance(index, slice):
        return index
    bounds = (index.start, index.stop, index.step)
    return slice(*(number(each) if isinstance(each, torch.Tensor) else each for each in bounds))


def _difference(found: tuple[Any, ...], first: tuple[Any, ...]) -> str:
    for mine, theirs in zip(found, first, strict=False):
        if mine != theirs:
            return f"{_shown(mine)}, and with {_shown(theirs)}"
    return f"{len(found)} arguments, and with {len(first)}"


def _shown(part: Any) -> str:
    if isinstance(part, int):
        return "one tensor"
    return part[1] if isinstance(part, tuple) else str(part)
