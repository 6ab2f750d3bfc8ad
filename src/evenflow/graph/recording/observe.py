"""What observes a recording: every module call, every torch function, every kernel below them."""

import contextlib
import logging
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch._functorch import apis, eager_transforms
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from evenflow.errors import RecordError
from evenflow.graph.kernels.fake_kernels import run_kernel
from evenflow.graph.kernels.fakes import storage_of
from evenflow.graph.kernels.flops import flops_of
from evenflow.graph.kernels.kernels import changed_unsaid, deciding, draws, written
from evenflow.graph.recording.kernel_notes import KernelNotes

_DEVICE = torch.ops.prim.device.default
_ITEM = torch.ops.aten._local_scalar_dense.default  # noqa: SLF001 (a kernel's name)
_PATCH = threading.Lock()  # what is patched here is one per process


@dataclass(frozen=True, slots=True)
class Invocation:
    """The call of a module of the model that is about to be made; `path` is the module's there."""

    module: torch.nn.Module
    path: str
    own: Callable[..., Any]  # `Module.__call__`
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def make(self) -> Any:
        """Call the module, and return what it returns."""
        return self.own(self.module, *self.args, **self.kwargs)


class ModuleListener(Protocol):
    """What is told of each call of a module, and makes it."""

    paths: dict[int, str]  # id(module) -> its path in the model

    def module(self, asked: Invocation) -> Any:
        """Make and note the call of a module of the model."""


