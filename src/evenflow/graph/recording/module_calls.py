"""Calls of the model's modules: each is made, and all that happens inside it belongs to it.

A module that cannot run on fake tensors runs once more for real, as one opaque step.
"""

from typing import Any

import torch
from torch.utils import _pytree as pytree

from evenflow.errors import RecordError
from evenflow.graph.kernels.fakes import FakeParameters, RealParameters
from evenflow.graph.nouns.template import is_tensor
from evenflow.graph.nouns.tree import Draws, FunctionCall, ModuleCall, never
from evenflow.graph.python.modules import python_state
from evenflow.graph.recording.encode import Encoder
from evenflow.graph.recording.function_calls import FunctionCalls
from evenflow.graph.recording.kernel_notes import KernelNotes
from evenflow.graph.recording.module_states import ModuleStates
from evenflow.graph.recording.needs_numbers import NeedsNumbers
from evenflow.graph.recording.observe import Invocation, unwatched
from evenflow.graph.recording.open_calls import OpenCalls
from evenflow.graph.recording.real_run import CannotRun, RealRun, run_for_real
from evenflow.graph.recording.values import Values

RUN_FOR_REAL = "a run for real"  # the name of the one step of a module that could not run on fakes


class ModuleCalls:
    """A `ModuleListener`; `paths` names the modules by id."""

    def __init__(
        self,
        paths: dict[int, str],
        calls: OpenCalls,
        kernels: KernelNotes,
        values: Values,
        encoder: Encoder,
        functions: FunctionCalls,
        states: ModuleStates,
        fakes: FakeParameters | RealParameters,
        device: torch.device,
    ) -> None:
        self.paths = paths
        self.failed_in = ""  # the innermost module that raised
        self.opaque: dict[tuple[str, int], Any] = {}  # what calls returned that ran for real
        self._calls, self._kernels, self._values, self._encoder = calls, kernels, values, encoder
        self._functions, self._states = functions, states
        self._fakes, self._device = fakes, device

    def module(self, asked: Invocation) -> Any:
        module, path = asked.module, asked.path
        with unwatched():
            self._functions.note_caught()
            call = self._calls.enter(module, path, self._encoder.encode((asked.args, asked.kwargs), path))
            state = python_state(module)
        mark, own = self._values.mark(), dict(vars(module))
        num_noted = len(self._functions.noted)
        self._states.note_foreign(call, module, state)
        try:
            try:
                result = asked.make()
            except Exception as error:  # noqa: BLE001 (raised again, unless the module can run for real)
                vars(module).clear()
                vars(module).update(own)
                with unwatched():
                    result = self._again_for_real(error, call, asked)
                    del self._functions.noted[num_noted:]
            with unwatched():
                # The call is still open: an unknown tensor among the results is its own doing.
                call.output = self._encoder.encode(result, f"the result of {path}")
                if call.unseen or call.looks:
                    self._assume_gradients(call)
        except Exception:
            self.failed_in = self.failed_in or path
            raise
        finally:
            self._calls.leave()
        call.end = self._calls.clock
        with unwatched():
            if call.unseen or call.sequential:  # its modules ran unseen, perhaps
                self._states.note_inner_changes(call)
            self._states.note_own_changes(call, module, state)
        self._values.restore(mark, filter(is_tensor, pytree.tree_leaves(result)))
        return result

    def _again_for_real(self, error: Exception, call: ModuleCall, asked: Invocation) -> Any:
        """The result of a module that failed on fake tensors, after running it alone on real ones.

        Raises `error` again where that cannot be, or where its cause is another one.
        """
        innermost = not self.failed_in
        if not isinstance(self._fakes, FakeParameters):
            raise error
        if not isinstance(error, NeedsNumbers) and (isinstance(error, RecordError) or not innermost):
            raise error
        self.failed_in = self.failed_in or call.path
        self._calls.forget_inside(call)
        self._kernels.num_draws = self._kernels.flops = call.num_draws = 0
        self._functions.blind = True
        try:
            run = run_for_real(asked, fakes=self._fakes, device=self._device)
        except CannotRun as reason:
            error.add_note(f"evenflow: {call.path} cannot stay whole: {reason}")
            raise error from None
        except Exception:  # noqa: BLE001 (the first error is the one to tell of)
            raise error from None
        finally:
            self._functions.blind = False
        self.failed_in = self._functions.raised = ""
        self._note_real_run(call, run)
        self.opaque[call.path, call.call] = run.result
        if isinstance(error, NeedsNumbers):
            call.whole = f"it calls {error.function} on numbers that depend on the parameters"
        else:
            call.whole = f"it cannot run on fake tensors ({error})"
        return run.result

    def _note_real_run(self, call: ModuleCall, run: RealRun) -> None:
        self._calls.tick()
        changes = self._values.change(run.changed, self._calls.clock)
        for tensor in filter(is_tensor, pytree.tree_leaves(run.result)):
            self._values.result(
                tensor, self._calls.clock, changed=any(tensor is other for other in run.changed)
            )
        # How often it draws depends on its numbers too: each draw is keyed, whether there was one now or not.
        call.num_draws = max(1, self._kernels.num_draws // 2)
        draws = Draws(call.path, call.call, 0, call.num_draws)
        output = self._encoder.encode(run.result, call.path)
        call.children.append(
            FunctionCall(
                never,
                RUN_FOR_REAL,
                call.path,
                self._calls.clock,
                call.args,
                output,
                rebinds=changes.rebinds,
                changed_buffers=changes.buffers,
                draws=draws,
                flops=self._kernels.flops // 2,
                grad_enabled=call.grad_enabled,
                autocast=call.autocast,
            )
        )
        call.real = True
        self._states.note_real_run(call, run.attributes)

    def _assume_gradients(self, call: ModuleCall) -> None:
        """Let results of unseen operations require a gradient, which fakes do not carry through all.

        Nothing is lost by that: where the real result requires none, its backward has no root.
        """
        trains = any(name.startswith(call.inside) for name in self._fakes.tied)
        trains |= any(self._values.all[ref].info.requires_grad for ref in call.args.refs)
        for number in call.output.refs if call.grad_enabled and trains else ():
            if self._values.all[number].born >= call.start:
                self._values.require_grad(number)
