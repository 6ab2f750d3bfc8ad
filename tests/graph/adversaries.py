"""A trial of a hostile program: several steps as a pipeline, against a plain loop over the same microbatches.

A trial ends as correct (every loss, gradient, buffer and weight after every step is the plain loop's, bit for
bit), or as refused by a `RecordError` or `ConfigError` that names the culprit. Anything else fails.
"""

import contextlib
import copy
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import evenflow
from evenflow.runtime.recorded.microbatch import Microbatches, batch_size
from unsplit import buffers_of, random_cuts, sgd

WIDTH = 4
STEPS = 2


Numbers = dict[str, torch.Tensor]  # what a step left behind, by name


def data(step: int, *, rows: int = 2, items: int = 3) -> list[Any]:
    """Microbatches that all differ: the first of each step is positive, the others are not."""
    found = []
    for item in range(items):
        generator = torch.Generator().manual_seed(100 * step + item)
        x = torch.randn(rows, WIDTH, generator=generator)
        x = x.abs() if item == 0 else -x.abs() if item == 1 else x
        found.append({"x": x * (1 + step), "y": torch.randn(rows, 1, generator=generator)})
    return found


class Net(nn.Module):
    """Four layers, for programs to run in their own ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 1)


def square(model: Any, batch: Any) -> torch.Tensor:
    return F.mse_loss(model(batch["x"]), batch["y"])


@dataclass
class Program:
    """One hostile program, made anew for each run. `change(model, step)` is what happens before a step."""

    model: nn.Module
    loss: Callable[[Any, Any], Any] = square
    batch: Callable[[int], list[Any]] = data  # step -> microbatches
    change: Callable[[nn.Module, int], None] = lambda model, step: None
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = STEPS


def net(forward: Callable[..., Any], kind: type[nn.Module] = Net, **attributes: Any) -> nn.Module:
    """A `Net` with this forward, and what else it holds."""
    torch.manual_seed(0)
    made = type("Model", (kind,), {"forward": forward})()
    for name, value in attributes.items():
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            made.register_buffer(name, value)
        else:
            setattr(made, name, value)
    return made


def plain(program: Program) -> Iterator[Numbers]:
    """The steps of a plain loop."""
    model = program.model
    optimizer = sgd(model.parameters())
    for step in range(program.steps):
        program.change(model, step)
        optimizer.zero_grad()
        items = copy.deepcopy(program.batch(step))
        losses, parts = [], shares([batch_size(item) for item in items])
        for item, part in zip(items, parts, strict=True):
            loss = program.loss(model, item)
            loss.backward(torch.full_like(loss, part))
            losses.append(loss.detach() * part)
        gradients = {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        yield outcome(torch.stack(losses).sum(), gradients, model)


def shares(rows: list[int]) -> list[float]:
    return [1 / len(rows)] * len(rows) if len(set(rows)) == 1 else [each / sum(rows) for each in rows]


def piped(program: Program, **arguments: Any) -> Iterator[Numbers]:
    """The steps of a pipeline."""
    model = program.model
    program.change(model, 0)
    example = Microbatches(copy.deepcopy(program.batch(0)))
    pipe = evenflow.pipeline(
        model,
        loss=program.loss,
        example=example,
        optimizer=sgd,
        **({"reduction": "item-mean"} | arguments | program.options),
    )
    with contextlib.closing(pipe):
        for step in range(program.steps):
            if step:
                program.change(model, step)
            result = pipe.step(Microbatches(copy.deepcopy(program.batch(step))))
            gradients = {f"gradient of {n}": g for n, g in pipe.named_gradients() if g is not None}
            yield outcome(result.loss, gradients, model)


def outcome(loss: torch.Tensor, gradients: Numbers, model: nn.Module) -> Numbers:
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    copies = {n: g.clone() for n, g in gradients.items()}
    return {"loss": loss.clone(), **copies, **weights, **buffers_of(model)}


def differences(found: Numbers, expected: Numbers, tolerance: float) -> list[str]:
    """Names of what differs."""
    names = dict.fromkeys((*found, *expected))
    return [n for n in names if not alike(found.get(n), expected.get(n), tolerance)]


def alike(found: torch.Tensor | None, expected: torch.Tensor | None, tolerance: float) -> bool:
    if found is None or expected is None:
        return found is expected
    if found.is_sparse or expected.is_sparse:
        found, expected = found.to_dense(), expected.to_dense()
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if tolerance:
        return bool(((found - expected).abs() <= tolerance * expected.abs().max()).all())
    same = (found == expected) | (found.isnan() & expected.isnan())
    return bool(same.all())


# Of each row the first that the program has places for: cut by cost between modules, and at random anywhere.
TRIALS = [
    [{"stages": 2}],
    [{"stages": stages, "max_leaf_share": 0.0, "cuts": 1} for stages in (3, 2)],
]


@dataclass(frozen=True)
class Case:
    """A hostile program and what may become of it.

    `culprit`: what a refusal must name; without it none is allowed. `drawing`: it draws random numbers, so
    that one stage and not the plain loop is the reference.
    """

    build: Callable[[], Program]
    culprit: str = ""
    tolerance: float = 0.0
    drawing: bool = False

    def check(self) -> None:
        """Try the program at every cut; raises `AssertionError` where a trial ended badly."""
        reference = piped(self.build(), stages=1, max_leaf_share=0.0) if self.drawing else plain(self.build())
        expected = list(reference)
        ends = []
        for trials in TRIALS:
            tried = ((trial, self.tried(trial, expected)) for trial in trials)
            ends += itertools.islice(((trial, end) for trial, end in tried if end != UNCUT), 1)
        assert ends, "no trial at all"
        for trial, end in ends:
            refused = self.culprit and re.search(f"^refused: .*({self.culprit})", end)
            assert end == "correct" or refused, f"{trial}: {end}"

    def tried(self, trial: dict[str, Any], expected: list[Numbers]) -> str:
        """How a trial ended: "correct", "refused: WHY", "wrong: WHERE", or `UNCUT`."""
        arguments = {name: value for name, value in trial.items() if name != "cuts"}
        program = self.build()
        with contextlib.ExitStack() as stack:
            if "cuts" in trial:
                stack.enter_context(random_cuts(trial["cuts"], trial["stages"]))
            try:
                for step, found in enumerate(piped(program, **arguments)):
                    differ = differences(found, expected[step], self.tolerance)
                    if differ:
                        return f"wrong: in step {step}: {', '.join(differ)}"
            except (evenflow.RecordError, evenflow.ConfigError) as error:
                return UNCUT if "places to cut" in str(error) else f"refused: {error}"
            except ValueError as error:
                if "Sample larger than population" in str(error):  # fewer places than `random_cuts` wants
                    return UNCUT
                raise
        return "correct"


UNCUT = "too few places to cut"


class Cases:
    """A list of cases that functions register in."""

    def __init__(self) -> None:
        self.all: dict[str, Case] = {}

    def program(self, **options: Any) -> Callable[[Callable[[], Program]], Callable[[], Program]]:
        """The function makes a program."""

        def register(build: Callable[[], Program]) -> Callable[[], Program]:
            assert build.__name__ not in self.all
            self.all[build.__name__] = Case(build, **options)
            return build

        return register

    def forward(self, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """The function is the forward of a `Net`."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            assert function.__name__ not in self.all
            self.all[function.__name__] = Case(lambda: Program(net(function)), **options)
            return function

        return register

    def parameters(self) -> list[Any]:
        """For `pytest.mark.parametrize`."""
        return [pytest.param(case, id=name) for name, case in self.all.items()]
