"""Calls of torch functions: each is made, and written down where it made, changed or read something.

A function that Python calls is one step, whatever it does below: a custom autograd function's `apply`, a
scripted function and `vmap` too, if their arguments are all that they use.
"""

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
from evenflow.graph.kernels.fake_kernels import run_padding
from evenflow.graph.kernels.fakes import FakeParameters, RealParameters, storage_of
from evenflow.graph.kernels.kernels import MASKS
from evenflow.graph.nouns.template import Template, flatten_tree, is_tensor
from evenflow.graph.nouns.tree import ARRAYS, SHAPE, Draws, FunctionCall, ParameterSource, ReadCall
from evenflow.graph.python.handed import made_of
from evenflow.graph.python.reach import PLAIN
from evenflow.graph.recording.constants import Constants
from evenflow.graph.recording.echo import INDEXING, Noted, described, name_of, without_tensors_in_slices
from evenflow.graph.recording.encode import PLAIN_KINDS, Encoder
from evenflow.graph.recording.kernel_notes import KernelNotes
from evenflow.graph.recording.known_results import result_at, zeros_like
from evenflow.graph.recording.needs_numbers import needs_numbers
from evenflow.graph.recording.observe import unwatched
from evenflow.graph.recording.open_calls import OpenCalls, autocast_now
from evenflow.graph.recording.values import Values

# Functions through which Python learns the numbers inside a tensor.
_NUMBERS = {"item", "tolist", "__bool__", "__int__", "__float__", "__complex__", "__index__", "__contains__"}
_TEXT = {"__format__", "__repr__", "__str__"}
READS = frozenset(_NUMBERS | _TEXT | ARRAYS | {"equal", "allclose", "is_nonzero"})
# Attributes of tensors that a replay would not give: each is compared with the function that reads it.
_READ_GRADIENT = vars(torch._C.TensorBase)["grad"].__get__
_READ_VERSION = vars(torch._C.TensorBase)["_version"].__get__
# Functions that read lengths from the memory of whole numbers, which no kernel shows.
_ATTENTION = "scaled_dot_product_attention"
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
_HOOKS = {"register_hook", "register_post_accumulate_grad_hook", "retain_grad", "backward", "grad"}
REENTRANT = "CheckpointFunction.apply"  # what `checkpoint(…, use_reentrant=True)` calls
# Of the generator while recording: two runs of a program draw the same numbers.
SEED = 20_260
IMPURE = frozenset(_METADATA | _HOOKS | {"manual_seed", "set_rng_state", "__setstate__"})


