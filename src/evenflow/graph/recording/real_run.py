"""Running one module for real, where it cannot run on fake tensors: what its call looks like from outside.

Routing by `nonzero`, a branch on an activation, a kernel that reads memory: such a module becomes a leaf, of
which only the arguments, the results and the draws are known. Its parameters and inputs are made up (the same
on every rank), it runs twice on different numbers, and where the two runs differ in more than numbers the
module that called it is tried in its place.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from evenflow.graph.kernels.fakes import FakeParameters, storage_of
from evenflow.graph.nouns.template import flatten_tree
from evenflow.graph.python.modules import python_kept, python_state
from evenflow.graph.python.outside import MODULES_OWN, changed_names
from evenflow.graph.recording.observe import Invocation

_PATTERN = 2**22  # numbers that are drawn for a large tensor, which repeats them


class CannotRun(Exception):
    """A module cannot run alone on made-up numbers; the message says why."""


@dataclasses.dataclass(frozen=True, slots=True)
class RealRun:
    """What one call looks like from outside."""

    result: Any  # any tree, its tensors fake
    changed: tuple[torch.Tensor, ...]  # arguments and buffers that were changed in place
    attributes: tuple[str, ...]  # Python attributes that changed
    signature: Any  # equal for two runs that differ in numbers only


def run_for_real(asked: Invocation, *, fakes: FakeParameters, device: torch.device) -> RealRun:
    """Make the call on real tensors; raises `CannotRun` or the module's error."""
    _check_memory(asked.module, fakes, device)
    first, second = (_run(asked, fakes, device, seed=seed) for seed in (0, 1))
    if first.signature != second.signature:
        raise CannotRun("what it returns depends on its numbers")
    return first


def _check_memory(module: torch.nn.Module, fakes: FakeParameters, device: torch.device) -> None:
    needed = sum(fake.numel() * fake.element_size() for _, _, fake in _slots(module, fakes))
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free // 2:
        raise CannotRun(f"it would take {needed >> 20} MiB, of which {free >> 20} MiB are free")


def _slots(
    module: torch.nn.Module, fakes: FakeParameters
) -> list[tuple[torch.nn.Module, str, torch.nn.Parameter]]:
    inside = {id(inner) for inner in module.modules()}
    return [slot for slot in fakes.slots if id(slot[0]) in inside]


def _run(asked: Invocation, fakes: FakeParameters, device: torch.device, *, seed: int) -> RealRun:
    module, chance = asked.module, torch.Generator(device).manual_seed(seed)
    leaves, spec = flatten_tree((asked.args, asked.kwargs))
    given = {id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}
    stand_ins = {key: _made_up(leaf, chance) for key, leaf in given.items()}
    filled = [stand_ins.get(id(leaf), leaf) for leaf in leaves]
    real_args, real_kwargs = pytree.tree_unflatten(filled, spec)
    with _real_parameters(module, fakes, chance), _watched(module) as watch:
        watched = [
            *((leaf, stand_ins[key]) for key, leaf in given.items()),
            *((b, b) for b in module.buffers()),
        ]
        versions = [stand_in._version for _, stand_in in watched]
        result = dataclasses.replace(asked, args=real_args, kwargs=real_kwargs).make()
        changed = tuple(
            tensor
            for (tensor, real), version in zip(watched, versions, strict=True)
            if real._version != version
        )
    if watch.kept_tensors:
        raise CannotRun(f"it keeps tensors as attributes ({', '.join(watch.kept_tensors)})")
    outputs, output_spec = flatten_tree(result)
    if _numbers(outputs) - _numbers(leaves):
        raise CannotRun("it returns Python numbers")
    shadow = _Shadow(given, stand_ins, fakes.mode)
    fake = pytree.tree_unflatten([shadow.of(leaf) for leaf in outputs], output_spec)
    described = tuple(_described(leaf) for leaf in outputs)
    order = {id(tensor): at for at, (tensor, _) in enumerate(watched)}
    signature = (repr(output_spec), described, tuple(order[id(t)] for t in changed), watch.attributes)
    return RealRun(fake, changed, watch.attributes, signature)


