"""A configuration that is written is read as the same."""

import datetime as dt
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenflow.cli.config import (
    STDOUT,
    ExampleData,
    FolderModel,
    FunctionModel,
    Logging,
    Pipelining,
    RunConfig,
    TextData,
    Training,
    read_config,
)
from evenflow.cli.config_text import write_config

ARGUMENTS = {
    "sizes": [1, 2.5, [True]],
    "a key.of = words": {"deep": {"er": "x"}},
    "none": [],
    "when": dt.date(2026, 11, 22),
}


def read_back(config, folder):
    path = folder / "written.toml"
    path.write_text(write_config(config), encoding="utf-8")
    return read_config(path)


@pytest.mark.parametrize(
    ("model", "data", "logs"),
    [
        (FunctionModel("my_module:build"), ExampleData(), Logging()),
        (FunctionModel("/models/gpt.py:build", ARGUMENTS), TextData(), Logging(STDOUT, True)),
        (
            FolderModel(Path("/models/llama")),
            TextData(paths=(Path("/texts/a"), Path("/b.txt")), length=7),
            Logging(Path("/log.jsonl")),
        ),
    ],
)
def test_it_is_read_as_it_was_written(tmp_path, model, data, logs):
    config = RunConfig(
        "mine",
        model,
        data,
        Training(steps=3, learning_rate=1e-7, seed=5),
        Pipelining(stages=3, schedule="zb-v", microbatch_size=2, split=("a.b", "c"), recompute="full"),
        logs=logs,
    )
    assert read_back(config, tmp_path) == config


def test_relative_paths_come_to_hold_anywhere(tmp_path):
    config = RunConfig("mine", FunctionModel("models/gpt.py:build"), TextData(paths=(Path("a.txt"),)))
    found = read_back(config, tmp_path)
    assert found.model == FunctionModel(f"{Path.cwd() / 'models' / 'gpt.py'}:build")
    assert isinstance(found.data, TextData)
    assert found.data.paths == (Path.cwd() / "a.txt",)


# Everything but half pairs, which no file can hold.
@given(text=st.text(st.characters(exclude_categories=("Cs",))))
def test_any_text_survives(tmp_path_factory, text):
    config = RunConfig("mine", FunctionModel("m:f", {"said": text, text: 1}), ExampleData())
    assert read_back(config, tmp_path_factory.mktemp("texts")) == config