class FunctionCalls:
    """A `FunctionListener`; `noted` is what the functions gave, for another run on it."""

    def __init__(
        self,
        calls: OpenCalls,
        kernels: KernelNotes,
        values: Values,
        constants: Constants,
        encoder: Encoder,
        model: torch.nn.Module,
        fakes: FakeParameters | RealParameters,
    ) -> None:
        self.blind = False
        self.noted: list[Noted] = []
        self.raised = ""  # an error that a torch function raised, and of which the program may not end
        self._calls, self._kernels, self._values = calls, kernels, values
        self._constants, self._encoder, self._model = constants, encoder, model
        self._is_seeded = isinstance(fakes, FakeParameters)
        self._seed = SEED  # that of torch's generator, as far as is known
        # Containers that custom functions may keep, as they were.
        self._handed: list[tuple[str, Any, Any]] = []

    def function(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, name: str = ""
    ) -> Any:
        name = name or name_of(function)
        self.note_caught()
        if torch.is_inference_mode_enabled():
            raise RecordError(
                f"{self._calls.where} calls {name} in inference mode, whose tensors "
                "keep no record of changes; use torch.no_grad()"
            )
        if name in INDEXING:
            args = (args[0], without_tensors_in_slices(args[1], self._whole_number), *args[2:])
        leaves, spec = flatten_tree((args, kwargs))
        inputs = Template(tuple(self._encoder.leaf(leaf, name) for leaf in leaves), spec)
        tensors = [leaf for leaf in leaves if is_tensor(leaf)]
        versions = [tensor._version for tensor in tensors]
        self._calls.tick()
        self._kernels.reset()
        grad_enabled = torch.is_grad_enabled()
        given = described(leaves)
        before = self._buffer_versions() if name == REENTRANT else {}
        try:
            result = self._make(function, name, args, kwargs, leaves)
        except Exception as error:
            self.noted.append(Noted(name, given, None, error))
            raise
        self.noted.append(Noted(name, given, result))
        self._note_draws(name)
        changed = [
            tensor
            for tensor, version in zip(tensors, versions, strict=True)
            if tensor._version != version or id(tensor) in self._kernels.changed
        ]
        call = self._calls.innermost
        if name == REENTRANT and grad_enabled:  # what happens inside is not seen
            call.recomputes = True
            now = self._buffer_versions().items()
            call.recomputed += tuple(
                f"the buffer {key}" for key, version in now if version != before.get(key)
            )
        self._note_special(function, name, inputs, leaves)
        if name in READS:
            call.children.append(ReadCall(function, name, call.path, self._calls.clock, inputs, result))
            call.looks = True
            return result
        made = self._note_call(function, name, inputs, result, changed, grad_enabled)
        self._note_known(function, name, leaves, spec, result)
        call.num_draws += self._kernels.num_draws
        if self._kernels.deciding and made and not isinstance(function, MethodType):
            self._note_shape(name, made)
        return result

    def _note_special(
        self, function: Callable[..., Any], name: str, inputs: Template, leaves: list[Any]
    ) -> None:
        """Note what some functions do besides, by what they are; refuse what no replay would give."""
        if name in IMPURE:
            self._calls.keep_whole(
                f"{_said(name, function)}, which does more than what it returns: do so in a smaller module"
            )
            self._calls.innermost.hooks |= name in _HOOKS
        if function == _READ_GRADIENT and isinstance(
            self._values.all[inputs.refs[0]].source, ParameterSource
        ):
            raise RecordError(
                f"{self._calls.where} looks at a parameter's gradient (grad), which is there at "
                "the step's end alone; look at pipe.named_gradients() between steps"
            )
        if function == _READ_VERSION:
            self._calls.keep_whole("it looks at how often a tensor was changed (_version)")
        if name in _READS_LENGTHS:
            whole = (leaf for leaf in leaves if is_tensor(leaf) and not isinstance(leaf, FakeTensor))
            self._kernels.deciding += [leaf for leaf in whole if leaf.dtype == torch.long]

    def _note_call(
        self,
        function: Callable[..., Any],
        name: str,
        inputs: Template,
        result: Any,
        changed: list[torch.Tensor],
        grad_enabled: bool,
    ) -> list[torch.Tensor]:
        """Note what a call made and changed; returns the tensors among its results."""
        call, path = self._calls.innermost, self._calls.innermost.path
        changes = self._values.change(changed, self._calls.clock)
        for parameter in changes.parameters:
            self._calls.keep_whole(f"it changes the parameter {parameter} in place")
        leaves, spec = flatten_tree(result)
        made = [leaf for leaf in leaves if is_tensor(leaf)]
        for tensor in made:
            self._values.result(tensor, self._calls.clock, changed=any(tensor is other for other in changed))
        if made or changes.rebinds or changes.buffers:
            num_draws = self._kernels.num_draws
            draws = Draws(path, call.call, call.num_draws, num_draws) if num_draws else None
            output = Template(tuple(self._encoder.leaf(leaf, name) for leaf in leaves), spec)
            taken = (self._values.tensor(ref) for ref in inputs.refs)
            self._constants.note_results(taken, made, changed, draws=draws is not None)
            call.children.append(
                FunctionCall(
                    self._calls.under_settings(function, name),
                    name,
                    path,
                    self._calls.clock,
                    inputs,
                    output,
                    rebinds=changes.rebinds,
                    changed_buffers=changes.buffers,
                    draws=draws,
                    flops=self._kernels.flops,
                    grad_enabled=grad_enabled,
                    autocast=autocast_now(),
                    region=self._calls.region(),
                    unknown_to_autograd=changes.unknown_to_autograd,
                )
            )
        return made

    def custom_function(self, apply: MethodType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = name_of(apply)
        with unwatched():
            if any(callable(leaf) for leaf in flatten_tree((args, kwargs))[0]):
                remedy = ", which use_reentrant=False would not" if name == REENTRANT else ""
                self._calls.keep_whole(f"it hands a function to {name}{remedy}")
                self._calls.innermost.unseen = True
            result = self.function(apply, args, kwargs, name=name)
            given = [each for each in (*args, *kwargs.values()) if isinstance(each, dict | list)]
            self._handed += [(name, each, flatten_tree(each)) for each in given]
            return result

    def whole_function(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, name: str
    ) -> Any:
        """A function whose inside cannot be seen: one step, where its arguments are all that it uses."""
        with unwatched():
            leaves = flatten_tree((args, kwargs))[0]
            self._kernels.captured = False
            self._kernels.within = {storage_of(leaf) for leaf in leaves if is_tensor(leaf)}
            try:
                result = self.function(function, args, kwargs, name=name)
            finally:
                self._kernels.within = None
            self._check_whole(name, leaves, result)
            return result

    def _check_whole(self, name: str, leaves: list[Any], result: Any) -> None:
        """Keep the current call whole where a whole function is no step that could be repeated by itself."""
        handed = [leaf for leaf in leaves if callable(leaf)]
        made = [leaf for leaf in flatten_tree(result)[0] if is_tensor(leaf)]
        reason = ""
        if handed and (self._kernels.captured or None in map(made_of, handed)):
            reason = f"it hands {name} a function that uses more than its arguments: hand it those too"
        elif self._kernels.num_draws:
            reason = f"random numbers are drawn inside {name}: draw before it"
        elif not made or any(isinstance(leaf, PLAIN) for leaf in flatten_tree(result)[0]):
            reason = f"{name} returns Python values: return tensors"
        if reason:
            self._calls.keep_whole(reason)
            self._calls.innermost.unseen = True
        if torch.is_grad_enabled() and any(is_tensor(leaf) and leaf.requires_grad for leaf in leaves):
            for tensor in made:  # fakes do not carry that through all
                self._values.require_grad(self._encoder.number(tensor, name))

    def _make(
        self,
        function: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaves: list[Any],
    ) -> Any:
        reads = name in READS or name == "data_ptr"
        if reads and any(isinstance(leaf, FakeTensor) for leaf in leaves):
            raise needs_numbers(name, self._calls.where)
        try:
            # What a custom function or a whole one does inside is its own.
            self.blind = isinstance(function, MethodType) or self._kernels.within is not None
            if name == "_pad_packed_sequence":
                result, self._kernels.known = run_padding(function, args, kwargs)
                return result
            if name == _ATTENTION:
                fakes = (leaf for leaf in leaves if isinstance(leaf, FakeTensor))
                self._kernels.all_fake = next((fake.fake_mode for fake in fakes), None)
            return function(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise needs_numbers(name, self._calls.where) from error
        except Exception as error:
            kinds = {type(leaf) for leaf in leaves if is_tensor(leaf)}
            for kind in kinds - PLAIN_KINDS if FakeTensor in kinds else ():
                raise self._kernels.no_subclass(name, kind) from error
            self.raised = f"{type(error).__name__} of {name}"
            raise
        finally:
            self.blind = False
            self._kernels.all_fake = None

    def _note_draws(self, name: str) -> None:
        """Note where the program sets the generator's state itself: its draws are keyed at entry alone."""
        if not self._kernels.num_draws:
            return
        call = self._calls.innermost
        if self._is_seeded and torch.default_generator.initial_seed() != self._seed:
            self._calls.keep_whole(f"it seeds torch's random generator (manual_seed) before {name} draws")
            self._seed, call.sequential = torch.default_generator.initial_seed(), True
        # A reentrant checkpoint gives its recomputation the generator's state of its own beginning.
        call.sequential |= name == REENTRANT

    def _note_shape(self, name: str, made: list[torch.Tensor]) -> None:
        """Note that a result's shape depends on numbers: those that decide it, if they are few or it is fake.

        Otherwise its own shape is noted, which may be the same for other numbers.
        """
        deciding = [tensor for tensor in self._kernels.deciding if not isinstance(tensor, FakeTensor)]
        known = deciding and all(self._values.find(tensor) is not None for tensor in deciding)
        few = known and all(tensor.numel() == 1 for tensor in deciding)
        fake = any(isinstance(tensor, FakeTensor) for tensor in made)
        read, looked_at = (numbers_of, deciding) if few or fake else (shapes_of, made)
        self._calls.tick()
        args = self._encoder.encode((tuple(looked_at), {}), name)
        call = ReadCall(read, SHAPE, self._calls.innermost.path, self._calls.clock, args, read(*looked_at))
        self._calls.innermost.children.append(call)
        self._calls.innermost.looks = True

    def _note_known(
        self, function: Callable[..., Any], name: str, leaves: list[Any], spec: pytree.TreeSpec, result: Any
    ) -> None:
        """Note each result that real arguments alone decide as a call that does without the others."""
        known = {storage_of(tensor) for tensor in self._kernels.known}
        if not known:
            return
        for at, tensor in enumerate(flatten_tree(result)[0]):
            if not is_tensor(tensor) or isinstance(tensor, FakeTensor) or storage_of(tensor) not in known:
                continue
            self._calls.tick()
            given = (
                zeros_like(leaf) if isinstance(leaf, FakeTensor) else self._encoder.leaf(leaf, name)
                for leaf in leaves
            )
            args = Template(tuple(given), spec)
            self._values.result(tensor, self._calls.clock, changed=False)
            self._calls.innermost.children.append(
                FunctionCall(
                    result_at(function, at),
                    name,
                    self._calls.innermost.path,
                    self._calls.clock,
                    args,
                    self._encoder.encode(tensor, name),
                    grad_enabled=torch.is_grad_enabled(),
                    autocast=autocast_now(),
                    region=self._calls.region(),
                )
            )

    def _whole_number(self, tensor: torch.Tensor) -> Any:
        """A tensor as a slice's bound."""
        return self.function(torch.Tensor.__index__, (tensor,), {})

    def _buffer_versions(self) -> dict[str, int]:
        return {name: buffer._version for name, buffer in self._model.named_buffers()}

    def note_caught(self) -> None:
        """An error that did not end the program was caught here: another batch may not raise it."""
        if self.raised:
            self._calls.keep_whole(f"it catches {self.raised}")
            self.raised = ""

    def check_handed(self) -> None:
        """Refuse to change a container that a custom function was handed: a replay hands over another one."""
        for name, container, (leaves, spec) in self._handed:
            now, its_spec = flatten_tree(container)
            if its_spec != spec or described(now) != described(leaves):
                raise RecordError(
                    f"{name} is handed a {type(container).__name__} that the program changes afterwards, "
                    "which its backward might see; hand it a copy"
                )


def shapes_of(*tensors: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    """The shapes of tensors: what a program reads of them without calling anything."""
    return tuple(tuple(tensor.shape) for tensor in tensors)


def numbers_of(*tensors: torch.Tensor) -> tuple[Any, ...]:
    """What decides a shape: how many entries of a mask are true, or the numbers themselves."""
    return tuple(int(t.count_nonzero()) if t.dtype in MASKS else t.tolist() for t in tensors)


def _said(name: str, function: Any) -> str:  # any torch function
    """What a program did that calls this, in its own words."""
    return f"it sets {function.__self__.__name__}" if name == "__set__" else f"it calls {name}"
