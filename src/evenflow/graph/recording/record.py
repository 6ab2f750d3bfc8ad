"""Recording: run the program once on fake parameters and write down every call as a tree.

The split works on what the program *did*. A `TorchFunctionMode` sees every torch function that Python
calls, a patched `Module.__call__` sees every module, a `TorchDispatchMode` sees below them which kernels
draw random numbers and how many FLOPs they take. Only parameters are fake: the batch and everything
computed from it alone is real, and no fake mode is active, because programs that ask "am I being traced?"
(transformers' mask code does) must answer as they would in training. Export-based tracing was rejected: it
needs the whole program to be traceable, runs a different program, and refuses most real models.

Who does what: `module_calls` and `function_calls` make the calls and write them down, `encode` writes their
arguments and results; `open_calls` knows where the program is, `kernel_notes` what kernels did below it,
`module_states` who changed the modules, `constants` and `objects` what Python held.
"""

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from evenflow.errors import RecordError
from evenflow.graph.kernels.fakes import FakeParameters, RealParameters, buffers_copied, storage_of
from evenflow.graph.nouns.template import flatten_tree, is_tensor
from evenflow.graph.nouns.tree import BatchLeaf, BufferSource, CallTree, ParameterSource
from evenflow.graph.python.modules import PythonState
from evenflow.graph.recording.constants import Constants, FirstRun
from evenflow.graph.recording.echo import echo
from evenflow.graph.recording.encode import Encoder
from evenflow.graph.recording.function_calls import SEED, FunctionCalls
from evenflow.graph.recording.kernel_notes import KernelNotes
from evenflow.graph.recording.module_calls import ModuleCalls
from evenflow.graph.recording.module_states import ModuleStates
from evenflow.graph.recording.objects import Objects
from evenflow.graph.recording.observe import observed_by, quiet
from evenflow.graph.recording.open_calls import OpenCalls
from evenflow.graph.recording.values import Values


def record(
    program: Callable[[Any, Any], Any],
    model: torch.nn.Module,
    microbatch: Any,  # any tree
    *,
    device: torch.device,
    fakes: FakeParameters | RealParameters,
    first: FirstRun | None = None,
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
    `first` run of the same program, a tensor counts as Python's constant only if that run met the same.

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
        recorder = _Recorder(model, fakes, tensors, device, first, seen)
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


class _Recorder:
    """One recording: puts together what takes part in it, and makes a `CallTree` of what they know."""

    def __init__(
        self,
        model: torch.nn.Module,
        fakes: FakeParameters | RealParameters,
        batch: list[torch.Tensor],
        device: torch.device,
        first: FirstRun | None,
        seen: Callable[[int, torch.Tensor], None] | None,
    ) -> None:
        self.model, self.fakes, self.device = model, fakes, device
        self.result: Any = None
        modules = dict(model.named_modules())
        self.calls, self.values = OpenCalls(), Values(seen)
        for index, tensor in enumerate(batch):
            self.values.add(tensor, BatchLeaf(index))
        for _, _, fake in fakes.slots:
            if self.values.find(fake) is None:
                self.values.add(fake, ParameterSource(fakes.names[id(fake)]))
        for name, buffer in model.named_buffers():
            self.values.add(buffer, BufferSource(name))
        self.states = ModuleStates(modules, self.calls.stack)
        self.kernels = KernelNotes(self.calls, (*batch, *model.buffers()))
        self.constants = Constants(self.kernels.born, first)
        self.objects = Objects(self.values, modules.values())
        self.encoder = Encoder(self.calls, self.values, self.constants, self.objects, modules)
        self.functions = FunctionCalls(
            self.calls, self.kernels, self.values, self.constants, self.encoder, model, fakes
        )
        self.modules = ModuleCalls(
            {id(module): path for path, module in modules.items()},
            self.calls,
            self.kernels,
            self.values,
            self.encoder,
            self.functions,
            self.states,
            fakes,
            device,
        )

    def run(self, program: Callable[[Any, Any], Any], microbatch: Any) -> CallTree:
        root = self.calls.stack[0]
        try:
            with (
                observed_by(self.modules, self.functions, kernels=self.kernels),
                self.states.watching(),
                quiet(),
            ):
                result = program(self.model, microbatch)
            self.result = result
            output = self.encoder.returned(result)
        except RecordError:
            raise
        except Exception as error:
            error.add_note(f"evenflow: while recording {self.modules.failed_in or 'the loss function'}")
            raise
        finally:
            self.kernels.put_back()
            self.objects.put_back()
        self.functions.note_caught()
        self.states.check_parameters()
        self.functions.check_handed()
        root.output, root.end = output, self.calls.clock
        if root.whole is not None:
            raise RecordError(
                f"the loss function itself cannot be recorded: {root.whole}; move that into a module"
            )
        tensors = self.values.tensors()
        return CallTree(
            root,
            tuple(self.values.all),
            output,
            self.values.same_tensor,
            self.fakes.tied,
            self.constants.by_name,
            self.constants.numbers_among(tensors),
            frozenset(self.objects.changing),
            self.values.changed_leaves(),
            self.device,
            self.constants.as_first(tensors, self.states.self_changed),
        )

    def echo(self, program: Callable[[], Any]) -> str | None:
        """Run the program once more on what its functions gave; what it does differently, if anything."""
        return echo(
            program,
            self.functions.noted,
            paths=self.modules.paths,
            opaque=self.modules.opaque,
            unseen=self.encoder.unseen,
            result=self.result,
        )
