"""Recording: run the program once on fake parameters and write down every call as a tree.

The split works on what the program *did*. A `TorchFunctionMode` sees every torch function that Python
calls, a patched `Module.__call__` sees every module, a `TorchDispatchMode` sees below them which kernels
draw random numbers and how many FLOPs they take. Only parameters are fake: the batch and everything
computed from it alone is real, and no fake mode is active, because programs that ask "am I being traced?"
(transformers' mask code does) must answer as they would in training. Export-based tracing was rejected: it
needs the whole program to be traceable, runs a different program, and refuses most real models.

What cannot be seen is never guessed. A tensor that appears from nowhere (`vmap`, an `autograd.Function`,
`torch.from_numpy`) marks the module call that used it as `whole`: it will run as the module's own code.
"""

import contextlib
import copy
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from evenflow.errors import RecordError
from evenflow.graph.template import Ref, Shared, Template, is_plain
from evenflow.graph.tree import (
    BatchLeaf,
    BufferSource,
    CallSource,
    CallTree,
    Draws,
    FunctionCall,
    ModuleCall,
    ParameterSource,
    ReadCall,
    Source,
    TensorInfo,
    Value,
)

# Functions through which Python learns the numbers inside a tensor.
READS = frozenset(
    "item tolist __bool__ __int__ __float__ __complex__ __index__ __contains__ numpy __array__ equal allclose "
    "is_nonzero __dlpack__".split()
)
# Functions whose effect is not in what they return: repeating the call elsewhere would not repeat the effect.
IMPURE = frozenset(
    "requires_grad_ detach_ set_ resize_ resize_as_ __set__ __delete__ register_hook retain_grad backward grad "
    "register_post_accumulate_grad_hook share_memory_ manual_seed set_rng_state __setstate__".split()
)
_PATCH = threading.Lock()  # Module.__call__ is one per process


def record(
    program: Callable[[Any, Any], Any],
    model: torch.nn.Module,
    microbatch: Any,  # any tree
    *,
    device: torch.device,
    fakes: "FakeParameters",
) -> CallTree:
    """Run `program(model, microbatch)` once with fake parameters and return everything that it did.

    Tensors of `microbatch` are copied first, and buffers that the run changed are put back. Raises
    `RecordError` where the program needs a parameter's numbers, or hides what it does at the outermost level.
    """
    leaves, spec = pytree.tree_flatten(microbatch)
    leaves = [leaf.detach().to(device, copy=True).requires_grad_(leaf.requires_grad) if is_tensor(leaf) else leaf for leaf in leaves]
    recorder = _Recorder(model, fakes, [leaf for leaf in leaves if is_tensor(leaf)])
    with fakes.installed(), _buffers_restored(model):
        return recorder.run(program, model, pytree.tree_unflatten(leaves, spec), device)


def is_tensor(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor)


class FakeParameters:
    """One fake stand-in per distinct parameter: the same shape, dtype and strides, no memory.

    Two parameters that share storage and layout are one (*tied*), under the first name. Made once per model,
    so that it can be recorded again after a rank has let go of the stages that it does not own.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        by_storage: dict[tuple[Any, ...], torch.nn.Parameter] = {}
        self.names: dict[int, str] = {}  # id(fake) -> first name
        self.slots: list[tuple[torch.nn.Module, str, torch.nn.Parameter]] = []
        self.tied: dict[str, str] = {}  # every name -> first name
        for path, module in model.named_modules(remove_duplicate=True):
            for key, parameter in module._parameters.items():
                if parameter is None:
                    continue
                name = f"{path}.{key}" if path else key
                at = (_storage(parameter), parameter.storage_offset(), parameter.shape, parameter.stride())
                fake = by_storage.get(at)
                if fake is None:
                    with mode:
                        data = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device=device)
                        fake = torch.nn.Parameter(data, requires_grad=parameter.requires_grad)
                    by_storage[at] = fake
                    self.names[id(fake)] = name
                self.slots.append((module, key, fake))
                self.tied[name] = self.names[id(fake)]

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Put the stand-ins into the model, and the real parameters back afterwards."""
        real = [module._parameters[key] for module, key, _ in self.slots]
        try:
            for module, key, fake in self.slots:
                module._parameters[key] = fake
            yield
        finally:
            for (module, key, _), parameter in zip(self.slots, real, strict=True):
                module._parameters[key] = parameter


