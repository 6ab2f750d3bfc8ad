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
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
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
from evenflow.graph.echo import INDEXING, Noted, described, echo, name_of, without_tensors_in_slices
from evenflow.graph.fake_kernels import MASKS, run_padding
from evenflow.graph.fakes import FakeParameters, RealParameters, buffers_copied, storage_of
from evenflow.graph.handed import made_of
from evenflow.graph.known_results import result_at, zeros_like
from evenflow.graph.modules import PythonState, is_layer, python_state, reason_to_stay_whole
from evenflow.graph.observe import observed_by, quiet, unwatched
from evenflow.graph.outside import Freezer, Snapshot, changed_names
from evenflow.graph.reach import PLAIN
from evenflow.graph.real_run import CannotRun, RealRun, run_for_real
from evenflow.graph.recomputed import REMEDY
from evenflow.graph.setters import Setters
from evenflow.graph.settings import Under, changed_since, settings_now
from evenflow.graph.template import NOTHING, Ref, Shared, Shell, Template, flatten_tree, is_plain
from evenflow.graph.tree import (
    ARRAYS,
    SHAPE,
    BatchLeaf,
    BufferSource,
    Call,
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
_TEXT = {"__format__", "__repr__", "__str__"}
READS = frozenset(_NUMBERS | _TEXT | ARRAYS | {"equal", "allclose", "is_nonzero"})
# Attributes of tensors that a replay would not give: each is compared with the function that reads it.
_READ_GRADIENT = vars(torch._C.TensorBase)["grad"].__get__
_READ_VERSION = vars(torch._C.TensorBase)["_version"].__get__
# Functions that read lengths from the memory of whole numbers, which no kernel shows.
_READS_LENGTHS = frozenset({"tensor_split", "_pad_packed_sequence"})
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
    "data_ptr",
    "apply_",  # these hand each number to a Python function, which may keep it
    "map_",
    "map2_",
}
_PLAIN_KINDS = {torch.Tensor, torch.nn.Parameter, FakeTensor}  # no subclass of a user's
_HOOKS = {"register_hook", "register_post_accumulate_grad_hook", "retain_grad", "backward", "grad"}
REENTRANT = "CheckpointFunction.apply"  # what `checkpoint(…, use_reentrant=True)` calls
_MOST_COMPARED = 2**20  # numbers of a constant that are compared between runs; of a larger one, its identity
# Of the generator while recording: two runs of a program draw the same numbers.
SEED = 20_260
IMPURE = frozenset(_METADATA | _HOOKS | {"manual_seed", "set_rng_state", "__setstate__"})


def _said(name: str, function: Any) -> str:  # any torch function
    """What a program did that calls this, in its own words."""
    return f"it sets {function.__self__.__name__}" if name == "__set__" else f"it calls {name}"


def record(
    program: Callable[[Any, Any], Any],
    model: torch.nn.Module,
    microbatch: Any,  # any tree
    *,
    device: torch.device,
    fakes: FakeParameters | RealParameters,
    rehearsal: "Rehearsal | None" = None,
    seen: Callable[[int, torch.Tensor], None] | None = None,
    between: Callable[[], None] | None = None,
    by_others: Callable[[], contextlib.AbstractContextManager[list[str]]] = lambda: contextlib.nullcontext(
        []
    ),
) -> CallTree:
    """Run `program(model, microbatch)` once with fake parameters and return everything that it did.

    `seen` is told each value's number and tensor when it is made (with `RealParameters`, its numbers too).

    The run works on copies of the microbatch's tensors and of the buffers, and leaves the random generators
    as they were. Raises `RecordError` where the program needs a parameter's numbers, or hides what it does
    at the outermost level; the program's own errors come with a note of where they arose. With the
    `rehearsal` of an earlier run, a tensor counts as Python's constant only if that run met the same.

    With `between` the program runs once more, after that was called, without computing anything: the tree's
    `difference` says what it did differently. It runs likewise under `by_others`, which changes attributes
    and gives their names: `dependence` says what it does differently with those.
    """
    leaves, spec = flatten_tree(microbatch)
    given = [leaf for leaf in leaves if is_tensor(leaf)]
    copies = {id(leaf): _copied(leaf, device) for leaf in leaves if is_tensor(leaf)}  # one tensor stays one
    leaves = [copies.get(id(leaf), leaf) for leaf in leaves]
    with fakes.installed(), buffers_copied(model, device), torch.random.fork_rng():
        if isinstance(fakes, FakeParameters):
            torch.default_generator.manual_seed(SEED)  # two runs draw alike, whatever the draws decide
        tensors = [leaf for leaf in leaves if is_tensor(leaf)]
        recorder = _Recorder(model, fakes, tensors, device, rehearsal, seen)
        tree = recorder.run(program, pytree.tree_unflatten(leaves, spec))
        if between is not None:
            between()
            left = PythonState(model)
            tree.difference = recorder.echo(lambda: program(model, pytree.tree_unflatten(leaves, spec)))
            if tree.difference is not None:  # the program was stopped on its way
                left.restore()
            with by_others() as names:
                if names and tree.difference is None:
                    difference = recorder.echo(lambda: program(model, pytree.tree_unflatten(leaves, spec)))
                    tree.dependence = f"{', '.join(names)}: {difference}" if difference else None
    _refuse_overlaps(given, tree.changed_leaves)
    return tree


