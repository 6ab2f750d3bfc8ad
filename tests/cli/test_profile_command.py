"""`evenflow profile`: the table, the file, the cache, and what it refuses."""

import pytest

from evenflow.cli.main import main
from evenflow.cost_table import LayerTimes, read_cost_table

MODEL = """
import torch
from torch import nn

def build(width=16):
    model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(4)))
    batch = {"x": torch.randn(8, width), "y": torch.randn(8, width)}
    return model, lambda m, b: nn.functional.mse_loss(m(b["x"]), b["y"]), batch

def broken():
    raise RuntimeError("no model today")
"""


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("EVENFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "140")
    (tmp_path / "profiled.py").write_text(MODEL)
    return f"{tmp_path / 'profiled.py'}:build"


def run(*arguments):
    try:
        main(["profile", "--device", "cpu", *arguments])
    except SystemExit as ended:
        return ended.code or 0
    return 0


def test_equal_layers_are_one_line_with_a_count(capsys, model):
    assert run(model, "--stages", "8", "--microbatches", "2") == 0
    told = capsys.readouterr().out
    assert "One microbatch of 4 rows" in told
    (line,) = (line for line in told.splitlines() if "1.0" in line and "272" in line)
    assert "3" in line.split("│")[2]
    assert "distinct nodes measured now" in told
    assert "1,088" in told  # parameters in all


def test_a_second_run_measures_nothing(capsys, model):
    run(model)
    capsys.readouterr()
    assert run(model) == 0
    assert "all cached" in capsys.readouterr().out


def test_the_file_is_a_table_of_costs(tmp_path, capsys, model):
    assert run(model, "--stages", "8", "--csv", str(tmp_path / "times.csv")) == 0
    found = read_cost_table(tmp_path / "times.csv")
    assert isinstance(found, LayerTimes)
    assert found.in_bytes
    assert found.output is not None
    assert found.output[-1] == 0
    assert len(set(found.output[:-2])) == 1  # each layer makes as much


def test_a_file_that_is_there_is_not_overwritten(tmp_path, capsys, model):
    (tmp_path / "times.csv").write_text("mine")
    assert run(model, "--csv", str(tmp_path / "times.csv")) == 2
    assert (tmp_path / "times.csv").read_text() == "mine"


def test_what_the_models_code_raises_is_told(capsys, model):
    assert run(model.replace(":build", ":broken")) == 2
    assert "RuntimeError: no model today" in capsys.readouterr().err