@contextlib.contextmanager
def _buffers_restored(model: torch.nn.Module) -> Iterator[None]:
    """Undo what the run does to buffers (batch-norm statistics, counters)."""
    slots = [(m, k, b, b._version, b.clone()) for m in model.modules() for k, b in m._buffers.items() if b is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, key, buffer, version, before in slots:
                module._buffers[key] = buffer
                if buffer._version != version:
                    buffer.copy_(before)


def _storage(tensor: torch.Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse, batched and other tensors without a storage
        return -id(tensor)


def _autocast() -> tuple[tuple[str, Any], ...]:
    kinds = ("cpu", "cuda")
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind))


class _Recorder:
    """The state of one recording; becomes a `CallTree`."""

    def __init__(self, model: torch.nn.Module, fakes: FakeParameters, batch: list[torch.Tensor]) -> None:
        self.values: list[Value] = []
        self.number_of: dict[int, int] = {}  # id(tensor) -> current value
        self.version_of: dict[int, int] = {}  # id(tensor) -> its version when last seen
        self.kept: list[torch.Tensor] = []  # holding a tensor keeps its id from being used again
        self.aliases: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self.renamed: list[tuple[int, int, int]] = []  # (id(tensor), value before, value after)
        self.shared: dict[int, tuple[object, Shared]] = {}
        self.calls: defaultdict[str, int] = defaultdict(int)
        self.clock = 0
        self.model = model
        self.paths = {id(module): path for path, module in model.named_modules()}
        for index, tensor in enumerate(batch):
            self.new_value(tensor, BatchLeaf(index))
        for module, key, fake in fakes.slots:
            if id(fake) not in self.number_of:
                self.new_value(fake, ParameterSource(fakes.names[id(fake)]))
        for name, buffer in model.named_buffers():
            self.new_value(buffer, BufferSource(name))
        root = ModuleCall("", 0, 0, Template((), pytree.tree_flatten(())[1]), True, _autocast())
        self.stack: list[ModuleCall] = [root]
        self.pending_draws = 0
        self.pending_flops = 0

    # -- values

    def new_value(self, tensor: torch.Tensor, source: Source) -> int:
        number = len(self.values)
        info = TensorInfo(tuple(tensor.shape), _stride(tensor), tensor.dtype, tensor.requires_grad)
        born = self.clock if isinstance(source, CallSource) else -1
        self.values.append(Value(number, info, source, _storage(tensor), born))
        if id(tensor) not in self.number_of:
            self.kept.append(tensor)
            self.aliases[_storage(tensor)].append(tensor)
        self.number_of[id(tensor)] = number
        self.version_of[id(tensor)] = tensor._version
        return number

    def number(self, tensor: torch.Tensor, used_by: str) -> int:
        """The value that this tensor holds now; one of unseen origin marks the current call as whole."""
        known = self.number_of.get(id(tensor))
        if known is not None:
            if tensor._version != self.version_of[id(tensor)]:
                self.keep_whole(f"a tensor was changed in place, before {used_by}, by something that cannot be recorded")
                self.version_of[id(tensor)] = tensor._version
            return known
        for path, module in self.model.named_modules():
            for key, attribute in vars(module).items():
                if attribute is tensor:
                    return self.new_value(tensor, BufferSource(f"{path}.{key}" if path else key))
        shape = list(tensor.shape)
        self.keep_whole(f"a {tensor.dtype} tensor of shape {shape}, used by {used_by}, came from an operation that cannot be recorded")
        return self.new_value(tensor, CallSource())

    def keep_whole(self, reason: str) -> None:
        if self.stack[-1].whole is None:
            self.stack[-1].whole = reason

    def encode(self, tree: Any, used_by: str) -> Template:
        leaves, spec = pytree.tree_flatten(tree)
        return Template(tuple(self.encode_leaf(leaf, used_by) for leaf in leaves), spec)

    def encode_leaf(self, leaf: Any, used_by: str) -> Any:
        if is_tensor(leaf):
            return Ref(self.number(leaf, used_by))
        if is_plain(leaf):
            return leaf
        if isinstance(leaf, torch.Generator):
            self.keep_whole(f"{used_by} draws from a torch.Generator of its own")
        if id(leaf) not in self.shared:
            self.shared[id(leaf)] = (leaf, Shared(len(self.shared), _copy_without_parameters(leaf)))
        return self.shared[id(leaf)][1]

    # -- calls

    def run(self, program: Callable[[Any, Any], Any], model: torch.nn.Module, microbatch: Any, device: torch.device) -> CallTree:
        root = self.stack[0]
        with _modules_observed(self), _Functions(self), _Kernels(self):
            result = program(model, microbatch)
        output = self.encode(result, "the result of the loss function")
        root.output, root.end = output, self.clock
        if root.whole is not None:
            raise RecordError(f"the loss function itself cannot be recorded: {root.whole}; move that into a module")
        same = {after: before for _, before, after in self.renamed}
        return CallTree(root, tuple(self.values), output, same, device)

    def function(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(function, "__name__", repr(function))
        inputs = self.encode((args, kwargs), name)
        changed = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if is_tensor(leaf)]
        versions = [tensor._version for tensor in changed]
        self.clock += 1
        self.pending_draws = self.pending_flops = 0
        grad_enabled = torch.is_grad_enabled()
        result = self.call(function, name, args, kwargs)
        changed = [t for t, version in zip(changed, versions, strict=True) if t._version != version]
        call, path = self.stack[-1], self.stack[-1].path
        if name in IMPURE:
            self.keep_whole(f"it calls {name}")
        if name in READS:
            call.children.append(ReadCall(function, name, path, self.clock, inputs, result))
            return result
        rebinds, changed_buffers = self.rebind(changed)
        made = [leaf for leaf in pytree.tree_leaves(result) if is_tensor(leaf)]
        for tensor in made:
            self.result(tensor, changed)
        if made or rebinds or changed_buffers:
            draws = Draws(path, call.call, call.num_draws, self.pending_draws) if self.pending_draws else None
            output = self.encode(result, name)
            state = (rebinds, changed_buffers, draws, self.pending_flops, grad_enabled, _autocast())
            call.children.append(FunctionCall(function, name, path, self.clock, inputs, output, *state))
        call.num_draws += self.pending_draws
        return result

    def result(self, tensor: torch.Tensor, changed: list[torch.Tensor]) -> None:
        """Number a function's result. One that is the very input (`contiguous`, `to`) gets a new number too:

        on real parameters the same call may return a copy, and what follows must use that.
        """
        known = self.number_of.get(id(tensor))
        if known is None:
            self.new_value(tensor, CallSource())
        elif isinstance(self.values[known].source, CallSource) and not any(tensor is other for other in changed):
            self.renamed.append((id(tensor), known, self.new_value(tensor, CallSource())))

    def restore_names(self, mark: int, result: Any) -> None:
        """Leaving a module: what it did not return or change has again the number that it came with."""
        returned = {id(leaf) for leaf in pytree.tree_leaves(result) if is_tensor(leaf)}
        for key, before, after in reversed(self.renamed[mark:]):
            if key not in returned and self.number_of[key] == after:
                self.number_of[key] = before

    def call(self, function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return function(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            where = self.stack[-1].path or "the loss function"
            raise RecordError(
                f"{where} calls {name} on numbers that depend on the parameters; recording has no parameters' numbers. "
                "Keep such a branch or shape inside one module that does not need it (this release cannot run it alone)"
            ) from error

    def rebind(self, changed: list[torch.Tensor]) -> tuple[tuple[tuple[int, int], ...], tuple[str, ...]]:
        """New versions for all that shares storage with what a call changed in place; and the buffers among it."""
        pairs: list[tuple[int, int]] = []
        buffers: list[str] = []
        for storage in {_storage(tensor) for tensor in changed}:
            for tensor in self.aliases[storage]:
                old = self.number_of[id(tensor)]
                self.version_of[id(tensor)] = tensor._version
                match self.values[old].source:
                    case ParameterSource(name):
                        self.keep_whole(f"it changes the parameter {name} in place")
                    case BufferSource(name):  # one object for the whole run: its owner changes it where it lives
                        buffers.append(name)
                    case _:
                        pairs.append((old, self.new_value(tensor, CallSource())))
        return tuple(pairs), tuple(buffers)

    def module(self, module: torch.nn.Module, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = self.encode((args, kwargs), path)
        self.clock += 1
        call = ModuleCall(path, self.calls[path], self.clock, inputs, torch.is_grad_enabled(), _autocast())
        call.whole = _reason_to_stay_whole(module)
        self.calls[path] += 1
        self.stack[-1].children.append(call)
        self.stack.append(call)
        state, mark = _python_state(module), len(self.renamed)
        try:
            result = forward(module, *args, **kwargs)
        finally:
            self.stack.pop()
            self.clock += 1
        call.end = self.clock
        if _python_state(module) != state:
            call.whole = "it changes its own attributes while it runs"
        self.stack.append(call)  # an unknown tensor among the results is this call's own doing
        call.output = self.encode(result, f"the result of {path}")
        self.stack.pop()
        self.restore_names(mark, result)
        return result


def _stride(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.stride()) if tensor.layout == torch.strided else ()


def _copy_without_parameters(leaf: Any) -> Any:
    try:
        return copy.deepcopy(leaf)
    except Exception:  # noqa: BLE001 (whatever a foreign __deepcopy__ raises: the object is then handed on as it is)
        return leaf


def _reason_to_stay_whole(module: torch.nn.Module) -> str | None:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(not getattr(hook, "evenflow", False) for table in hooks for hook in table.values()):
        return "it carries hooks"
    if type(module).__module__.startswith("torch.nn.modules.") and not isinstance(module, torch.nn.Sequential | torch.nn.ModuleList):
        return "it is one of torch's own layers"
    return None


def _python_state(module: torch.nn.Module) -> dict[str, int]:
    return {key: id(value) for key, value in vars(module).items() if not key.startswith("_")}


@contextlib.contextmanager
def _modules_observed(recorder: _Recorder) -> Iterator[None]:
    forward = torch.nn.Module.__call__

    def observed(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:  # as Module.__call__
        path = recorder.paths.get(id(module))
        if path is not None:
            return recorder.module(module, path, forward, args, kwargs)
        if any(True for _ in module.parameters()):
            raise RecordError(
                f"{type(module).__name__} is called by the loss function but is not part of the model; "
                "put both into one nn.ModuleDict and pass that as the model"
            )
        return forward(module, *args, **kwargs)

    with _PATCH:
        torch.nn.Module.__call__ = observed  # type: ignore[method-assign]  # the patch is the point
        try:
            yield
        finally:
            torch.nn.Module.__call__ = forward  # type: ignore[method-assign]


class _Functions(TorchFunctionMode):
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.recorder.function(func, args, kwargs or {})


class _Kernels(TorchDispatchMode):
    """Counts draws and FLOPs of the function that is running."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if draws(func, args, kwargs):
            self.recorder.pending_draws += 1
        packet = func.overloadpacket
        if packet in flop_registry:
            self.recorder.pending_flops += flop_registry[packet](*args, **kwargs, out_val=result)
        elif packet.__name__ == "_scaled_dot_product_flash_attention_for_cpu":
            self.recorder.pending_flops += sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
        return result


def draws(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:  # kernel: an OpOverload
    """Whether this call of a kernel draws random numbers: by its tag, unless its dropout is zero."""
    if torch.Tag.nondeterministic_seeded not in kernel.tags:
        return False
    for position, argument in enumerate(kernel._schema.arguments):
        if argument.name == "dropout_p":
            given = kwargs.get("dropout_p", args[position] if position < len(args) else argument.default_value)
            return bool(given)
    return True
