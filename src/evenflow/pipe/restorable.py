"""The half of a pipeline that gives its numbers out and takes others in: averages, states, checkpoints."""

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from evenflow.checkpoint.load import misfit, open_checkpoint, persistent_buffers
from evenflow.checkpoint.manifest import is_checkpoint
from evenflow.checkpoint.plain import encode
from evenflow.checkpoint.save import Content
from evenflow.checkpoint.whole import in_the_way
from evenflow.errors import ConfigError
from evenflow.graph.dtensors import is_dtensor
from evenflow.pipe.accumulated import Accumulated
from evenflow.pipe.logs import Logs
from evenflow.pipe.parts import Parts
from evenflow.pipe.patient import patient
from evenflow.pipe.position import Position
from evenflow.pipe.random_state import random_state, set_random_state
from evenflow.pipe.refuse import refuse_together
from evenflow.pipe.saved import check_state, layout_of, read_state
from evenflow.pipe.saver import Saver
from evenflow.pipe.state import put_back, state_of
from evenflow.pipe.swapped import swapped
from evenflow.plan.plan_file import write_plan

_LOG = logging.getLogger(__name__)


class Restorable(ABC):
    """What `Pipeline` can do with its numbers beside training them. The attributes are `Pipeline`'s."""

    _parts: Parts
    _accumulated: Accumulated
    _logs: Logs
    _updated: bool
    _is_swapped: bool
    _step: int
    _num_updates: int
    _position: Position
    _saver: Saver

    @abstractmethod
    def _own_tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and persistent buffers that this process answers for, by the model's names."""

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

    @patient("saving a checkpoint")
    def saved(self) -> None:
        """Wait until what `save(wait=False)` began is written; raises what `save` does. A collective call."""
        self._saver.wait()

    @patient("saving a checkpoint")
    def begin_to_save(self, folder: Path, extra: Any, after: Callable[[Path], None] | None) -> None:
        """What `save(wait=False)` does; `after` is called on the main rank when the folder is there."""
        self._saver.wait()  # what was begun before: where it failed, all ranks hear of it here
        world, content, failure = self._parts.mesh.world, None, None
        is_free = not self._is_first or is_checkpoint(folder)
        found = None if is_free else in_the_way(folder, (), "something else")
        try:
            if found is not None:
                raise ConfigError(f"{folder}: {found}; name another folder")
            content = self._content(extra)
        except Exception as error:  # noqa: BLE001 (all ranks hear of it)
            failure = error
        if failure is not None and not isinstance(failure, ConfigError):
            failure = ConfigError(f"{type(failure).__name__}: {failure}")
        refuse_together(world, "save()", None if failure is None else str(failure))
        assert content is not None, "there is no failure"
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
        if self._is_first:
            own["position"] = self._position.state()
        state |= {
            "seed": next(iter(parts.stages.values())).streams.run_seed,
            "extra": extra if self._is_first else None,
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

    @property
    def _is_first(self) -> bool:
        return self._parts.mesh.world.is_first

    @patient("loading a checkpoint")
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
        parts, problem, state = self._parts, None, None
        try:
            checkpoint = open_checkpoint(Path(folder))
            problem = misfit(
                checkpoint, parts.model, {**persistent_buffers(parts.model), **dict(parts.updater.parameters)}
            )
            if problem is None:
                state = read_state(checkpoint, parts, optimizer=optimizer)
                check_state(state, folder)
        except ConfigError as error:
            problem = str(error)
        except Exception as error:  # noqa: BLE001 (no memory for it, say; all hear of it)
            problem = f"{type(error).__name__}: {error}"
        refuse_together(parts.mesh.world, f"load({str(folder)!r})", problem)
        assert state is not None, "there is no problem"
        self._put_back(state, optimizer=optimizer)
        try:
            if optimizer:
                self._go_on(state, data=data)
        except Exception as error:  # noqa: BLE001 (a stranger may have written it; all hear of it)
            problem = f"this is no state: {type(error).__name__}: {error}"
        refuse_together(parts.mesh.world, f"load({str(folder)!r})", problem)
        return state["extra"]

    def _go_on(self, state: Mapping[str, Any], *, data: bool) -> None:
        """With random draws and batches where they were."""
        for stage in self._parts.stages.values():
            if stage.streams.run_seed != state["seed"] and self._is_first:
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
