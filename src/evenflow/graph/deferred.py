"""`deferred_init`: build a model whose parameters have no memory yet, but a recipe for their numbers.

Whatever becomes a parameter turns into a meta tensor the moment it is registered; everything else (rotary
tables, masks) stays real, because programs look at such numbers and the recorder computes with them. A
dispatch mode notes each kernel that runs meanwhile, so initialisation needs no convention: `nn.init`,
`reset_parameters`, `_init_weights`, `w.data[0].zero_()` and `weight.copy_(...)` are all the same to it.
Rejected: building on meta and calling `reset_parameters` later, which knows torch's own modules only.
"""

import contextlib
import inspect
import threading
import types
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)

from evenflow.errors import ConfigError
from evenflow.graph.kernels.fakes import storage_of
from evenflow.graph.kernels.kernels import deciding, draws, written
from evenflow.graph.recipes import (
    OVERWRITING,
    KernelCall,
    Memory,
    Replay,
    forget,
    keep_before_writing,
    learn,
    memory_of,
    slice_of,
    twin_of,
    view_of,
)
from evenflow.graph.recording.observe import unwatched

_EMPTY = "_evenflow_empty"  # the attribute of a real parameter that leads to the one in its place
_VERSION = "_evenflow_version"  # the attribute of a parameter: its version when the context ended
# What is made this large is a parameter in all likelihood, and is not allocated even for a moment.
_HUGE_BYTES = 1 << 28
_META = torch.device("meta")
_LOOKS = frozenset({"numpy", "__array__", "tolist"})
_FROM_DATA = frozenset({torch.tensor, torch.as_tensor, torch.asarray})
_LOADING = torch.nn.Module._load_from_state_dict.__code__
_INITIALISERS = {
    function.__code__: function
    for function in vars(torch.nn.init).values()
    if isinstance(function, types.FunctionType) and function.__module__ == "torch.nn.init"
}


@contextlib.contextmanager
def deferred_init() -> Iterator[None]:
    """Build a model that is too big for one process: parameters of the modules made inside have no memory.

    `evenflow.pipeline` later fills in the parameters of this process's own stages, with numbers that depend
    on its `seed`, the parameter's name and its own initialisation alone: not on the number of stages or
    processes, nor on torch's generator, nor on other parameters. All other tensors are real, their random
    numbers torch's own; a buffer that is computed from a parameter is filled in on every process. Change or
    convert the model (`.to(torch.bfloat16)`, tied weights, another initialisation) inside as well.
    `load_state_dict` inside keeps the given tensors themselves until the pipeline is built.

    Raises `ConfigError` where the code needs a parameter's random numbers to go on. Parameters of a class of
    their own (quantised ones) and lazy modules' stay as they are.

    >>> import evenflow
    >>> with evenflow.deferred_init():
    ...     model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    >>> model[0].weight.device
    device(type='meta')
    >>> batch = {"x": torch.randn(8, 4), "y": torch.randn(8, 1)}
    >>> pipe = evenflow.pipeline(
    ...     model,
    ...     loss=lambda model, batch: torch.nn.functional.mse_loss(model(batch["x"]), batch["y"]),
    ...     example=batch,
    ...     stages=2,
    ... )
    >>> model[0].weight.device
    device(type='cpu')
    """
    if any(isinstance(mode, _Kernels) for mode in _get_current_dispatch_mode_stack()):
        yield
        return
    thread = threading.get_ident()
    modules: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def registered(
        module: torch.nn.Module, name: str, parameter: torch.nn.Parameter
    ) -> torch.nn.Parameter | None:
        if threading.get_ident() != thread:
            return None
        modules.add(module)
        with unwatched(), _disable_current_modes():
            return _deferred(parameter, f"{type(module).__name__}.{name}")

    hook = register_module_parameter_registration_hook(registered)  # type: ignore[arg-type]  # it may return one
    kernels = _Kernels()
    try:
        with _Functions(), kernels:
            yield
    finally:
        hook.remove()
        for storage in kernels.real:  # it has its numbers: whatever they came from may go
            forget(storage)
        for module in modules:
            for parameter in module._parameters.values():
                if parameter is not None and parameter.is_meta:
                    setattr(parameter, _VERSION, parameter._version)


