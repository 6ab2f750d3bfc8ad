"""What a node's cost depends on, as text: nodes with one signature are measured once.

That is the code which runs (a module's class, settings and inner modules, or a function), the shapes, strides
and types of parameters, buffers and inputs, plain arguments, and the modes it runs in. Numbers in tensors
count for nothing, and names and indexes of layers neither: an attribute that is but a number out of the
module's own path (`layer_idx`) is taken for its name.
"""

import functools
import hashlib
from collections.abc import Mapping, Set
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, assert_never

import torch

from evenflow.graph.nouns.graph import FunctionTarget, Graph, ModuleTarget, Node
from evenflow.graph.nouns.template import Ref, Shared, Shell, Template
from evenflow.graph.nouns.tree import TensorInfo
from evenflow.graph.python.outside import MODULES_OWN

_DEPTH = 4  # of objects in objects
_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, slice, range, type(Ellipsis)),
    *(torch.dtype, torch.layout, torch.memory_format, torch.Size),
)


def signature(graph: Graph, node: Node, model: torch.nn.Module, *, graded: Set[int]) -> str:
    """A number for all that a node's cost depends on, as 32 hexadecimal digits, the same in every process.

    `graded` are those of its values whose gradients it computes or adds to: an input that a later node uses
    too has its gradients added up, and a result that nobody uses has none.
    """
    target: Any  # nested tuples of text
    match node.target:
        case ModuleTarget(path=path):
            target = _described_module(model.get_submodule(path), path)
        case FunctionTarget(function=function):
            target = _described(function, _DEPTH)
        case _:
            assert_never(node.target)
    refs = tuple(dict.fromkeys((*node.inputs, *node.makes)))
    values = tuple(_value(graph, value, refs, value in graded) for value in refs)
    parameters = tuple(_tensor(model.get_parameter(name)) for name in node.parameters)
    buffers = len(node.buffers), len(node.changed_buffers), len(node.kept_buffers)
    modes = (
        node.grad_enabled,
        repr(node.autocast),
        node.region is not None,
        node.glue,
        node.hooks,
        node.stateful,
        node.opaque,
        node.unknown_to_autograd,
    )
    places = {value: at for at, value in enumerate(refs)}
    args, output = _template(node.args, places), _template(node.output, places)
    draws = repr(node.target.draws is not None and node.target.draws != ())
    seen = repr((target, values, parameters, buffers, modes, args, output, draws, node.flops))
    return hashlib.blake2b(seen.encode(), digest_size=16).hexdigest()


def _value(graph: Graph, number: int, refs: tuple[int, ...], graded: bool) -> Any:  # nested tuples of text
    value = graph.values[number]
    first_alias = next(at for at, other in enumerate(refs) if graph.values[other].storage == value.storage)
    kind = type(value.source).__name__
    return kind, _info(value.info), first_alias, graded and not value.is_state


def _info(info: TensorInfo) -> tuple[Any, ...]:
    return info.shape, info.stride, str(info.dtype), info.requires_grad


def _tensor(tensor: torch.Tensor) -> tuple[Any, ...]:
    strides = tuple(tensor.stride()) if tensor.layout == torch.strided else ()
    return tuple(tensor.shape), strides, str(tensor.dtype), tensor.requires_grad


def _template(template: Template, places: Mapping[int, int]) -> tuple[Any, ...]:
    return repr(template.spec), tuple(_leaf(leaf, places) for leaf in template.leaves)


def _leaf(leaf: Any, places: Mapping[int, int]) -> Any:  # any leaf of a template
    match leaf:
        case Ref(value):
            return "value", places.get(value, -1)
        case Shared():
            return "object", type(leaf.prototype).__qualname__
        case Shell():
            return "shell", type(leaf.prototype).__qualname__, tuple(places[ref.value] for ref in leaf.refs)
        case _:
            return _described(leaf, _DEPTH)


def _described_module(module: torch.nn.Module, path: str) -> tuple[Any, ...]:
    """A module with all inside it."""
    known: dict[int, str] = {}
    found = []
    for inner_path, inner in module.named_modules():
        whole = f"{path}.{inner_path}"
        numbers = frozenset(int(part) for part in whole.split(".") if part.isdigit())
        settings = {
            key: _setting(value, numbers)
            for key, value in vars(inner).items()
            if key not in MODULES_OWN and not isinstance(value, torch.nn.Module)
        }
        tensors = [
            (key, known.setdefault(id(tensor), whole) == whole, _tensor(tensor))
            for key, tensor in (*inner._parameters.items(), *inner._buffers.items())
            if tensor is not None
        ]
        found.append((inner_path, _name(type(inner)), sorted(settings.items()), tensors))
    return tuple(found)


def _setting(value: Any, numbers: Set[int]) -> Any:  # any attribute
    return "number of the path" if type(value) is int and value in numbers else _described(value, _DEPTH)


def _described(value: Any, depth: int) -> Any:  # any value: what of it can be written down alike next time
    match value:
        case torch.Tensor():
            return "tensor", _tensor(value)
        case torch.device():
            return value.type
        case _ if isinstance(value, _PLAIN):
            return repr(value)
        case FunctionType() | BuiltinFunctionType() | MethodType() | type():
            return _name(value)
        case _ if not depth or isinstance(value, torch.nn.Module):
            return _name(type(value))
        case _:
            return _inside(value, depth - 1)


def _inside(value: Any, depth: int) -> Any:  # as above, of what holds others
    match value:
        case functools.partial():
            return _described(value.func, depth), _described((value.args, value.keywords), depth)
        case Mapping():
            return tuple(sorted((str(key), repr(_described(each, depth))) for key, each in value.items()))
        case tuple() | list():
            return tuple(_described(each, depth) for each in value)
        case set() | frozenset():
            return tuple(sorted(repr(_described(each, depth)) for each in value))
        case _:
            return _name(type(value)), _described(dict(getattr(value, "__dict__", {})), depth)


def _name(thing: Any) -> str:  # a class or function: where it is defined
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"
