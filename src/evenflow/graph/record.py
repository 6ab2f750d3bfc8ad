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

import copy
from collections import Counter, defaultdict
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
)
from torch.utils import _pytree as pytree

from evenflow.errors import RecordError
from evenflow.graph.fakes import FakeParameters, RealParameters, buffers_copied, storage_of
from evenflow.graph.modules import (
    Attribute,
    changed_attributes,
    python_state,
    reason_to_stay_whole,
    set_attribute,
    touched_containers,
)
from evenflow.graph.observe import observed_by, quiet, unwatched
from evenflow.graph.template import NOTHING, Ref, Shared, Template, flatten_tree, is_plain
from evenflow.graph.tree import (
    ARRAYS,
    SHAPE,
    BatchLeaf,
    BufferSource,
    CallSource,
    CallTree,
    Draws,
    FunctionCall,
    ModuleCall,
    ParameterSource,
    ReadCall,
)
from evenflow.graph.values import Values

# Functions through which Python learns the numbers inside a tensor.
_NUMBERS = {"item", "tolist", "__bool__", "__int__", "__float__", "__complex__", "__index__", "__contains__"}
READS = frozenset(_NUMBERS | ARRAYS | {"equal", "allclose", "is_nonzero"})
# Functions whose effect is not in what they return: repeating the call elsewhere would not repeat the effect.
_METADATA = {
    "requires_grad_",
    "detach_",
    "set_",
    "resize_",
    "resize_as_",
    "share_memory_",
    "__set__",
    "__delete__",
}
_HOOKS = {"register_hook", "register_post_accumulate_grad_hook", "retain_grad", "backward", "grad"}
IMPURE = frozenset(_METADATA | _HOOKS | {"manual_seed", "set_rng_state", "__setstate__"})


def record(
    program: Callable[[Any, Any], Any],
    model: torch.nn.Module,
    microbatch: Any,  # any tree
    *,
    device: torch.device,
    fakes: FakeParameters | RealParameters,
    seen: Callable[[int, torch.Tensor], None] | None = None,
) -> CallTree:
    """Run `program(model, microbatch)` once with fake parameters and return everything that it did.

    `seen` is told each value's number and tensor when it is made (with `RealParameters`, its numbers too).

    The run works on copies of the microbatch's tensors and of the buffers, and leaves the random generators
    as they were. Raises `RecordError` where the program needs a parameter's numbers, or hides what it does
    at the outermost level; the program's own errors come with a note of where they arose.
    """
    leaves, spec = flatten_tree(microbatch)
    given = [leaf for leaf in leaves if is_tensor(leaf)]
    copies = {id(leaf): _copied(leaf, device) for leaf in leaves if is_tensor(leaf)}  # one tensor stays one
    leaves = [copies.get(id(leaf), leaf) for leaf in leaves]
    with fakes.installed(), buffers_copied(model, device), torch.random.fork_rng():
        recorder = _Recorder(model, fakes, [leaf for leaf in leaves if is_tensor(leaf)], seen)
        tree = recorder.run(program, pytree.tree_unflatten(leaves, spec), device)
    changed = (v for v in tree.values[: len(given)] if v.storage in recorder.values.changed_storages)
    _refuse_overlaps(given, [v.source.index for v in changed if isinstance(v.source, BatchLeaf)])
    return tree


def _refuse_overlaps(given: list[torch.Tensor], changed: list[int]) -> None:
    """Refuse a change in place of a batch tensor that shares memory with another: copies of them do not."""
    sharing = Counter(storage_of(tensor) for tensor in {id(tensor): tensor for tensor in given}.values())
    for index in changed:
        if sharing[storage_of(given[index])] > 1:
            raise RecordError(
                f"the program changes the batch's tensor number {index} (shape {list(given[index].shape)}) "
                "in place, and it shares its memory with another one; clone one of them before it is passed"
            )


def _copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.detach().to(device, copy=True).requires_grad_(tensor.requires_grad)


def is_tensor(leaf: object) -> bool:
    """Whether a leaf of a tree is a tensor."""
    return isinstance(leaf, torch.Tensor)


def _autocast() -> tuple[tuple[str, Any], ...]:
    kinds = ("cpu", "cuda")
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind))