def changed_since(parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter was changed in place after its context ended, which no recipe knows of."""
    return bool(parameter.is_meta and getattr(parameter, _VERSION, parameter._version) != parameter._version)


def _deferred(parameter: torch.nn.Parameter, label: str) -> torch.nn.Parameter | None:
    """Empty a parameter that is being registered; returns what must stand in its place, if anything."""
    if type(parameter) is not torch.nn.Parameter or is_lazy(parameter):
        return None
    earlier = vars(parameter).get(_EMPTY)
    if earlier is not None:
        return earlier  # type: ignore[no-any-return]  # set below
    if not parameter.is_meta:
        if memory_of(parameter) is None and getattr(parameter, "_is_hf_initialized", False):
            raise ConfigError(
                f"{label} is being loaded inside deferred_init(), by every process: build the model from its "
                "configuration (from_config), and load the weights into the pipeline"
            )
        empty = torch.nn.Parameter(twin_of(parameter), requires_grad=parameter.requires_grad)
        vars(empty).update(vars(parameter))
        try:
            torch.utils.swap_tensors(parameter, empty)  # whoever holds the object holds the empty one now
        except RuntimeError:  # something else refers to its insides
            setattr(parameter, _EMPTY, empty)
            parameter = empty
    memory = memory_of(parameter)
    if memory is not None and not memory.label:
        memory.label = label
    return parameter


class _Functions(TorchFunctionMode):
    """What no kernel tells: `.data = ...`, looks through numpy, initialisers that pass over meta tensors."""

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        of, name = getattr(func, "__self__", None), getattr(func, "__name__", "")
        if name in _LOOKS:
            with unwatched():
                return _look(func, args, kwargs)
        if func in _FROM_DATA and torch.device(kwargs.get("device") or "cpu") == _META:
            kwargs = kwargs | {"device": torch.device("cpu")}  # the data is known: it must not be lost
        if name == "new_tensor" and args[0].is_meta and kwargs.get("device") is None:
            kwargs = {"dtype": args[0].dtype} | kwargs | {"device": torch.device("cpu")}
        if name == "__set__" and of is torch.Tensor.data:
            with unwatched(), _disable_current_modes():
                target, new = args
                if new.is_meta and isinstance(target, torch.nn.Parameter):
                    _deferred(target, "a parameter")
                func(target, twin_of(new) if target.is_meta and not new.is_meta else new)
                return None
        if name == "__get__" and of is torch.Tensor.is_meta:
            with unwatched():
                return _asked_for_meta(args[0], inspect.currentframe())
        return func(*args, **kwargs)


def _look(func: Any, args: Any, kwargs: Any) -> Any:
    tensor = args[0]
    if tensor.is_meta:
        return func(_numbers((tensor,), func.__name__)[0], *args[1:], **kwargs)
    _looked_at((tensor,))
    if func.__name__ != "tolist" and tensor.layout is torch.strided:
        forget(tensor.untyped_storage())  # it may be written through the array
    return func(*args, **kwargs)


def _asked_for_meta(tensor: torch.Tensor, mode: types.FrameType | None) -> bool:
    """Answer `tensor.is_meta`; an initialiser of `torch.nn.init` that asks returns then: note its call."""
    assert mode is not None
    assert mode.f_back is not None
    frame = mode.f_back  # who asks
    function = _INITIALISERS.get(frame.f_code)
    if frame.f_code is _LOADING:
        return False  # or torch would warn that copying into an empty tensor does nothing
    if function is None:
        return tensor.is_meta
    arguments = {name: frame.f_locals[name] for name in inspect.signature(function).parameters}
    if not tensor.is_meta:  # its loops look at the numbers drawn: a recipe of its kernels would be wrong
        keep_before_writing(tensor)
        with _disable_current_modes():
            function(**arguments)
    if memory_of(tensor) is not None:
        _note(function, (), arguments, (), changed=(tensor,), drawn=True)
    return True


class _Kernels(TorchDispatchMode):
    """Notes kernels, and runs those that concern an empty tensor without numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.real: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()  # memories made with numbers

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        with unwatched():
            return self.run(func, args, kwargs or {})

    def run(self, kernel: Any, args: Any, kwargs: Any) -> Any:
        given = _tensors((args, kwargs))
        changed = written(kernel, args, kwargs)
        if any(tensor.is_meta for tensor in given):
            real = next((tensor for tensor in changed if not tensor.is_meta), None)
            if real is not None:
                raise ConfigError(
                    f"{_plain(kernel)} writes numbers of {_label(given)} into another tensor, of shape "
                    f"{list(real.shape)}, inside deferred_init(), where parameters have none yet; make a new "
                    "tensor of them instead: register_buffer(..., parameter.clone())"
                )
            if _needs_numbers(kernel, args):
                real_args, real_kwargs = _numbers((args, kwargs), _plain(kernel))
                result = kernel(*real_args, **real_kwargs)
            else:
                result = kernel(*_emptied(args), **_emptied(kwargs))
        elif not given and _is_huge(kernel, args, kwargs):
            result = kernel(*args, **_emptied(kwargs))
        else:
            if _needs_numbers(kernel, args):
                _looked_at(given)
            for tensor in changed:
                keep_before_writing(tensor)
            result = kernel(*args, **kwargs)
        changed = [tensor for tensor in changed if memory_of(tensor) is not None]
        made = self.made(given, result)
        if made and not given:
            kwargs = _settled(kernel, kwargs, result)
        if made or changed:
            _note(kernel, args, kwargs, made, changed=changed, drawn=draws(kernel, args, kwargs))
        return result

    def made(self, given: Sequence[torch.Tensor], result: Any) -> list[tuple[int, Memory]]:
        """The memories that a kernel made, by the place of a result that lies there."""
        made = []
        known = {storage_of(tensor) for tensor in given}
        for place, leaf in enumerate(pytree.tree_leaves(result)):
            if isinstance(leaf, torch.Tensor) and storage_of(leaf) not in known:
                known.add(storage_of(leaf))
                if leaf.layout is torch.strided:
                    storage = leaf.untyped_storage()
                    made.append((place, Memory(storage.nbytes())))
                    learn(storage, made[-1][1])
                    if not leaf.is_meta:
                        self.real.add(storage)
        return made


def _note(
    kernel: Any,  # an OpOverload, or an initialiser of torch.nn.init
    args: Any,
    kwargs: Any,
    made: Sequence[tuple[int, Memory]],
    *,
    changed: Sequence[torch.Tensor],
    drawn: bool,
) -> None:
    read: dict[Memory, int] = {}
    args, kwargs = _encoded(args, read), _encoded(kwargs, read)
    overwritten = None
    if len(changed) == 1 and _plain(kernel) in OVERWRITING:
        memory = memory_of(changed[0])
        assert memory is not None
        if read[memory] == 1 and changed[0].is_contiguous() and changed[0].nbytes == memory.num_bytes:
            overwritten = memory
            del read[memory]
    call = KernelCall(kernel, args, kwargs, tuple(read), tuple(made), overwritten, drawn)
    for memory in dict.fromkeys([*map(memory_of, changed), *(memory for _, memory in made)]):
        assert memory is not None
        memory.writers.append(call)


def _settled(kernel: Any, kwargs: Any, result: torch.Tensor) -> Any:
    """A factory's arguments with what would else be read from torch's defaults when it runs again."""
    names = {argument.name for argument in kernel._schema.arguments}
    settled = {"dtype": result.dtype, "device": result.device, "pin_memory": False}
    return kwargs | {key: value for key, value in settled.items() if key in names}


def _needs_numbers(kernel: Any, args: Any) -> bool:
    if torch.Tag.data_dependent_output in kernel.tags:
        return True
    return torch.Tag.dynamic_output_shape in kernel.tags and bool(deciding(kernel, args))


def _looked_at(tensors: Iterable[torch.Tensor]) -> None:
    """Remember that Python learnt what was drawn, and may have gone another way with other numbers."""
    for call in slice_of(memory for memory in map(memory_of, tensors) if memory is not None):
        call.looked_at = True


def _numbers(tree: Any, name: str) -> Any:
    """The arguments with real numbers for empty tensors, where no draw went into them."""
    read: dict[Memory, int] = {}
    encoded = _encoded(tree, read)
    calls = slice_of(read)
    if any(call.draws for call in calls):
        raise ConfigError(
            f"{name} asks for numbers of {_label(_tensors(tree))} inside deferred_init(), where parameters "
            "have none yet; initialise without looking at numbers, or build the model without deferred_init()"
        )
    with _disable_current_modes():
        replay = Replay(torch.device("cpu"), _label(_tensors(tree)))
        replay.run(calls, {})
        return replay.real(encoded)


def _plain(kernel: Any) -> str:
    """How a message calls a kernel."""
    name: str = kernel.__name__.split(".")[0]
    return "item" if name == "_local_scalar_dense" else name


def _label(tensors: Iterable[torch.Tensor]) -> str:
    """How a message calls the parameter that these empty tensors come from."""
    memories = [memory for memory in map(memory_of, tensors) if memory is not None]
    for memory in memories:
        if memory.label:
            return memory.label
    for call in slice_of(memories):
        for memory in (*call.read, *(memory for _, memory in call.made)):
            if memory.label:
                return memory.label
    return "a parameter"


def _is_huge(kernel: Any, args: Any, kwargs: Any) -> bool:
    """Whether a factory would make more than what is worth allocating for a moment."""
    if "device" not in kwargs:
        return False
    return any(tensor.nbytes >= _HUGE_BYTES for tensor in _tensors(kernel(*args, **_emptied(kwargs))))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _encoded(tree: Any, read: dict[Memory, int]) -> Any:
    """The arguments with views for tensors; `read` counts how often each memory stands there."""

    def encoded(leaf: Any) -> Any:
        if isinstance(leaf, torch.Generator):
            return None  # draws are keyed by seed and name, whatever generator was given
        if not isinstance(leaf, torch.Tensor) or leaf.layout is not torch.strided:
            return leaf
        view = view_of(leaf)
        read[view.memory] = read.get(view.memory, 0) + 1
        return view

    return pytree.tree_map(encoded, tree)


def _emptied(tree: Any) -> Any:
    """The arguments for a run that computes shapes alone."""

    def emptied(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf if leaf.is_meta else leaf.to(_META)
        if isinstance(leaf, torch.Generator):
            return None
        return _META if isinstance(leaf, torch.device) else leaf

    emptied_tree = pytree.tree_map(emptied, tree)
    if isinstance(tree, dict) and "pin_memory" in tree:
        emptied_tree["pin_memory"] = False
    return emptied_tree