def _refuse_overlaps(given: list[torch.Tensor], changed: frozenset[int]) -> None:
    """Refuse a change in place of a batch tensor that shares memory with another: copies of them do not."""
    sharing = Counter(storage_of(tensor) for tensor in {id(tensor): tensor for tensor in given}.values())
    for index in sorted(changed):
        if sharing[storage_of(given[index])] > 1:
            raise RecordError(
                f"the program changes the batch's tensor number {index} (shape {list(given[index].shape)}) "
                "in place, and it shares its memory with another one; clone one of them before it is passed"
            )


def _copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    copied = tensor.detach().to(device, copy=True).requires_grad_(tensor.requires_grad)
    vars(copied).update(vars(tensor))
    return copied


def is_tensor(leaf: object) -> bool:
    """Whether a leaf of a tree is a tensor."""
    return isinstance(leaf, torch.Tensor)


def _autocast() -> tuple[tuple[str, Any], ...]:
    kinds = ("cpu", "cuda")
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    active = ((kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind))
    return (*active, ("nesting", depth)) if depth else ()


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a run leaves to the next: tensors of Python's own, and those that it made of nothing else."""

    constants: dict[int, torch.Tensor]
    made: dict[int, torch.Tensor]  # all that it met
    born: frozenset[int]  # memory that the run made
    self_changed: frozenset[str]  # attributes that modules changed in their own forward


def _numbers_in(tensor: torch.Tensor) -> Any:
    """Something that is equal for tensors with equal numbers."""
    if type(tensor) is not torch.Tensor or tensor.numel() > _MOST_COMPARED or storage_of(tensor) < 0:
        return id(tensor)
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


class _Used(dict[int, Any]):
    """A memo for `deepcopy` that knows what was looked up in it."""

    def __init__(self, known: dict[int, Any]) -> None:
        super().__init__(known)
        self.used: dict[int, Ref] = {}

    def __or__(self, other: Any) -> Any:  # as a dict's, but the same object
        self.update(other)
        return self

    def get(self, key: int, default: Any = None) -> Any:
        found = super().get(key, default)
        if isinstance(found, Ref):
            self.used[key] = found
        return found


class _Lost:
    """In the place of a tensor that did not exist when an object was copied."""

    def __deepcopy__(self, memo: Any) -> "_Lost":
        return self


_LOST = _Lost()


def _is_cache(thing: object) -> bool:
    """Whether an object is a key/value cache of transformers, of which each layer touches its own part."""
    return type(thing).__module__.startswith("transformers.")


class NeedsNumbers(RecordError):
    """A function needs numbers that depend on parameters; a module that holds the call may run for real."""

    def __init__(self, function: str, message: str) -> None:
        super().__init__(message)
        self.function = function