class FunctionListener(Protocol):
    """What is told of each call of a torch function, and makes it."""

    blind: bool  # inside a custom autograd function, whose own steps are not the program's

    def function(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make and note the call of a torch function."""

    def custom_function(self, apply: types.MethodType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make and note the call of a custom autograd function's `apply`, blind to what is inside."""

    def whole_function(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, name: str
    ) -> Any:
        """Make and note the call of what bypasses `__torch_function__`, blind to what is inside."""


def unwatched() -> contextlib.AbstractContextManager[None]:
    """For the observer's own looks at tensors: torch functions called meanwhile are not the program's."""
    return torch._C.DisableTorchFunction()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from talking about what fake tensors do: a page about each error, which is raised anyway."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True  # a level would empty the caches of all loggers
    try:
        with warnings.catch_warnings():
            # Fake tensors ask real ones for their `.grad`.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            yield
    finally:
        logger.disabled = disabled


@contextlib.contextmanager
def observed_by(
    modules: ModuleListener, functions: FunctionListener, *, kernels: KernelNotes | None = None
) -> Iterator[None]:
    """Tell listeners of all calls of this thread meanwhile, and `kernels` of all kernels below them."""
    with (
        _PATCH,
        _unvalidated_distributions(),
        _needless_conversions_left_out(),
        _swaps_refused(),
        contextlib.nullcontext() if kernels is None else _subclasses_refused(kernels),
        _modules_observed(modules, functions),
        _custom_functions_observed(functions),
        _whole_functions_observed(functions),
        _Functions(functions),
        contextlib.nullcontext() if kernels is None else _Kernels(kernels),
    ):
        yield


@contextlib.contextmanager
def patched(owner: Any, name: str, replacement: Any) -> Iterator[None]:  # owner: a class or a module
    """Put something else in the place of a class's or a module's attribute meanwhile."""
    inherits, before = name not in vars(owner), vars(owner).get(name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        if inherits:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextlib.contextmanager
def _unvalidated_distributions() -> Iterator[None]:
    """Keep torch's distributions from looking at the numbers that they are given, only to raise if wrong."""
    before = Distribution._validate_args  # noqa: SLF001 (torch has no other way to ask)
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def _needless_conversions_left_out() -> contextlib.AbstractContextManager[None]:
    """Let `module.to(…)` in a forward leave alone what is right already: fakes cannot be swapped."""
    apply: Callable[..., torch.nn.Module] = torch.nn.Module._apply  # noqa: SLF001 (the place to patch)

    def applied(
        module: torch.nn.Module, convert: Callable[..., Any], recurse: bool = True
    ) -> torch.nn.Module:
        with unwatched():
            tensors = (*module.parameters(recurse), *module.buffers(recurse))
            if all(convert(tensor) is tensor for tensor in tensors):
                return module
        return apply(module, convert, recurse)

    return patched(torch.nn.Module, "_apply", applied)


def _swaps_refused() -> contextlib.AbstractContextManager[None]:
    def refused(*_: torch.Tensor) -> None:
        raise RecordError(
            "the program calls torch.utils.swap_tensors, of which a recording cannot follow the tensors"
        )

    return patched(torch.utils, "swap_tensors", refused)


def _subclasses_refused(kernels: KernelNotes) -> contextlib.AbstractContextManager[None]:
    """Refuse by name to make another class of a fake tensor, which is of a class of its own."""
    own = torch.Tensor.as_subclass

    def as_subclass(tensor: torch.Tensor, kind: type[torch.Tensor]) -> torch.Tensor:
        if isinstance(tensor, FakeTensor) and kind is not torch.Tensor:
            raise kernels.no_subclass("as_subclass", kind)
        return tensor if isinstance(tensor, FakeTensor) else own(tensor, kind)

    return patched(torch.Tensor, "as_subclass", as_subclass)


def _modules_observed(
    modules: ModuleListener, functions: FunctionListener
) -> contextlib.AbstractContextManager[None]:
    own, thread = torch.nn.Module.__call__, threading.get_ident()

    def observed(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:  # as Module.__call__
        if threading.get_ident() != thread:
            return own(module, *args, **kwargs)
        path = modules.paths.get(id(module))
        if path is not None and not functions.blind:
            return modules.module(Invocation(module, path, own, args, kwargs))
        if path is None and any(True for _ in module.parameters()):
            raise RecordError(
                f"{type(module).__name__} is called by the loss function but is not part of the model; "
                "put both into one nn.ModuleDict and pass that as the model"
            )
        return own(module, *args, **kwargs)

    return patched(torch.nn.Module, "__call__", observed)


def _shown(
    own: Callable[..., Any], show: Callable[..., Any], observer: FunctionListener
) -> Callable[..., Any]:
    """`show` in the place of `own`, except on other threads and inside of what is shown already."""
    thread = threading.get_ident()

    def call(*args: Any, **kwargs: Any) -> Any:  # as `own`
        other = observer.blind or threading.get_ident() != thread
        return own(*args, **kwargs) if other else show(*args, **kwargs)

    return call


def _custom_functions_observed(observer: FunctionListener) -> contextlib.AbstractContextManager[None]:
    """Custom autograd functions bypass `__torch_function__`: each `apply` is shown as one torch function."""
    own = vars(torch.autograd.Function)["apply"].__func__

    def show(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:  # as Function.apply
        return observer.custom_function(types.MethodType(own, cls), args, kwargs)

    return patched(torch.autograd.Function, "apply", classmethod(_shown(own, show, observer)))


# What a transformed function calls, the function itself among its arguments; torch has no public place.
_TRANSFORMS = (
    (apis, "vmap_impl", "vmap"),
    (eager_transforms, "grad_impl", "func.grad"),
    (eager_transforms, "grad_and_value_impl", "func.grad_and_value"),
)


@contextlib.contextmanager
def _whole_functions_observed(observer: FunctionListener) -> Iterator[None]:
    """Scripted functions and transforms bypass `__torch_function__` too."""
    scripted = torch.jit.ScriptFunction.__call__

    def show_scripted(function: Any, *args: Any, **kwargs: Any) -> Any:  # as ScriptFunction.__call__
        return observer.whole_function(function, args, kwargs, name=function.name)

    def transform(own: Callable[..., Any], name: str) -> Callable[..., Any]:
        def show(*args: Any, **kwargs: Any) -> Any:  # as `own`
            return observer.whole_function(own, args, kwargs, name=name)

        return _shown(own, show, observer)

    with contextlib.ExitStack() as stack:
        shown = _shown(scripted, show_scripted, observer)
        stack.enter_context(patched(torch.jit.ScriptFunction, "__call__", shown))
        for module, key, name in _TRANSFORMS:
            stack.enter_context(patched(module, key, transform(getattr(module, key), name)))
        yield


class _Functions(TorchFunctionMode):
    def __init__(self, observer: FunctionListener) -> None:
        super().__init__()
        self.observer = observer

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.observer.function(func, args, kwargs or {})


class _Kernels(TorchDispatchMode):
    """Counts draws and FLOPs of the function that is running."""

    def __init__(self, observer: KernelNotes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.observer = observer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with unwatched():  # a scripted function's kernels would else be taken for the program's own calls
            if func is _DEVICE:  # most calls are this one
                return args[0].device
            return self.seen(func, args, kwargs or {})

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # func: an OpOverload
        for tensor in written(func, args, kwargs) if func._schema.is_mutable else ():
            if not isinstance(tensor, FakeTensor):
                self.observer.write_outside(tensor)
        result, lengths = run_kernel(func, args, kwargs, self.observer.all_fake)
        if self.observer.within is not None:
            self.note_captured(self.observer.within, func, (args, kwargs), result)
        self.observer.deciding += lengths
        for leaf in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor):
                self.observer.born.add(storage_of(leaf))
                if lengths:
                    self.observer.known.append(leaf)
        if draws(func, args, kwargs):
            self.observer.num_draws += 1
        if torch.Tag.dynamic_output_shape in func.tags:
            self.observer.deciding += deciding(func, args)
        elif func is _ITEM:
            self.observer.deciding.append(args[0])
        self.observer.changed.update(map(id, changed_unsaid(func, args)))
        self.observer.flops += flops_of(func, args, kwargs, result)
        return result

    def note_captured(self, within: set[int], kernel: Any, given: Any, result: Any) -> None:
        """Note memory that a whole function uses and was not given: what its closure or a module holds."""
        used, made = (
            {storage_of(leaf) for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)}
            for tree in (given, result)
        )
        if kernel is not torch.ops.aten.lift_fresh.default:  # by which `torch.tensor` makes one of numbers
            self.observer.captured |= not used <= within
        within |= used | made
