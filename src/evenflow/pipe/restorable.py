"""The half of a pipeline that gives its numbers out and takes others in: exports, averages, checkpoints."""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from evenflow.checkpoint.adapters import is_adapted
from evenflow.checkpoint.load import misfit, open_checkpoint, persistent_buffers
from evenflow.checkpoint.manifest import is_checkpoint
from evenflow.checkpoint.plain import encode
from evenflow.checkpoint.save import Content
from evenflow.checkpoint.weights_out import export_adapter, export_model
from evenflow.checkpoint.whole import in_the_way
from evenflow.errors import ConfigError
from evenflow.graph.nouns.dtensors import is_dtensor, is_first_holder, whole
from evenflow.pipe.given.refuse import refuse_together
from evenflow.pipe.saving.position import Position
from evenflow.pipe.saving.random_state import random_state, set_random_state
from evenflow.pipe.saving.saved import check_state, layout_of, read_state
from evenflow.pipe.saving.saver import Saver
from evenflow.pipe.saving.swapped import swapped
from evenflow.pipe.state import put_back, state_of
from evenflow.pipe.step.accumulated import Accumulated
from evenflow.pipe.step.parts import Parts
from evenflow.pipe.times.gauges import Gauges
from evenflow.pipe.times.logs import Logs
from evenflow.pipe.times.times import Times
from evenflow.plan.plan_file import write_plan
from evenflow.runtime.notes.whereabouts import patiently

_LOG = logging.getLogger(__name__)