class _Recorder:
    """The state of one recording; becomes a `CallTree`."""

    def __init__(
        self,
        model: torch.nn.Module,
        fakes: FakeParameters | RealParameters,
        batch: list[torch.Tensor],
        device: torch.device,
        rehearsal: "Rehearsal | None",
        seen: Callable[[int, torch.Tensor], None] | None,
    ) -> None:
        self.values = Values(seen)
        self.shared: dict[int, tuple[object, Shared, Any]] = {}  # by id: object, stand-in, its first state
        self.self_changed: set[str] = set()  # attributes that modules changed in their own forward
        self.changing_objects: set[int] = set()  # numbers of those that are not as they were when first seen
        self.calls: defaultdict[str, int] = defaultdict(int)
        self.clock = 0
        self.model, self.fakes, self.device = model, fakes, device
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
        self.setters = Setters(self.stack)
        self.pending_draws = 0
        self.pending_flops = 0
        self.pending_dynamic: list[torch.Tensor] = []
        self.pending_known: list[torch.Tensor] = []
        self.pending_changed: set[int] = set()
        self.failed_in = ""  # the innermost module that raised
        self.blind = False
        self.within: set[int] | None = None  # inside a whole function: memory that it was given or made
        self.captured = False  # it used other memory
        self.rehearsal = rehearsal
        self.noted: list[Noted] = []
        self.result: Any = None
        self.noted_before: list[int] = []  # for each open call, how many there were before it
        self.opaque: dict[tuple[str, int], Any] = {}  # what calls returned that ran for real
        self.unseen_tensors: dict[int, torch.Tensor] = {}
        self.seed = SEED  # that of torch's generator, as far as is known
        self.regions: dict[int, tuple[int, Any]] = {}  # by id of a checkpoint's hook, which is kept alive
        self.constants: dict[str, torch.Tensor] = {}  # by the name that stands for it
        self.pure: dict[int, torch.Tensor] = {}  # by id: tensors that nothing but Python's constants decide
        self.handed: list[
            tuple[str, Any, Any]
        ] = []  # containers that custom functions may keep, as they were
        self.raised = ""  # an error that a torch function raised, and of which the program may not end
        self.settings = settings_now()
        self.outside_tensors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # written to: (it, a copy)
        self.generators: list[
            tuple[torch.Generator, torch.Tensor]
        ] = []  # the program's own, with their states
        self.born = {storage_of(tensor) for tensor in (*batch, *model.buffers())}
        self.modules = dict(model.named_modules())
        self.parameters = {path: tuple(module._parameters) for path, module in self.modules.items()}
        self.start = {path: python_state(module) for path, module in self.modules.items()}
        self.expected = dict(self.start)  # the modules' states, but for changes by code that is not their own

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
        for path, module in self.modules.items():
            for key, attribute in vars(module).items():
                if attribute is tensor:
                    return self.values.add(tensor, BufferSource(f"{path}.{key}" if path else key))
        if self.is_constant(tensor, used_by):
            name = f"constant {len(self.constants)}"
            self.constants[name] = self.pure[id(tensor)] = tensor
            return self.values.add(tensor, BufferSource(name))
        return self.unseen(tensor, used_by)

    def is_constant(self, tensor: torch.Tensor, used_by: str) -> bool:
        """Whether a tensor was there before the program began: in a closure, a global, a cache."""
        if self.rehearsal is not None:
            kept = id(tensor) in self.rehearsal.made or storage_of(tensor) in self.rehearsal.born - self.born
            if kept and id(tensor) not in self.rehearsal.constants:
                raise RecordError(
                    f"{used_by} uses a tensor {list(tensor.shape)} that an earlier call of the "
                    "program made from "
                    "the batch or the parameters, and kept: evenflow cannot carry it from one "
                    "microbatch to the next; keep it in a buffer of a module"
                )
        if isinstance(tensor, FakeTensor) or storage_of(tensor) in self.born:
            return False
        if tensor.requires_grad:
            raise RecordError(
                f"{used_by} uses a tensor {list(tensor.shape)} that requires a gradient and is "
                "neither a parameter of the model nor in the batch: register it as a parameter"
            )
        return self.rehearsal is None or id(tensor) in self.rehearsal.constants

    def unseen(self, tensor: torch.Tensor, used_by: str) -> int:
        """A value from nowhere: the current call stays whole, and may have used any parameter inside it."""
        shape, kind = list(tensor.shape), type(tensor)
        plain = kind in _PLAIN_KINDS
        self.keep_whole(
            f"a {tensor.dtype} {'tensor' if plain else kind.__name__} of shape {shape}, used by "
            f"{used_by or 'the model'}, came from an operation that cannot be recorded"
            + ("" if plain else " (as_subclass); hand plain tensors to layers with parameters")
        )
        self.stack[-1].unseen = True
        self.unseen_tensors[id(tensor)] = tensor
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

    def encode_result(self, result: Any) -> Template:
        """What the program returned; tensors inside its objects are returned too."""
        leaves, spec = flatten_tree(result)
        what = "the result of the loss function"
        shells = (None if is_tensor(leaf) or is_plain(leaf) else self.shell(leaf, what) for leaf in leaves)
        encoded = (
            self.encode_leaf(leaf, what) if shell is None else shell
            for leaf, shell in zip(leaves, shells, strict=True)
        )
        return Template(tuple(encoded), spec)

    def encode_leaf(self, leaf: Any, used_by: str) -> Any:
        if is_tensor(leaf):
            return Ref(self.number(leaf, used_by))
        if is_plain(leaf):
            return leaf
        if isinstance(leaf, torch.Generator):
            self.keep_whole(f"{used_by} draws from a torch.Generator of its own")
            self.generators.append((leaf, leaf.get_state()))
        state = None if _is_cache(leaf) else Freezer(tensors=False).frozen(leaf)
        if id(leaf) not in self.shared:
            self.shared[id(leaf)] = (leaf, self.shared_object(leaf, used_by), state)
        _, shared, before = self.shared[id(leaf)]
        if state != before:
            self.changing_objects.add(shared.number)
        return shared

    def shared_object(self, leaf: Any, used_by: str) -> Shared:
        # A copy of a module would train apart; what is fake has no numbers to copy.
        keep = {id(module): module for module in self.modules.values()}
        fakes = {id(tensor): _LOST for tensor in self.values.tensors() if isinstance(tensor, FakeTensor)}
        return Shared(len(self.shared), self.copied(leaf, keep | fakes, used_by), keep)

    def shell(self, leaf: Any, used_by: str) -> Shell | None:
        """What is returned in an object: the object without its tensors, and which they were."""
        keep = {id(module): module for module in self.modules.values()}
        refs = _Used({id(tensor): Ref(number) for number, tensor in enumerate(self.values.tensors())})
        prototype = self.copied(leaf, refs | keep, used_by)
        return Shell(prototype, tuple(refs.used.values()), keep) if refs.used else None

    def copied(self, leaf: Any, memo: dict[int, Any], used_by: str) -> Any:  # as `leaf`
        try:
            return copy.deepcopy(leaf, memo)
        except Exception as error:
            raise RecordError(
                f"{used_by} is handed a {type(leaf).__name__}, which cannot be copied for each microbatch "
                f"({error}); pass tensors, numbers and containers of them"
            ) from error

    # -- calls

    def run(self, program: Callable[[Any, Any], Any], microbatch: Any) -> CallTree:
        root = self.stack[0]
        try:
            with observed_by(self, kernels=self), self.setters.watching(), quiet():
                result = program(self.model, microbatch)
            self.result = result
            output = self.encode_result(result)
        except RecordError:
            raise
        except Exception as error:
            error.add_note(f"evenflow: while recording {self.failed_in or 'the loss function'}")
            raise
        finally:
            for written, before in self.outside_tensors.values():
                with torch.no_grad():
                    written.copy_(before)
            for generator, state in reversed(self.generators):
                generator.set_state(state)
        self.note_caught()
        self.check_parameters()
        self.check_handed()
        root.output, root.end = output, self.clock
        if root.whole is not None:
            raise RecordError(
                f"the loss function itself cannot be recorded: {root.whole}; move that into a module"
            )
        constants = own = self.pure | {id(tensor): tensor for tensor in self.constants.values()}
        made = {id(tensor): tensor for tensor in self.values.tensors()}
        if self.rehearsal is not None:
            constants = own | self.rehearsal.constants
            made |= self.rehearsal.made
            self.born |= self.rehearsal.born
        return CallTree(
            root,
            tuple(self.values.all),
            output,
            self.values.same_tensor,
            self.parameter_names,
            self.constants,
            {at: _numbers_in(tensor) for at, tensor in enumerate(self.values.tensors()) if id(tensor) in own},
            frozenset(self.changing_objects),
            self.values.changed_leaves(),
            self.device,
            Rehearsal(constants, made, frozenset(self.born), frozenset(self.self_changed)),
        )

    def echo(self, program: Callable[[], Any]) -> str | None:
        """Run the program once more on what its functions gave; what it does differently, if anything."""
        return echo(
            program,
            self.noted,
            paths=self.paths,
            opaque=self.opaque,
            unseen=self.unseen_tensors,
            result=self.result,
        )

    def check_parameters(self) -> None:
        """Refuse parameters that come or go while the program runs."""
        for path, module in self.modules.items():
            if tuple(module._parameters) != self.parameters[path]:
                raise RecordError(
                    f"{path or 'the model'} makes or removes parameters while it runs, which no "
                    "optimizer would know: run it once before the pipeline is built"
                )

    def check_handed(self) -> None:
        """Refuse to change a container that a custom function was handed: a replay hands over another one."""
        for name, container, (leaves, spec) in self.handed:
            now, its_spec = flatten_tree(container)
            if its_spec != spec or described(now) != described(leaves):
                raise RecordError(
                    f"{name} is handed a {type(container).__name__} that the program changes afterwards, "
                    "which its backward might see; hand it a copy"
                )

    def note_caught(self) -> None:
        """An error that did not end the program was caught here: another batch may not raise it."""
        if self.raised:
            self.keep_whole(f"it catches {self.raised}")
            self.raised = ""

    def write_outside(self, tensor: torch.Tensor) -> None:
        """Remember the numbers of a tensor that is not the run's own, to put them back."""
        if storage_of(tensor) not in self.born and id(tensor) not in self.outside_tensors:
            self.outside_tensors[id(tensor)] = (tensor, tensor.detach().clone())

    def custom_function(self, apply: MethodType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = name_of(apply)
        with unwatched():
            if any(callable(leaf) for leaf in pytree.tree_leaves((args, kwargs))):
                remedy = ", which use_reentrant=False would not" if name == REENTRANT else ""
                self.keep_whole(f"it hands a function to {name}{remedy}")
                self.stack[-1].unseen = True
            result = self.function(apply, args, kwargs, name=name)
            given = [each for each in (*args, *kwargs.values()) if isinstance(each, dict | list)]
            self.handed += [(name, each, flatten_tree(each)) for each in given]
            return result

    def whole_function(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, name: str
    ) -> Any:
        """A function whose inside cannot be seen: one step, where its arguments are all that it uses."""
        with unwatched():
            leaves = pytree.tree_leaves((args, kwargs))
            self.captured, self.within = False, {storage_of(leaf) for leaf in leaves if is_tensor(leaf)}
            try:
                result = self.function(function, args, kwargs, name=name)
            finally:
                self.within = None
            self.check_whole(name, leaves, result)
            return result

    def check_whole(self, name: str, leaves: list[Any], result: Any) -> None:
        """Keep the current call whole where a whole function is no step that could be repeated by itself."""
        handed = [leaf for leaf in leaves if callable(leaf)]
        made = [leaf for leaf in pytree.tree_leaves(result) if is_tensor(leaf)]
        reason = ""
        if handed and (self.captured or None in map(made_of, handed)):
            reason = f"it hands {name} a function that uses more than its arguments: hand it those too"
        elif self.pending_draws:
            reason = f"random numbers are drawn inside {name}: draw before it"
        elif not made or any(isinstance(leaf, PLAIN) for leaf in pytree.tree_leaves(result)):
            reason = f"{name} returns Python values: return tensors"
        if reason:
            self.keep_whole(reason)
            self.stack[-1].unseen = True
        if torch.is_grad_enabled() and any(is_tensor(leaf) and leaf.requires_grad for leaf in leaves):
            for tensor in made:  # fakes do not carry that through all
                self.values.require_grad(self.number(tensor, name))

    def function(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, name: str = ""
    ) -> Any:
        name = name or name_of(function)
        self.note_caught()
        if torch.is_inference_mode_enabled():
            raise RecordError(
                f"{self.stack[-1].path or 'the loss function'} calls {name} in inference mode, whose tensors "
                "keep no record of changes; use torch.no_grad()"
            )
        if name in INDEXING:
            args = (args[0], without_tensors_in_slices(args[1], self.whole_number), *args[2:])
        leaves, spec = flatten_tree((args, kwargs))
        inputs = Template(tuple(self.encode_leaf(leaf, name) for leaf in leaves), spec)
        changed = [leaf for leaf in leaves if is_tensor(leaf)]
        versions = [tensor._version for tensor in changed]
        self.clock += 1
        self.pending_draws = self.pending_flops = 0
        self.pending_dynamic.clear()
        self.pending_known.clear()
        self.pending_changed.clear()
        grad_enabled = torch.is_grad_enabled()
        given = described(leaves)
        before = self.buffer_versions() if name == "CheckpointFunction.apply" else {}
        try:
            result = self.call(function, name, args, kwargs)
        except Exception as error:
            self.noted.append(Noted(name, given, None, error))
            raise
        self.noted.append(Noted(name, given, result))
        self.note_draws(name)
        changed = [
            tensor
            for tensor, version in zip(changed, versions, strict=True)
            if tensor._version != version or id(tensor) in self.pending_changed
        ]
        call, path = self.stack[-1], self.stack[-1].path
        if name == "CheckpointFunction.apply":  # (a reentrant one: what happens inside is not seen)
            self.refuse_recomputed_changes(before)
            call.recomputes = grad_enabled
        if name in IMPURE:
            self.keep_whole(
                f"{_said(name, function)}, which does more than what it returns: do so in a smaller module"
            )
            call.hooks = call.hooks or name in _HOOKS
        if function == _READ_GRADIENT and isinstance(self.values.all[inputs.refs[0]].source, ParameterSource):
            raise RecordError(
                f"{path or 'the loss function'} looks at a parameter's gradient (grad), which is there at "
                "the step's end alone; look at pipe.named_gradients() between steps"
            )
        if function == _READ_VERSION:
            self.keep_whole("it looks at how often a tensor was changed (_version)")
        if name in _READS_LENGTHS:
            whole = (leaf for leaf in leaves if is_tensor(leaf) and not isinstance(leaf, FakeTensor))
            self.pending_dynamic += [leaf for leaf in whole if leaf.dtype == torch.long]
        if name in READS:
            call.children.append(ReadCall(function, name, path, self.clock, inputs, result))
            call.looks = True
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
            self.note_pure(inputs, made, changed)
            modes = (grad_enabled, _autocast(), self.region())
            state = (changes.rebinds, changes.buffers, draws, self.pending_flops, *modes, changes.hidden)
            called = self.under_settings(function, name)
            call.children.append(FunctionCall(called, name, path, self.clock, inputs, output, *state))
        self.note_known(function, name, leaves, spec, result)
        call.num_draws += self.pending_draws
        if self.pending_dynamic and made and not isinstance(function, MethodType):
            self.note_shape(name, made)
        return result

    def buffer_versions(self) -> dict[str, int]:
        return {name: buffer._version for name, buffer in self.model.named_buffers()}

    def refuse_recomputed_changes(self, before: dict[str, int]) -> None:
        for name, version in self.buffer_versions().items():
            if torch.is_grad_enabled() and version != before.get(name):
                raise RecordError(f"a gradient checkpoint in the program changes the buffer {name}: {REMEDY}")

    def note_known(
        self, function: Callable[..., Any], name: str, leaves: list[Any], spec: pytree.TreeSpec, result: Any
    ) -> None:
        """Note each result that real arguments alone decide as a call that does without the others."""
        known = {storage_of(tensor) for tensor in self.pending_known}
        for at, tensor in enumerate(pytree.tree_leaves(result)):
            if is_tensor(tensor) and not isinstance(tensor, FakeTensor) and storage_of(tensor) in known:
                self.clock += 1
                fakes = (isinstance(leaf, FakeTensor) for leaf in leaves)
                args = Template(
                    tuple(
                        zeros_like(leaf) if fake else self.encode_leaf(leaf, name)
                        for leaf, fake in zip(leaves, fakes, strict=True)
                    ),
                    spec,
                )
                self.values.result(tensor, self.clock, changed=False)
                output = self.encode(tensor, name)
                path, modes = self.stack[-1].path, (torch.is_grad_enabled(), _autocast(), self.region())
                self.stack[-1].children.append(
                    FunctionCall(
                        result_at(function, at), name, path, self.clock, args, output, (), (), None, 0, *modes
                    )
                )

    def under_settings(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """A function as it is to be called again: under what torch was told since the program began."""
        told = changed_since(self.settings)
        if told and self.region() is not None:  # a checkpoint computes again under what is set by then
            self.keep_whole(f"it calls {name} in a checkpoint under other settings ({', '.join(told)})")
        return Under(function, told) if told else function

    def note_pure(self, inputs: Template, made: list[torch.Tensor], changed: list[torch.Tensor]) -> None:
        """Keep what a function made of Python's constants alone: a cache may give it to the next run."""
        known = (self.values.tensor(ref) for ref in inputs.refs)
        if not self.pending_draws and all(id(tensor) in self.pure for tensor in known):
            self.pure |= {id(tensor): tensor for tensor in made if not isinstance(tensor, FakeTensor)}
        else:
            for tensor in changed:
                self.pure.pop(id(tensor), None)

    def whole_number(self, tensor: torch.Tensor) -> Any:
        """A tensor as a slice's bound."""
        return self.function(torch.Tensor.__index__, (tensor,), {})

    def note_shape(self, name: str, made: list[torch.Tensor]) -> None:
        """Note that a result's shape depends on numbers: those that decide it, if they are few or it is fake.

        Otherwise its own shape is noted, which may be the same for other numbers.
        """
        deciding = [tensor for tensor in self.pending_dynamic if not isinstance(tensor, FakeTensor)]
        known = deciding and all(self.values.find(tensor) is not None for tensor in deciding)
        few = known and all(tensor.numel() == 1 for tensor in deciding)
        fake = any(isinstance(tensor, FakeTensor) for tensor in made)
        read, looked_at = (numbers_of, deciding) if few or fake else (shapes_of, made)
        self.clock += 1
        args = self.encode((tuple(looked_at), {}), name)
        call = ReadCall(read, SHAPE, self.stack[-1].path, self.clock, args, read(*looked_at))
        self.stack[-1].children.append(call)
        self.stack[-1].looks = True

    def call(
        self, function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        reads = name in READS or name == "data_ptr"
        if reads and any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves((args, kwargs))):
            raise self.needs_numbers(name)
        try:
            # What a custom function or a whole one does inside is its own.
            self.blind = isinstance(function, MethodType) or self.within is not None
            if name == "_pad_packed_sequence":
                result, self.pending_known = run_padding(function, args, kwargs)
                return result
            return function(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise self.needs_numbers(name) from error
        except Exception as error:
            kinds = {type(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if is_tensor(leaf)}
            for kind in kinds - _PLAIN_KINDS if FakeTensor in kinds else ():
                raise self.no_subclass(name, kind) from error
            self.raised = f"{type(error).__name__} of {name}"
            raise
        finally:
            self.blind = False

    def needs_numbers(self, name: str) -> "NeedsNumbers":
        remedy = (
            "a branch or a shape that depends on them must lie inside one module, whose results have "
            "the same shapes either way; a metric may be returned as the tensor that it is"
        )
        where = self.stack[-1].path or "the loss function"
        return NeedsNumbers(
            name,
            f"{where} calls {name} on numbers that depend on the parameters, which do not exist while "
            f"recording; {remedy}",
        )

    def no_subclass(self, name: str, kind: type[torch.Tensor]) -> "NeedsNumbers":
        where = self.stack[-1].path or "the loss function"
        return NeedsNumbers(
            name,
            f"{where} calls {name} on a {kind.__name__}, a subclass of Tensor, and on what depends on the "
            "parameters, which have stand-ins of a class of their own while recording; hand over plain "
            "tensors (x.as_subclass(torch.Tensor)), or do it inside one module, which returns plain ones",
        )

    def note_draws(self, name: str) -> None:
        """Note where the program sets the generator's state itself: its draws are keyed at entry alone."""
        if not self.pending_draws:
            return
        call = self.stack[-1]
        if isinstance(self.fakes, FakeParameters) and torch.default_generator.initial_seed() != self.seed:
            self.keep_whole(f"it seeds torch's random generator (manual_seed) before {name} draws")
            self.seed, call.sequential = torch.default_generator.initial_seed(), True
        # A reentrant checkpoint gives its recomputation the generator's state of its own beginning.
        call.sequential |= name == REENTRANT

    def region(self) -> int | None:
        """The checkpoint region that the program is in: a number of its own for each call of `checkpoint`.

        Non-reentrant checkpoints work through these hooks; torch has no public way to ask for them.
        """
        if self.stack[-1].region is not None:
            return self.stack[-1].region
        hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)  # a pair, or nothing
        if hooks is None:
            return None
        if getattr(hooks[0], "__module__", "") != "torch.utils.checkpoint":
            self.keep_whole("it runs under saved_tensors_hooks: enter them in a smaller module")
            return None
        number, _ = self.regions.setdefault(id(hooks[0]), (len(self.regions), hooks))
        return number

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
            state = python_state(module)
        mark, own = self.values.mark(), dict(vars(module))
        self.noted_before.append(len(self.noted))
        self.note_foreign(call, module, state)
        try:
            try:
                result = forward(module, *args, **kwargs)
            except Exception as error:  # noqa: BLE001 (raised again, unless the module can run for real)
                vars(module).clear()
                vars(module).update(own)
                with unwatched():
                    result = self.again_for_real(error, call, module, forward, args, kwargs)
            with (
                unwatched()
            ):  # an unknown tensor among the results is this call's own doing: it is still open
                call.output = self.encode(result, f"the result of {path}")
                if call.unseen or call.looks:
                    self.assume_gradients(call)
        except Exception:
            self.failed_in = self.failed_in or path
            raise
        finally:
            self.stack.pop()
            self.noted_before.pop()
            self.stack[-1].looks |= call.looks
            self.clock += 1
        call.end = self.clock
        with unwatched():
            if call.unseen or call.sequential:  # its modules ran unseen, perhaps
                self.note_inner_changes(call)
            after = python_state(module)
        changed = changed_names(state, after)
        if changed:
            self.expected[path] = after
            call.changed = tuple(f"{path}.{key}" if path else key for key in changed)
            call.whole_besides = call.whole
            self.self_changed.update(call.changed)
            call.whole = f"it changes its own attributes while it runs: {', '.join(changed)}"
            call.stateful = True
        self.values.restore(mark, filter(is_tensor, pytree.tree_leaves(result)))
        return result

    def note_inner_changes(self, call: ModuleCall) -> None:
        """Note which modules inside a call changed their attributes while nobody looked."""
        inside = f"{call.path}." if call.path else ""
        for path, module in self.modules.items():
            if path.startswith(inside) and path != call.path:
                state = python_state(module)
                changed = changed_names(self.expected[path], state)
                names = tuple(f"{path}.{key}" for key in changed)
                self.self_changed.update(names)
                self.expected[path], call.stateful = state, call.stateful or bool(changed)
                call.recomputed += names if call.recomputes else ()

    def note_foreign(self, call: ModuleCall, module: torch.nn.Module, state: Snapshot) -> None:
        """Note where other code changed the module since the program began: run whole, it would not be so."""
        if state == self.start[call.path]:
            return
        for name in changed_names(self.expected[call.path], state):
            for later in self.setters.calls_since(module, name):
                owner = "its" if later is call else f"{call.path}'s"
                later.foreign = later.foreign or (
                    f"{owner} attribute {name} is changed while the program runs, before it is called"
                )

    def open_call(
        self, module: torch.nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ModuleCall:
        self.note_caught()
        inputs = self.encode((args, kwargs), path)
        self.clock += 1
        call = ModuleCall(path, self.calls[path], self.clock, inputs, torch.is_grad_enabled(), _autocast())
        call.region = self.region()
        call.whole, call.layer = reason_to_stay_whole(module), is_layer(module)
        told = changed_since(self.settings)
        call.foreign = f"it is called under other settings ({', '.join(told)})" if told else None
        self.calls[path] += 1
        self.stack[-1].children.append(call)
        self.stack.append(call)
        return call

    def again_for_real(
        self,
        error: Exception,
        call: ModuleCall,
        module: torch.nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The result of a module that failed on fake tensors, after running it alone on real ones.

        Raises `error` again where that cannot be, or where its cause is another one.
        """
        innermost = not self.failed_in
        if not isinstance(self.fakes, FakeParameters):
            raise error
        if not isinstance(error, NeedsNumbers) and (isinstance(error, RecordError) or not innermost):
            raise error
        self.failed_in = self.failed_in or call.path
        for inner in call.children:
            self.forget_calls(inner)
        call.children.clear()
        self.pending_draws = self.pending_flops = call.num_draws = 0
        self.blind = True
        try:
            run = run_for_real(module, forward, args, kwargs, fakes=self.fakes, device=self.device)
        except CannotRun as reason:
            error.add_note(f"evenflow: {call.path} cannot stay whole: {reason}")
            raise error from None
        except Exception:  # noqa: BLE001 (the first error is the one to tell of)
            raise error from None
        finally:
            self.blind = False
        self.failed_in = self.raised = ""
        self.note_real_run(call, run)
        self.opaque[call.path, call.call] = run.result
        del self.noted[self.noted_before[-1] :]
        if isinstance(error, NeedsNumbers):
            call.whole = f"it calls {error.function} on numbers that depend on the parameters"
        else:
            call.whole = f"it cannot run on fake tensors ({error})"
        return run.result

    def forget_calls(self, call: Call) -> None:
        """Take a failed attempt's calls out of the counts that name draws."""
        if isinstance(call, ModuleCall):
            self.calls[call.path] -= 1
            for inner in call.children:
                self.forget_calls(inner)

    def note_real_run(self, call: ModuleCall, run: RealRun) -> None:
        self.clock += 1
        changes = self.values.change(run.changed, self.clock)
        for tensor in filter(is_tensor, pytree.tree_leaves(run.result)):
            self.values.result(tensor, self.clock, changed=any(tensor is other for other in run.changed))
        # How often it draws depends on its numbers too: each draw is keyed, whether there was one now or not.
        call.num_draws = max(1, self.pending_draws // 2)
        draws = Draws(call.path, call.call, 0, call.num_draws)
        output = self.encode(run.result, call.path)
        state = (
            changes.rebinds,
            changes.buffers,
            draws,
            self.pending_flops // 2,
            call.grad_enabled,
            call.autocast,
        )
        call.children.append(
            FunctionCall(_never, "a run for real", call.path, self.clock, call.args, output, *state)
        )
        call.real = True
        call.stateful = bool(run.attributes)
        self.self_changed.update(f"{call.path}.{name}" if call.path else name for name in run.attributes)

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


def numbers_of(*tensors: torch.Tensor) -> tuple[Any, ...]:
    """What decides a shape: how many entries of a mask are true, or the numbers themselves."""
    return tuple(int(t.count_nonzero()) if t.dtype in MASKS else t.tolist() for t in tensors)


def _never(*_: Any) -> Any:
    raise AssertionError("an operation that was not seen cannot be repeated: its module stays whole")
