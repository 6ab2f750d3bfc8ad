"""Hooks for TensorBoard and Weights & Biases: what they write, and what they say without the package."""

import importlib.util
import sys
from types import ModuleType

import pytest

import evenflow
from evenflow.errors import ConfigError
from unsplit import mean_square, mlp, regression, sgd


def trained(hook, num_steps=3):
    pipe = evenflow.pipeline(mlp(4, 8, 1), loss=mean_square, example=regression(), optimizer=sgd, stages=2)
    pipe.log_to(hook)
    return [float(pipe.step(regression()).loss) for _ in range(num_steps)]


@pytest.mark.parametrize(
    ("package", "make"), [("tensorboard", "log_to_tensorboard"), ("wandb", "log_to_wandb")]
)
def test_an_absent_package_is_named_with_the_remedy(monkeypatch, package, make):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    text = rf"{make}\(\) needs the package {package}, which is not installed: pip install {package}"
    with pytest.raises(ConfigError, match=f"^{text}$"):
        getattr(evenflow, make)("mine")


@pytest.mark.filterwarnings("ignore")  # tensorboard's own
def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    hook = evenflow.log_to_tensorboard(tmp_path / "runs")
    assert not list(tmp_path.iterdir()), "other ranks write nothing"
    losses = trained(hook)
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    names = {"loss", "learning_rate", "rows_per_second", "step_seconds", "bubble", "bubble/rank0", "peak_bytes/rank0"}
    assert names == set(events.Tags()["scalars"])
    assert [(event.step, event.value) for event in events.Scalars("loss")] == list(enumerate(losses, start=1))


def test_wandb_is_told(monkeypatch):
    """A stand-in for wandb, which needs an account: the two calls that the hook makes of it."""

    class Run:
        def __init__(self, **options):
            runs.append((options, self))
            self.logged = []

        def log(self, numbers, *, step):
            self.logged.append((step, numbers))

    runs = []
    stand_in = ModuleType("wandb")
    stand_in.init = Run
    stand_in.__spec__ = importlib.util.spec_from_loader("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    hook = evenflow.log_to_wandb("mine", name="first")
    assert not runs, "other ranks begin no run"
    losses = trained(hook)
    ((options, run),) = runs
    assert options == {"project": "mine", "name": "first"}
    assert [(step, numbers["loss"]) for step, numbers in run.logged] == list(enumerate(losses, start=1))
