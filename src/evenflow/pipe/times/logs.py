"""Logging hooks: each is told a step's numbers, on the main rank alone.

The whole protocol is one call, `hook(step, numbers)`; `evenflow.interop.loggers` has those for lines of JSON,
TensorBoard and Weights & Biases, and `evenflow.interop.progress` one for people. Reading a loss waits for the
device, so that nothing is read for a step that no hook wants to hear of; nor are other ranks asked.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any, TypeAlias, TypeVar

import torch
from torch.utils import _pytree as pytree

from evenflow.errors import ConfigError
from evenflow.pipe.given.refuse import check_callable, check_whole
from evenflow.pipe.step.result import StepResult
from evenflow.pipe.times.gauges import Gauges
from evenflow.runtime.recorded.weights import Shares

# Called with the number of updates so far and the numbers by name.
LogHook: TypeAlias = Callable[[int, Mapping[str, float]], None]
# Every so many updates, or those for whose number it is true.
Every: TypeAlias = int | Callable[[int], bool]
T = TypeVar("T")


class Logs:
    """The hooks of a pipeline, and what they have not been told yet; they are the main rank's."""

    def __init__(self, gauges: Gauges, *, is_main: bool) -> None:
        self._gauges, self._is_main = gauges, is_main
        self._hooks: list[_Told] = []
        self._asks: list[_Told] = []  # those for whose updates all ranks tell
        self._batches: list[tuple[StepResult, Shares]] = []  # since the last update
        self._num_steps, self._num_pauses = 0, 0  # that have begun
        self._watched_since: float | None = None

    def add(self, hook: LogHook, every: Every, *, all_ranks: bool) -> Callable[[], None]:
        """Tell `hook` of every so many updates, until what is returned is called.

        Raises `ConfigError` for what cannot be called.
        """
        check_callable(needed=True, hook=hook)
        added = _Told(hook, _is_due(every))
        if all_ranks:
            self._asks.append(added)
        if self._is_main:
            self._hooks.append(added)

        def remove() -> None:
            self._asks = [told for told in self._asks if told is not added]
            self._hooks = [told for told in self._hooks if told is not added]

        return remove

    def begin(self) -> None:
        """A step begins."""
        self._num_steps += 1
        self._start()

    def _start(self) -> None:
        """The first step, or the wait for its batch, starts the clocks."""
        for told in self._hooks:
            told.start()

    def fed(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; how long each is waited for is noted, unless it is for an evaluation."""
        with closing(batches):  # type: ignore[type-var]  # a generator
            while True:
                self._start()
                start = time.perf_counter()
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                waited, hooks = time.perf_counter() - start, tuple(self._hooks)
                num_steps, num_pauses = self._num_steps, self._num_pauses
                for told in hooks:
                    told.wait(waited)
                try:
                    yield batch
                finally:  # what the batch was for is known when it has been used, and no hook was told before
                    if self._num_steps == num_steps and self._num_pauses > num_pauses:
                        for told in hooks:
                            told.leave_out(waited)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside is no training, and no time of a step."""
        self._num_pauses += 1
        start = time.perf_counter()
        try:
            yield
        finally:
            for told in self._hooks:
                told.pause(start)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Steps inside are watched, which makes them slow: their times are told of to nobody."""
        self._gauges.keep_peaks()
        self._watched_since = time.perf_counter()
        try:
            yield
        finally:
            self._leave_out_watched()
            self._watched_since = None

    def _leave_out_watched(self) -> None:
        """Stop the clocks for the time since watching began, or since this was last called."""
        assert self._watched_since is not None, "a step is watched"
        start, self._watched_since = self._watched_since, time.perf_counter()
        for told in self._hooks:
            told.pause(start)

    def note(self, result: StepResult, shares: Shares) -> None:
        """A batch went through."""
        if self._hooks:
            self._batches.append((result, shares))
        if self._watched_since is None:
            for told in self._hooks:
                told.count(shares)

    def rates(self, number: int, optimizers: Mapping[int, torch.optim.Optimizer]) -> dict[str, float]:
        """The learning rates of the `number`th update; none where no hook is to hear of it."""
        return rates_of(optimizers.values()) if self._due(number) else {}

    def updated(self, number: int, rates: Mapping[str, float]) -> None:
        """The batches noted so far made the `number`th update, with these learning rates."""
        due = self._due(number)
        asked = self._gauges.of_all() if any(told.is_due(number) for told in self._asks) else None
        if self._watched_since is None:
            for told in self._hooks:
                told.num_updates += 1
        else:
            self._leave_out_watched()
        if due:
            gauges = self._gauges.own() if asked is None else asked
            if self._watched_since is not None:
                gauges = {name: value for name, value in gauges.items() if not name.startswith("bubble")}
            numbers = {**_of_batches(self._batches), **rates, **gauges}
            now = time.perf_counter()  # one for all: what a hook does with it is part of the next step
            for told in due:
                told.tell(number, numbers, now)
        self._batches.clear()

    def _due(self, number: int) -> list["_Told"]:
        return [told for told in self._hooks if told.is_due(number)]

    def drop(self) -> None:
        """The batches since the last update are given up."""
        self._batches.clear()


def _is_due(every: Every) -> Callable[[int], bool]:
    if callable(every):
        return every
    check_whole(every=every)
    if every < 1:
        raise ConfigError(f"every={every} must be at least 1")
    return lambda number: number % every == 0


class _Told:
    """One hook, and how much went through since it was last told, in which time."""

    def __init__(self, hook: LogHook, is_due: Callable[[int], bool]) -> None:
        self.is_due = is_due
        self.num_updates = 0
        self._hook = hook
        self._since: float | None = None
        self._paused_seconds = 0.0
        self._waited_seconds: float | None = None
        self._amounts: dict[str, float] = {}

    def start(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def wait(self, seconds: float) -> None:
        self._waited_seconds = (self._waited_seconds or 0.0) + seconds

    def pause(self, start: float) -> None:
        """Nothing that is done from `start` until now counts."""
        if self._since is not None:
            self._paused_seconds += time.perf_counter() - max(start, self._since)

    def leave_out(self, waited_seconds: float) -> None:
        """So long a wait was for no step."""
        assert self._waited_seconds is not None, "it was noted"
        self._waited_seconds -= waited_seconds
        self._paused_seconds += waited_seconds

    def count(self, shares: Shares) -> None:
        amounts = {"rows": float(shares.num_rows)}
        if shares.unit == "tokens":
            amounts["tokens"] = shares.size
        for name, amount in amounts.items():
            self._amounts[name] = self._amounts.get(name, 0.0) + amount

    def tell(self, number: int, numbers: Mapping[str, float], now: float) -> None:
        assert self._since is not None, "a step has begun"
        speeds: dict[str, float] = {}
        if self.num_updates:  # that were not watched
            seconds = now - self._since - self._paused_seconds
            speeds = {f"{name}_per_second": amount / seconds for name, amount in self._amounts.items()}
            speeds["step_seconds"] = seconds / self.num_updates
            if self._waited_seconds is not None:
                speeds["wait_seconds"] = self._waited_seconds / self.num_updates
        self._since, self._paused_seconds, self._waited_seconds = now, 0.0, None
        self.num_updates = 0
        self._amounts.clear()
        self._hook(number, {**numbers, **speeds})


def rates_of(optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, float]:
    """The learning rates of the first optimizer: one number, or one for each group where they differ.

    >>> one, two = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    >>> rates_of([torch.optim.SGD([{"params": [one]}, {"params": [two], "lr": 0.5}], lr=0.25)])
    {'learning_rate/0': 0.25, 'learning_rate/1': 0.5}
    """
    first = next(iter(optimizers), None)
    if first is None:
        return {}
    rates = [float(group["lr"]) for group in first.param_groups if group["params"] and "lr" in group]
    if len(set(rates)) == 1:
        return {"learning_rate": rates[0]}
    return {f"learning_rate/{at}": rate for at, rate in enumerate(rates)}


def _of_batches(batches: list[tuple[StepResult, Shares]]) -> dict[str, float]:
    """The loss of these batches together, and the last one's metrics that are one number each."""
    losses = [float(result.loss) for result, _ in batches]
    sizes = [shares.size for _, shares in batches]
    if batches[0][1].unit == "sums":
        loss = sum(losses)
    else:
        total = sum(sizes) or 1.0
        loss = sum(part * size / total for part, size in zip(losses, sizes, strict=True) if size)
    last = batches[-1][0]
    norm = {} if last.grad_norm is None else {"grad_norm": float(last.grad_norm)}
    return {"loss": loss, **norm, **_flat(last.metrics)}


def _flat(metrics: Any) -> dict[str, float]:  # any tree
    """The single numbers of a tree: `metrics/head/accuracy` for `{"head": {"accuracy": …}}`."""
    if metrics is None:
        return {}
    return {
        "/".join(["metrics", *(str(_step(key)) for key in path)]): float(leaf)
        for path, leaf in pytree.tree_flatten_with_path(metrics)[0]
        if isinstance(leaf, int | float)
        or (isinstance(leaf, torch.Tensor) and leaf.dim() == 0 and not leaf.is_complex())
    }


def _step(key: Any) -> Any:  # torch gives each kind of path its own class
    match key:
        case pytree.MappingKey(name) | pytree.SequenceKey(name) | pytree.GetAttrKey(name):
            return name
        case _:
            return key
