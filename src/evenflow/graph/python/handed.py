"""Functions of Python that the program hands to torch (`torch.vmap`): which may be handed over again.

The function of one run stands for that of each replay. So it must hold nothing that another run may give it
anew: plain values and other such functions alone. Two runs must hand over equal ones. (Tensors that it finds
in globals show when it runs.)
"""

from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch

from evenflow.graph.python.reach import PLAIN, closure_of, is_library

_DEPTH = 4  # of functions in functions


def made_of(function: Any) -> tuple[Any, ...] | None:  # any callable
    """What a function is made of, equal for functions that do the same; nothing where that cannot be told."""
    try:
        return _made_of(function, _DEPTH)
    except _CannotTell:
        return None


class _CannotTell(Exception):
    pass


def _made_of(thing: Any, depth: int) -> tuple[Any, ...]:
    match thing:
        case _ if depth < 0:
            raise _CannotTell
        case _ if isinstance(thing, PLAIN):
            return type(thing), repr(thing)
        case torch.dtype() | torch.device() | BuiltinFunctionType() | ModuleType():
            return type(thing), thing
        case tuple():
            return tuple, *(_made_of(each, depth - 1) for each in thing)
        case FunctionType() if is_library(thing) and not thing.__closure__:
            return FunctionType, thing
        case FunctionType():
            given = (*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values())
            held = (*given, *closure_of(thing).values())
            return FunctionType, thing.__code__, *(_made_of(each, depth - 1) for each in held)
        case _:
            raise _CannotTell
