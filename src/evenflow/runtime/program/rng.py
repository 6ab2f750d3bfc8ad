"""Random streams that do not depend on the split.

Every draw (dropout, noise) is keyed by (seed, step, microbatch, module path, call count, draw ordinal) and
never by node, leaf or stage, because those depend on the plan. Keying calls the generator's own
`manual_seed` (about 1 µs; `torch.manual_seed` takes 160 µs). Most modules draw once per call, before their
children do: for them seeding when the call begins is enough. The few others run under a dispatch mode that
seeds before each draw; both give the same numbers.
"""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from evenflow.graph.kernels.kernels import draws, generator_of
from evenflow.graph.nouns.graph import ModuleTarget
from evenflow.graph.nouns.tree import Draws

_MASK = (1 << 64) - 1


def mix(state: int, word: int) -> int:
    """Stir a word into 64 bits of state: a linear step (so that order matters), then SplitMix64's finaliser.

    Sources: Steele, Lea & Flood, "Fast splittable pseudorandom number generators" (2014); the multiplier is
    from Steele & Vigna, "Computationally easy, spectrally good multipliers" (2022).
    """
    z = (state * 0xD1342543DE82EF95 + word + 0x9E3779B97F4A7C15) & _MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return z ^ z >> 31


class Streams:
    """Seeds the default generator of one device before every draw. One per stage."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.run_seed = seed
        self._device = device
        self.base = 0  # names step and microbatch
        self._paths: dict[str, int] = {}
        self._hooked: dict[str, list[Any]] = {}  # hook handles, which torch does not type publicly
        self._calls: dict[str, int] = {}  # running call counts inside the active leaf
        self._stack: list[list[Any]] = []  # [path, call, next ordinal] of the drawing modules being run
        self._active = False

    @contextlib.contextmanager
    def as_at(self, base: int) -> Iterator[None]:
        """Draw again as in an earlier microbatch: `base` is what `base` was then."""
        self.base, now = base, self.base
        try:
            yield
        finally:
            self.base = now

    def begin(self, step: int, microbatch: int) -> None:
        """Name the step and microbatch whose draws follow."""
        self.base = mix(mix(self.run_seed & _MASK, step), microbatch)

    def seed(self, path: str, call: int, ordinal: int) -> None:
        """Set the generator for one draw."""
        word = self._paths.get(path)
        if word is None:
            word = self._paths[path] = int.from_bytes(
                hashlib.blake2b(path.encode(), digest_size=8).digest(), "little"
            )
        generator_of(self._device).manual_seed(mix(mix(self.base, word), call << 20 | ordinal))

    @contextlib.contextmanager
    def function(self, drawn: Draws) -> Iterator[None]:
        """Around a single torch function that draws."""
        if drawn.count == 1:
            self.seed(drawn.path, drawn.call, drawn.first)
            yield
            return
        self._stack.append([drawn.path, drawn.call, drawn.first])
        try:
            with _EachDraw(self):
                yield
        finally:
            self._stack.pop()

    @contextlib.contextmanager
    def module(self, target: ModuleTarget) -> Iterator[None]:
        """Around a leaf inside which modules draw; `hook` must have seen those modules."""
        self._calls = {}
        for drawn in target.draws:
            self._calls.setdefault(drawn.path, drawn.call)
        self._active = True
        try:
            with contextlib.nullcontext() if target.keyed_at_entry else _EachDraw(self):
                yield
        finally:
            self._active = False
            self._stack.clear()

    def hook(self, model: torch.nn.Module, paths: Iterable[str]) -> None:
        """Let these modules seed the generator whenever they are called within `module`."""
        for path in paths:
            if path not in self._hooked:
                module = model.get_submodule(path)
                enter, leave = _Enter(self, path), _Leave(self)
                self._hooked[path] = [
                    module.register_forward_pre_hook(enter, prepend=True),
                    module.register_forward_hook(leave, always_call=True),
                ]

    def another(self) -> "Streams":
        """Streams of the same seed on the same device, which no module is hooked to."""
        return Streams(self.run_seed, self._device)

    @contextlib.contextmanager
    def untouched(self, model: torch.nn.Module) -> Iterator[None]:
        """Around a whole program that runs as it is: it draws what its recording would.

        A patched `Module.__call__` tells which of the model's is being run, its hooks included: they draw as
        a part of it. These streams must have no hooks of their own (`another`).
        """
        paths = {id(module): path for path, module in model.named_modules()}
        calls: Counter[str] = Counter()
        forward = torch.nn.Module.__call__

        def keyed(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:  # as Module.__call__
            path = paths.get(id(module))
            if path is None:
                return forward(module, *args, **kwargs)
            self._stack.append([path, calls[path], 0])
            calls[path] += 1
            try:
                return forward(module, *args, **kwargs)
            finally:
                self._stack.pop()

        self._stack.append(["", 0, 0])  # the loss function itself
        torch.nn.Module.__call__ = keyed  # type: ignore[method-assign]  # the patch is the point
        try:
            with _EachDraw(self):
                yield
        finally:
            torch.nn.Module.__call__ = forward  # type: ignore[method-assign]
            self._stack.clear()

    def unhook(self) -> None:
        """Leave the modules as they were."""
        for handles in self._hooked.values():
            for handle in handles:
                handle.remove()
        self._hooked.clear()

    def enter(self, path: str) -> None:
        if self._active:
            call = self._calls.get(path, 0)  # one that draws in another recording only is seeded for nothing
            self._calls[path] = call + 1
            self._stack.append([path, call, 0])
            self.seed(path, call, 0)

    def leave(self) -> None:
        if self._stack:  # an error may have emptied it already
            self._stack.pop()

    def next_draw(self) -> None:
        top = self._stack[-1]
        self.seed(top[0], top[1], top[2])
        top[2] += 1


class _Enter:
    """A forward pre-hook; the mark tells the recorder that it is not the user's."""

    evenflow = True

    def __init__(self, streams: Streams, path: str) -> None:
        self.streams, self.path = streams, path

    def __call__(self, module: torch.nn.Module, args: Any) -> None:
        self.streams.enter(self.path)


class _Leave:
    """A forward hook that also runs when the call raises."""

    evenflow = True

    def __init__(self, streams: Streams) -> None:
        self.streams = streams

    def __call__(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self.streams.leave()


class _EachDraw(TorchDispatchMode):
    """Seeds before every kernel that draws."""

    def __init__(self, streams: Streams) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.streams = streams

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if draws(func, args, kwargs or {}):
            self.streams.next_draw()
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def generators_restored(devices: Iterable[torch.device]) -> Iterator[None]:
    """Give the user's own generators back as they were."""
    generators = [generator_of(device) for device in dict.fromkeys(devices)]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