class _Recorder:
    """The state of one recording; becomes a `CallTree`."""

    def __init__(
        self,
        model: torch.nn.Module,
        fakes: FakeParameters | RealParameters,
        batch: list[torch.Tensor],
        seen: Callable[[int, torch.Tensor], None] | None,
    ) -> None:
        self.values = Values(seen)
        self.shared: dict[int, tuple[object, Shared]] = {}
        self.calls: defaultdict[str, int] = defaultdict(int)
        self.clock = 0
        self.model = model
        self.paths = {id(module): path for path, module in model.named_modules()}
        for index, tensor in enumerate(batch):
            self.values.add(tensor, BatchLeaf(index))
        for _, _, fake in fakes.slots:
            if self.values.find(fake) is None:
                self.values.add(fake, ParameterSource(fakes.names[id(fake)]))
        self.parameter_names = fakes.tied
        for name, buffer in model.named_buffers():
            self.values.add(buffer, BufferSource(name))
        root = ModuleCall("", 0, 0, NOTHING, True, _autocast())
        self.stack: list[ModuleCall] = [root]
        self.pending_draws = 0
        self.pending_flops = 0
        self.pending_dynamic = False
        self.pending_changed: set[int] = set()
        self.failed_in = ""  # the innermost module that raised
        self.blind = False
        self.undo: list[tuple[torch.nn.Module, str, Attribute | None]] = []  # as they were

    # -- values

    def number(self, tensor: torch.Tensor, used_by: str) -> int:
        """The value that this tensor holds now; one of unseen origin marks the current call as whole."""
        known = self.values.find(tensor)
        if known is not None:
            if self.values.changed_unseen(tensor):
                self.keep_whole(
                    f"a tensor was changed in place, before {used_by}, by something that cannot be recorded"
                )
            return known
        for path, module in self.model.named_modules():
            for key, attribute in vars(module).items():
                if attribute is tensor:
                    return self.values.add(tensor, BufferSource(f"{path}.{key}" if path else key))
        return self.unseen(tensor, used_by)

    def unseen(self, tensor: torch.Tensor, used_by: str) -> int:
        """A value from nowhere: the current call stays whole, and may have used any parameter inside it."""
        shape = list(tensor.shape)
        self.keep_whole(
            f"a {tensor.dtype} tensor of shape {shape}, used by {used_by}, came from an operation that "
            "cannot be recorded"
        )
        self.stack[-1].unseen = True
        self.clock += 1
        number = self.values.add(tensor, CallSource(), self.clock)
        output = Template((Ref(number),), NOTHING.spec)
        call = FunctionCall(_never, "an unseen operation", self.stack[-1].path, self.clock, NOTHING, output)
        self.stack[-1].children.append(call)
        return number

    def keep_whole(self, reason: str) -> None:
        if self.stack[-1].whole is None:
            self.stack[-1].whole = reason

    def encode(self, tree: Any, used_by: str) -> Template:
        leaves, spec = flatten_tree(tree)
        return Template(tuple(self.encode_leaf(leaf, used_by) for leaf in leaves), spec)

    def encode_leaf(self, leaf: Any, used_by: str) -> Any:
        if is_tensor(leaf):
            return Ref(self.number(leaf, used_by))
        if is_plain(leaf):
            return leaf
        if isinstance(leaf, torch.Generator):
            self.keep_whole(f"{used_by} draws from a torch.Generator of its own")
        if id(leaf) not in self.shared:
            self.shared[id(leaf)] = (leaf, self.shared_object(leaf, used_by))
        return self.shared[id(leaf)][1]

    def shared_object(self, leaf: Any, used_by: str) -> Shared:
        keep = {id(module): module for module in self.model.modules()}  # a copy of a module would train apart
        try:
            return Shared(len(self.shared), copy.deepcopy(leaf, dict(keep)), keep)
        except Exception as error:
            raise RecordError(
                f"{used_by} is handed a {type(leaf).__name__}, which cannot be copied for each microbatch "
                f"({error}); pass tensors, numbers and containers of them"
            ) from error

    # -- calls

    def run(self, program: Callable[[Any, Any], Any], microbatch: Any, device: torch.device) -> CallTree:
        root = self.stack[0]
        try:
            with observed_by(self), quiet():
                result = program(self.model, microbatch)
            output = self.encode(result, "the result of the loss function")
        except RecordError:
            raise
        except Exception as error:
            error.add_note(f"evenflow: while recording {self.failed_in or 'the loss function'}")
            raise
        finally:
            for module, key, value in reversed(self.undo):
                set_attribute(module, key, value)
        root.output, root.end = output, self.clock
        if root.whole is not None:
            raise RecordError(
                f"the loss function itself cannot be recorded: {root.whole}; move that into a module"
            )
        return CallTree(
            root, tuple(self.values.all), output, self.values.same_tensor, self.parameter_names, device
        )

    def custom_function(self, apply: MethodType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = f"{getattr(apply.__self__, '__name__', 'Function')}.apply"
        with unwatched():
            if any(callable(leaf) for leaf in pytree.tree_leaves((args, kwargs))):
                self.keep_whole(f"it hands a function to {name}")
                self.stack[-1].unseen = True
            return self.function(apply, args, kwargs, name=name)

    def function(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, name: str = ""
    ) -> Any:
        name = name or getattr(function, "__name__", repr(function))
        inputs = self.encode((args, kwargs), name)
        changed = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if is_tensor(leaf)]
        versions = [tensor._version for tensor in changed]
        self.clock += 1
        self.pending_draws = self.pending_flops = 0
        self.pending_dynamic = False
        self.pending_changed.clear()
        grad_enabled = torch.is_grad_enabled()
        result = self.call(function, name, args, kwargs)
        self.note_draws(name)
        changed = [
            tensor
            for tensor, version in zip(changed, versions, strict=True)
            if tensor._version != version or id(tensor) in self.pending_changed
        ]
        call, path = self.stack[-1], self.stack[-1].path
        if name in IMPURE:
            self.keep_whole(f"it calls {name}")
            call.hooks = call.hooks or name in _HOOKS
        if name in READS:
            call.children.append(ReadCall(function, name, path, self.clock, inputs, result))
            return result
        changes = self.values.change(changed, self.clock)
        for parameter in changes.parameters:
            self.keep_whole(f"it changes the parameter {parameter} in place")
        made = [leaf for leaf in pytree.tree_leaves(result) if is_tensor(leaf)]
        for tensor in made:
            self.values.result(tensor, self.clock, changed=any(tensor is other for other in changed))
        if made or changes.rebinds or changes.buffers:
            draws = Draws(path, call.call, call.num_draws, self.pending_draws) if self.pending_draws else None
            output = self.encode(result, name)
            state = (changes.rebinds, changes.buffers, draws, self.pending_flops, grad_enabled, _autocast())
            call.children.append(FunctionCall(function, name, path, self.clock, inputs, output, *state))
        call.num_draws += self.pending_draws
        if self.pending_dynamic and made:
            self.clock += 1
            shapes = self.encode((tuple(made), {}), name)
            call.children.append(ReadCall(shapes_of, SHAPE, path, self.clock, shapes, shapes_of(*made)))
        return result

    def call(
        self, function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if name in READS and any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves((args, kwargs))):
            raise self.needs_numbers(name)
        try:
            self.blind = isinstance(function, MethodType)  # what a custom function does inside is its own
            return function(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise self.needs_numbers(name) from error
        finally:
            self.blind = False

    def needs_numbers(self, name: str) -> RecordError:
        where = self.stack[-1].path or "the loss function"
        return RecordError(
            f"{where} calls {name} on numbers that depend on the parameters, which do not exist while "
            "recording; a branch or a shape that depends on them cannot be split (nor can, yet, a boolean "
            "index into them: multiply by the mask, or use where, or ignore_index of the loss)"
        )

    def note_draws(self, name: str) -> None:
        """Refuse draws in a checkpointed region: its recomputation would draw again, with another key."""
        if not self.pending_draws:
            return
        call = self.stack[-1]
        # Non-reentrant checkpoints work through these hooks; torch has no public way to ask for them.
        if (
            name == "CheckpointFunction.apply"
            or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        ):
            raise _checkpointed(call.path)

    def module(
        self,
        module: torch.nn.Module,
        path: str,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        with unwatched():
            call = self.open_call(module, path, args, kwargs)
        state, mark = python_state(module), self.values.mark()
        try:
            result = forward(module, *args, **kwargs)
            with (
                unwatched()
            ):  # an unknown tensor among the results is this call's own doing: it is still open
                call.output = self.encode(result, f"the result of {path}")
                if call.unseen:
                    self.assume_gradients(call)
        except Exception:
            self.failed_in = self.failed_in or path
            raise
        finally:
            self.stack.pop()
            self.clock += 1
        call.end = self.clock
        changed = changed_attributes(state, python_state(module))
        if changed:
            call.whole = f"it changes its own attributes while it runs: {', '.join(changed)}"
            call.stateful = True
        touched = dict.fromkeys((*changed, *touched_containers(state)))
        self.undo.extend((module, key, state.get(key)) for key in touched)
        self.values.restore(mark, filter(is_tensor, pytree.tree_leaves(result)))
        return result

    def open_call(
        self, module: torch.nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ModuleCall:
        inputs = self.encode((args, kwargs), path)
        self.clock += 1
        call = ModuleCall(path, self.calls[path], self.clock, inputs, torch.is_grad_enabled(), _autocast())
        call.whole = reason_to_stay_whole(module)
        self.calls[path] += 1
        self.stack[-1].children.append(call)
        self.stack.append(call)
        return call

    def assume_gradients(self, call: ModuleCall) -> None:
        """Let results of unseen operations require a gradient, which fakes do not carry through all.

        Nothing is lost by that: where the real result requires none, its backward has no root.
        """
        inside = f"{call.path}." if call.path else ""
        trains = any(name.startswith(inside) for name in self.parameter_names)
        trains |= any(self.values.all[ref].info.requires_grad for ref in call.args.refs)
        for number in call.output.refs if call.grad_enabled and trains else ():
            if self.values.all[number].born >= call.start:
                self.values.require_grad(number)


def shapes_of(*tensors: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    """The shapes of tensors: what a program reads of them without calling anything."""
    return tuple(tuple(tensor.shape) for tensor in tensors)


def _never(*_: Any) -> Any:
    raise AssertionError("an operation that was not seen cannot be repeated: its module stays whole")


def _checkpointed(path: str) -> RecordError:
    return RecordError(
        f"{path or 'the loss function'} draws random numbers (dropout?) inside a checkpointed region, where "
        "they cannot yet be keyed for the recomputation: switch off gradient checkpointing, or the dropout"
    )