class Restorable:
    """Where a `Pipeline` is in its run, and what it can do with its numbers beside training them."""

    def __init__(self, parts: Parts) -> None:
        self.cut, self.reduction, self.plan = parts.summaries, parts.reduction, parts.plan
        self.is_main = parts.mesh.world.is_first
        self._parts = parts
        self._step = 0  # counts calls of `step`: names the draws
        self._num_updates = 0
        self._times = Times(len(parts.devices))
        self._logs = Logs(Gauges(parts, self._times), is_main=self.is_main)
        self._accumulated = Accumulated()
        self._updated = False  # by the last step
        self._is_swapped = False
        self._position, self._saver = Position(parts.device), Saver(parts.mesh.world)

    def export(self, folder: str | Path) -> None:
        """Write a folder that others load: each rank the tensors that it owns; a collective call.

        - A Hugging Face model: what `from_pretrained` loads, under the names that transformers stores, with
          configuration, generation configuration and, from the folder of `load=`, the tokenizer's files.
        - A model that `peft.get_peft_model` has wrapped: the adapter alone, for `PeftModel.from_pretrained`.
        - Any other model: safetensors under the names of its `state_dict`.

        The folder appears when it is whole, in the place of an export that was there. Raises `ConfigError`
        for a folder that holds anything else, before anything is written.

        >>> import tempfile
        >>> from evenflow.pipe.build import pipeline
        >>> batch, model = torch.ones(8, 4), torch.nn.Linear(4, 1)
        >>> pipe = pipeline(model, loss=lambda model, b: model(b).mean(), example=batch, stages=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pipe.export(folder)
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['model.safetensors']
        """
        parts, world, folder = self._parts, self._parts.mesh.world, Path(folder)
        with self._patiently("exporting the model"):
            tensors = self._own_tensors()
            made = {name: whole(tensor) for name, tensor in tensors.items()}
            owned = {name: tensor for name, tensor in made.items() if is_first_holder(tensors[name])}
            if is_adapted(parts.model):
                export_adapter(folder, world, parts.model, owned, loaded=parts.loaded, device=parts.device)
            else:
                export_model(folder, world, parts.model, owned, loaded=parts.loaded)

    @contextmanager
    def swapped(self, numbers: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Inside, parameters have other numbers, by name: averaged ones, say; afterwards their own again.

        Each process takes those of its own parameters (`named_parameters`); what it is not given stays as it
        is. A collective call. Evaluate, predict, save or export inside; `step` is refused. Raises
        `ConfigError` for a name or a shape that the model does not have.

        >>> from evenflow.pipe.build import pipeline
        >>> batch, model = torch.ones(8, 4), torch.nn.Linear(4, 1)
        >>> pipe = pipeline(model, loss=lambda model, b: model(b).mean(), example=batch, stages=1)
        >>> with pipe.swapped({name: torch.zeros_like(p) for name, p in pipe.named_parameters()}):
        ...     float(pipe.evaluate(batch).loss)
        0.0
        """
        names = frozenset(name for name, _ in self._parts.model.named_parameters(remove_duplicate=False))
        was, self._is_swapped = self._is_swapped, True
        try:
            with swapped(self._parts.updater, self._parts.mesh.world, names, numbers):
                yield
        finally:
            self._is_swapped = was

    def share(self, thing: Any) -> Any:
        """The main rank's object, on every rank; a collective call."""
        return self._parts.mesh.world.share(thing, 0)

    @property
    def num_updates(self) -> int:
        """How many updates the parameters have had, those before a `load` included."""
        return self._num_updates

    @property
    def epoch(self) -> int:
        """How many passes over a loader `feed` has ended, those before a `load` included."""
        return self._position.epoch

    def save(self, folder: str | Path, *, extra: Any = None, wait: bool = True) -> None:
        """Write a checkpoint folder, from which `load` goes on at any layout; a collective call.

        It holds parameters and buffers by the model's names, the optimizers' states by their parameters',
        schedulers, the loss scale, the step that names random draws, where `feed` is in its loader, the
        random generators' states and the plan: tensors as safetensors, the rest as JSON, all with checksums.
        `extra`, any tree of plain values and tensors, comes back from `load`; the first rank's counts.

        The folder appears when it is whole, in the place of one of that name. With `wait=False` it is written
        by another thread while the training goes on, from copies on the host; the next save, and `saved`,
        wait for it. Raises `ConfigError` between a `step(update=False)` and the update, and for a state
        that is no plain data; where a rank cannot write, `OSError` there and `PeerError` elsewhere.
        """
        self.begin_to_save(Path(folder), extra, None)
        if wait:
            self.saved()

    def saved(self) -> None:
        """Wait until what `save(wait=False)` began is written; raises what `save` does. A collective call."""
        with self._patiently("saving a checkpoint"):
            self._saver.wait()

    def begin_to_save(self, folder: Path, extra: Any, after: Callable[[Path], None] | None) -> None:
        """What `save(wait=False)` does; `after` is called on the main rank when the folder is there."""
        with self._patiently("saving a checkpoint"):
            self._saver.wait()  # what was begun before: where it failed, all ranks hear of it here
            content, problem = None, None
            try:
                is_free = not self.is_main or is_checkpoint(folder)
                if not is_free and (found := in_the_way(folder, (), "something else")) is not None:
                    raise ConfigError(f"{folder}: {found}; name another folder")
                content = self._content(extra)
            except ConfigError as error:
                problem = str(error)
            except Exception as error:  # noqa: BLE001 (all ranks hear of it)
                problem = f"{type(error).__name__}: {error}"
            refuse_together(self._parts.mesh.world, "save()", problem)
            assert content is not None, "there is no problem"
            self._saver.write(folder, content, after)

    def _content(self, extra: Any) -> Content:
        parts, world = self._parts, self._parts.mesh.world
        self._refuse_accumulating("save()")
        if self._is_swapped and parts.updater.rules.masters is not None:
            raise ConfigError(
                "save() was called inside swapped(), whose numbers the float32 copies do not have: export() "
                "there, or save outside"
            )
        state = state_of(parts.updater, self._own_tensors(), step=self._step, num_updates=self._num_updates)
        own: dict[str, Any] = {"random": random_state(parts.device)}
        if self.is_main:
            own["position"] = self._position.state()
        state |= {
            "seed": next(iter(parts.stages.values())).streams.run_seed,
            "extra": extra if self.is_main else None,
            "processes": {str(world.rank): own},
        }
        tensors: dict[str, torch.Tensor] = {}
        document = encode(state, "", tensors)
        return Content(
            tensors=tensors,
            numbers=self._saver.snapshot(tensors),
            document=document,
            step=self._step,
            num_updates=self._num_updates,
            model=type(parts.model).__name__,
            layout=layout_of(parts),
            plan=None if parts.plan is None else write_plan(parts.plan),
        )

    def load(self, folder: str | Path, *, optimizer: bool = True, data: bool = True) -> Any:
        """Go on where a checkpoint was saved, at any layout; returns its `extra`. A collective call.

        With `optimizer=False` it takes parameters and buffers alone. The next steps are then those that the
        run would have made: bit for bit where only stages and schedule are others. `feed` goes on behind the
        batches that were trained on; with `data=False` it, and the random generators that loaders use, stay
        where they are. Nothing is changed unless every process can read all that it holds.

        Raises `ConfigError` for what is no checkpoint, is damaged (with the file or the tensor), or does not
        fit the model (with every name), and `PeerError` where that is so on another rank.

        >>> import tempfile
        >>> from evenflow.pipe.build import pipeline
        >>> batch = torch.ones(8, 4)
        >>> def build(stages):
        ...     model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
        ...     return pipeline(
        ...         model,
        ...         loss=lambda model, b: model(b).mean(),
        ...         example=batch,
        ...         stages=stages,
        ...         num_microbatches=4,
        ...         optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        ...     )
        >>> one, two = build(1), build(2)
        >>> with tempfile.TemporaryDirectory() as place:
        ...     _ = one.step(batch), one.save(f"{place}/saved"), two.load(f"{place}/saved")
        >>> bool(one.step(batch).loss == two.step(batch).loss)
        True
        """
        with self._patiently("loading a checkpoint"):
            state = self._read(folder, optimizer=optimizer)
            self._put_back(state, optimizer=optimizer)
            problem = None
            try:
                if optimizer:
                    self._go_on(state, data=data)
            except Exception as error:  # noqa: BLE001 (a stranger may have written it; all hear of it)
                problem = f"this is no state: {type(error).__name__}: {error}"
            refuse_together(self._parts.mesh.world, f"load({str(folder)!r})", problem)
        return state["extra"]

    def _read(self, folder: str | Path, *, optimizer: bool) -> dict[str, Any]:
        """This process's part of a checkpoint's state; raises on all ranks what is wrong on one."""
        parts, problem, state = self._parts, None, None
        try:
            checkpoint = open_checkpoint(Path(folder))
            own = {**persistent_buffers(parts.model), **dict(parts.updater.parameters)}
            problem = misfit(checkpoint, parts.model, own)
            if problem is None:
                state = read_state(checkpoint, parts, optimizer=optimizer)
                check_state(state, folder)
        except ConfigError as error:
            problem = str(error)
        except Exception as error:  # noqa: BLE001 (no memory for it, say; all hear of it)
            problem = f"{type(error).__name__}: {error}"
        refuse_together(parts.mesh.world, f"load({str(folder)!r})", problem)
        assert state is not None, "there is no problem"
        return state

    def _go_on(self, state: Mapping[str, Any], *, data: bool) -> None:
        """With random draws and batches where they were."""
        for stage in self._parts.stages.values():
            if stage.streams.run_seed != state["seed"] and self.is_main:
                _LOG.warning(
                    "seed=%d gives way to the checkpoint's, %d", stage.streams.run_seed, state["seed"]
                )
            stage.streams.run_seed = state["seed"]
        if not data:
            return
        own = state["processes"].get(str(self._parts.mesh.world.rank), {})
        if "random" in own:
            set_random_state(own["random"], self._parts.device)
        first = state["processes"].get("0", {})
        if "position" in first:
            self._position.go_on(first["position"])

    def state_dict(self) -> dict[str, Any]:
        """What this process tells of the run: its parameters, buffers, optimizers, schedulers and the step.

        All by the model's own names, so that `evenflow.pipe.state.merged` of all processes' states suits any
        cut. Tensors are the pipeline's own. Raises `ConfigError` between a `step(update=False)` and the
        update, for gradients are no part of it.
        """
        self._refuse_accumulating("state_dict()")
        self._refuse_parted("state_dict()")
        return state_of(
            self._parts.updater, self._own_tensors(), step=self._step, num_updates=self._num_updates
        )

    def load_state_dict(self, state: Mapping[str, Any], *, optimizer: bool = True) -> None:
        """Go on where `state` was taken; with `optimizer=False` take parameters and buffers alone.

        `state` is what `state_dict` returned here, or those of all processes, merged. The next steps are then
        those that the run would have made. A collective call. Raises `ConfigError` for a state that lacks a
        parameter.

        >>> from evenflow.pipe.build import pipeline
        >>> batch, model = torch.ones(8, 4), torch.nn.Linear(4, 1)
        >>> pipe = pipeline(model, loss=lambda model, b: model(b).mean(), example=batch, stages=1)
        >>> state = pipe.state_dict()
        >>> pipe.load_state_dict(state)
        >>> sorted(state["model"])
        ['bias', 'weight']
        """
        self._refuse_parted("load_state_dict()")
        names = {name for name, _ in self._parts.updater.parameters}
        its = {name: each for name, each in state["optimizer"].items() if name in names} if optimizer else {}
        # Copies, because torch would go on in some of the same tensors.
        self._put_back({**state, "optimizer": copy.deepcopy(its)}, optimizer=optimizer)

    def _put_back(self, state: Mapping[str, Any], *, optimizer: bool) -> None:
        buffers = dict(self._parts.model.named_buffers())
        put_back(self._parts.updater, self._parts.mesh.world, buffers, state, optimizer=optimizer)
        self._parts.updater.clear()
        self._accumulated.clear()
        self._logs.drop()
        if optimizer:
            self._step, self._num_updates = state["step"], state["num_updates"]

    def _refuse_accumulating(self, what: str) -> None:
        if self._accumulated.is_begun and not self._updated:
            raise ConfigError(
                f"{what} was called while gradients accumulate, which it does not hold: call it after the "
                "update"
            )

    def _refuse_parted(self, what: str) -> None:
        for name, parameter in self._parts.updater.parameters:
            if is_dtensor(parameter):
                raise ConfigError(
                    f"{what} has whole tensors, and of {name} each rank has a part (tensor ranks, or "
                    'shard="fsdp"): use save() and load()'
                )

    def _own_tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and persistent buffers that this process answers for, by the model's names."""
        buffers = self._parts.model.named_buffers()
        updater = self._parts.updater
        return {
            **{name: parameter for name, parameter in updater.parameters if updater.answers(name, parameter)},
            **{name: buffer for name, buffer in buffers if name in self._parts.buffers},
        }

    def _patiently(self, doing: str) -> AbstractContextManager[None]:
        """Let this rank have its time inside, while others wait: a watchdog is told that it is doing this."""
        return patiently(self._parts.mesh.world.whereabouts, doing)
