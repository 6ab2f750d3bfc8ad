"""`evenflow check`: equal ends with 0, different with 1, what cannot be checked with 2 and in words."""

import sys
from pathlib import Path

import pytest

from evenflow.cli.main import main

ROOT = Path(__file__).parents[2]
GPT = f"{ROOT / 'examples' / 'gpt.py'}:build"
SMALL = """
[model]
function = "{gpt}"
arguments = {{ num_layers = 3, width = 32, length = 16, dropout = 0.1 }}
[data]
batch_size = 8
length = 16
"""
# Counts its own calls where no recording sees it.
COUNTING = """
import itertools
import torch
from torch import nn

# What no recording can see: an iterator, which stands still for the two runs of a recording.
numbers = itertools.chain([2.0, 2.0], itertools.count(3.0))

def loss(model, x):
    return (model(x) * next(numbers)).mean()

def build():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), loss, torch.ones(8, 4)

def failing(model, x):
    if next(numbers) > 2:
        raise OSError("the disk is full")
    return model(x).mean()

def build_failing():
    return build()[0], failing, torch.ones(8, 4)

def build_tied():
    layers = [nn.Linear(4, 4) for _ in range(3)]
    layers[2].weight = layers[0].weight
    return nn.Sequential(*layers), lambda model, x: model(x).square().mean(), torch.randn(8, 4)
"""


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL.format(gpt=GPT))
    return path


@pytest.fixture
def counting(tmp_path):
    path = tmp_path / "counting.py"
    path.write_text(COUNTING)
    return path


def checked(capsys, *arguments):
    """(exit code, output, errors) of the command."""
    with pytest.raises(SystemExit) as exited:
        main(["check", *map(str, arguments)])
    written = capsys.readouterr()
    return exited.value.code, written.out, written.err


def test_a_configuration_is_checked_on_its_text(capsys, config):
    code, out, _ = checked(capsys, config, "--microbatches", 4)
    assert code == 0
    assert "The model, cut into stages" in out
    assert "One step split into 2 stages, against the untouched model in a plain loop, its draws keyed" in out
    assert out.endswith("equal: everything, bit for bit\n")
    # 2 rows of 16 tokens of width 32 in 4 bytes.
    assert "4.00 KiB in 1" in out
    assert not Path("runs").exists()


def test_flags_reach_the_pipeline(capsys, config):
    flags = ("--stages", 4, "--stages-per-rank", 2, "--schedule", "interleaved-1f1b", "--microbatches", 2)
    code, out, _ = checked(capsys, config, *flags, "--batch-size", 4, "--length", 8, "--seed", 3)
    assert code == 0
    assert "One step split into 4 stages" in out
    assert ": 2 microbatches" in out
    assert "2.00 KiB in 1" in out
    ranks = [line.split("│")[2].strip() for line in out.splitlines() if "%" in line]
    assert ranks == ["0", "1", "0", "1"]


def test_a_function_is_checked_on_its_example(capsys, counting):
    code, out, _ = checked(capsys, f"{counting}:build_tied")
    assert code == 0
    assert "equal: " in out
    assert "gradient │ 0     │        4 │" in out
    assert "one stage" not in out


def test_with_exact_shared_parameters_are_compared_with_one_stage(capsys, counting):
    code, out, _ = checked(capsys, f"{counting}:build_tied", "--exact")
    assert code == 0
    assert "gradient (one stage)" in out


def test_what_differs_ends_with_1_and_is_named(capsys, counting):
    code, out, _ = checked(capsys, f"{counting}:build")
    assert code == 1
    assert "different: " in out
    assert "the first node that differs: mul (stage 1, microbatch 0)" in out
    assert "it was recorded with 2.0 and is called with" in out


def test_a_program_that_fails_in_the_whole_run_ends_with_2_and_its_traceback(capsys, counting):
    code, _, errors = checked(capsys, f"{counting}:build_failing")
    assert code == 2
    assert "error: the step cannot be run: OSError: the disk is full" in errors
    assert "in failing" in errors


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "name a CONFIG.toml or MODULE:FUNCTION, or give --model FOLDER"),
        (("counting.py:biuld",), "has no function 'biuld'; did you mean build"),
        (("counting.py:build", "--stages", 9), "9 stages need 8 cuts"),
        (("counting.py:build", "--schedule", "1f2b"), "1f2b"),
        (("counting.py:build", "--length", 9), "--length shapes batches of text"),
    ],
)
def test_what_cannot_be_checked_is_refused_in_words(capsys, counting, arguments, text):
    code, out, errors = checked(capsys, *arguments)
    assert (code, out) == (2, "")
    assert text in errors
