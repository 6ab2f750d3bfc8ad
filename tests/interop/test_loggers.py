"""Hooks for JSON, TensorBoard and Weights & Biases: what they write, and what they refuse."""

import importlib.util
import json
import math
import sys
from pathlib import Path
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


def read(text):
    """Lines of JSON, as a strict reader takes them: NaN, which Python alone would read, is no JSON."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_each_step_is_a_line_of_json(tmp_path):
    path = tmp_path / "deep" / "log.jsonl"
    hook = evenflow.log_to_json(path)
    assert not list(tmp_path.iterdir()), "other ranks write nothing"
    losses = trained(hook)
    lines = read(path.read_text())
    assert [(line["step"], line["loss"]) for line in lines] == list(enumerate(losses, start=1))
    assert all(line["step_seconds"] > 0 and isinstance(line["peak_bytes/rank0"], int) for line in lines)


def test_lines_are_added_after_one_that_was_broken_off(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    evenflow.log_to_json(path)(2, {"loss": 0.25})
    evenflow.log_to_json(path)(3, {"loss": 0.125})
    first, broken, *rest = path.read_text().splitlines()
    assert (first, broken) == ('{"step": 1, "loss": 0.5}', '{"step": 2, "lo')
    assert read("\n".join(rest)) == [{"step": 2, "loss": 0.25}, {"step": 3, "loss": 0.125}]


def test_what_json_does_not_know_is_null_and_named(capsys):
    hook = evenflow.log_to_json("-")
    hook(1, {"loss": math.nan, "grad_norm": math.inf, "metrics/least": -math.inf, "bubble": 0.5})
    (line,) = read(capsys.readouterr().out)
    assert line == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "metrics/least": None,
        "bubble": 0.5,
        "not_finite": {"loss": "nan", "grad_norm": "inf", "metrics/least": "-inf"},
    }


def test_a_log_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write the log to .*: it is a folder; name a file"):
        evenflow.log_to_json(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot write the log to .*/file is a file, not a folder"):
        evenflow.log_to_json(tmp_path / "file" / "log.jsonl")
    with pytest.raises(ConfigError, match="cannot write the log to /dev/full: No space left on device"):
        evenflow.log_to_json("/dev/full")(1, {"loss": 0.5})


def test_an_error_without_a_number_is_told_in_its_own_words(monkeypatch):
    def fails(*_, **__):
        raise OSError("the stream is closed")

    monkeypatch.setattr(Path, "open", fails)
    with pytest.raises(ConfigError, match=r"cannot write the log to mine.jsonl: the stream is closed"):
        evenflow.log_to_json("mine.jsonl")(1, {"loss": 0.5})


@pytest.mark.filterwarnings("ignore")  # tensorboard's own
def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    hook = evenflow.log_to_tensorboard(tmp_path / "runs")
    assert not list(tmp_path.iterdir()), "other ranks write nothing"
    losses = trained(hook)
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    names = {
        "loss",
        "learning_rate",
        "rows_per_second",
        "step_seconds",
        "bubble",
        "bubble/rank0",
        "peak_bytes/rank0",
    }
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