def _numbers(leaves: list[Any]) -> set[tuple[type, str]]:
    """The Python numbers among leaves."""
    return {(type(leaf), repr(leaf)) for leaf in leaves if isinstance(leaf, bool | int | float | complex)}


def _described(leaf: Any) -> Any:  # a leaf of a result
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype, leaf.requires_grad
    return repr(leaf) if isinstance(leaf, bool | int | float | str | None) else type(leaf)


def _made_up(tensor: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    """A real tensor like this one; what is real already is copied, whole numbers are zeros."""
    if not isinstance(tensor, FakeTensor):
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=chance.device)
    if made.dtype is torch.bool:
        made.bernoulli_(generator=chance)
    elif not (made.is_floating_point() or made.is_complex()):
        made.zero_()
    elif made.numel() <= _PATTERN:
        made.normal_(generator=chance)
    else:
        pattern = torch.empty(_PATTERN, dtype=made.dtype, device=chance.device).normal_(generator=chance)
        flat = made.as_strided((made.untyped_storage().nbytes() // made.element_size(),), (1,))
        for part in flat.split(_PATTERN):
            part.copy_(pattern[: part.numel()])
    # Not a leaf of autograd's graph, for those cannot be changed in place.
    return made.requires_grad_().clone() if tensor.requires_grad else made


@contextlib.contextmanager
def _real_parameters(
    module: torch.nn.Module, fakes: FakeParameters, chance: torch.Generator
) -> Iterator[None]:
    """Put made-up parameters into a module, and the fakes back."""
    slots, made = _slots(module, fakes), {}
    try:
        for owner, key, fake in slots:
            if id(fake) not in made:
                numbers = _made_up(fake.detach(), chance)
                made[id(fake)] = torch.nn.Parameter(numbers, requires_grad=fake.requires_grad)
            owner._parameters[key] = made[id(fake)]
        yield
    finally:
        for owner, key, fake in slots:
            owner._parameters[key] = fake


class _Watch:
    def __init__(self) -> None:
        self.attributes: tuple[str, ...] = ()
        self.kept_tensors: tuple[str, ...] = ()


@contextlib.contextmanager
def _watched(module: torch.nn.Module) -> Iterator[_Watch]:
    """See which attributes a run changes anywhere inside, and put attributes and buffers back."""
    watch = _Watch()
    before = [(path, inner, python_state(inner), dict(vars(inner))) for path, inner in module.named_modules()]
    numbers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    with python_kept(module):
        yield watch
        attributes, kept = [], []
        for path, inner, state, own in before:
            inside = f"{path}." if path else ""
            attributes += [inside + key for key in changed_names(state, python_state(inner))]
            for key, value in vars(inner).items():
                if key not in MODULES_OWN and _tensors(value) != _tensors(own.get(key)):
                    kept.append(inside + key)
        watch.attributes, watch.kept_tensors = tuple(attributes), tuple(kept)
    with torch.no_grad():
        for buffer, value in numbers:
            buffer.copy_(value)


def _tensors(value: Any) -> list[int]:  # any value
    return [id(leaf) for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


class _Shadow:
    """Fakes for real results: an argument that is returned is that argument again, a view of one its view."""

    def __init__(
        self, given: dict[int, torch.Tensor], stand_ins: dict[int, torch.Tensor], mode: FakeTensorMode
    ) -> None:
        self.whole = {id(stand_in): given[key] for key, stand_in in stand_ins.items()}
        self.storages = {storage_of(stand_in): given[key] for key, stand_in in stand_ins.items()}
        self.mode = mode

    def of(self, leaf: Any) -> Any:  # a leaf of the result
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) in self.whole:
            return self.whole[id(leaf)]
        base = self.storages.get(storage_of(leaf))
        if base is not None and base.dtype is leaf.dtype:
            return base.as_strided(leaf.shape, leaf.stride(), leaf.storage_offset())
        fake = self.mode.from_tensor(leaf.detach())
        # A clone, since a leaf of autograd's graph could not be changed in place.
        return fake.requires_grad_().clone() if leaf.requires_grad else fake
