"""The configuration file: what it means, the text of every refusal; what is written is read as the same."""

import dataclasses
import datetime as dt
import typing
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
)
from evenflow.cli.config_file import read_config, write_config
from evenflow.errors import ConfigError

MODEL = '[model]\nfunction = "gpt.py:build"\n'


@pytest.fixture
def read(tmp_path: Path):
    def read_text_as_config(text):
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        return read_config(path)

    return read_text_as_config


def test_a_model_is_enough(read, tmp_path):
    config = read(MODEL)
    assert config.name == "run"
    assert config.model == FunctionModel(f"{tmp_path / 'gpt.py'}:build")
    assert config.data == ExampleData()
    assert config.training == Training()
    assert config.pipeline == Pipelining()


def test_logs_may_go_to_the_standard_output_and_to_the_run_s_own_folder(read):
    assert read(MODEL + '[logs]\njson = "-"\ntensorboard = true').logs == Logging(STDOUT, True)
    assert read(MODEL + "[logs]\ntensorboard = false").logs == read(MODEL).logs == Logging(None, False)
    with pytest.raises(ConfigError, match=r"logs\.json = True must be a path"):
        read(MODEL + "[logs]\njson = true")


def test_every_key_is_read(read, tmp_path):
    config = read(
        """
        name = "mine"
        model = { function = "package.module:make", arguments = { width = 3 } }
        data = { paths = ["a.txt", "/b"], batch_size = 3, length = 5, held_out = 0.25 }
        [training]
        steps = 7
        learning_rate = 1
        warmup_steps = 2
        weight_decay = 0.5
        seed = 9
        validate_every = 4
        [pipeline]
        stages = 3
        schedule = "gpipe"
        microbatch_size = 1
        split = ["layers.1"]
        exact = true
        recompute = ["layers.*.mlp"]
        offload = "activations"
        timeout = 20
        [logs]
        json = "log.jsonl"
        tensorboard = true
        """
    )
    assert config.name == "mine"
    assert config.model == FunctionModel("package.module:make", {"width": 3})
    assert config.data == TextData((tmp_path / "a.txt", Path("/b")), batch_size=3, length=5, held_out=0.25)
    assert config.logs == Logging(json=tmp_path / "log.jsonl", tensorboard=True)
    assert config.training == Training(
        steps=7, learning_rate=1.0, warmup_steps=2, weight_decay=0.5, seed=9, validate_every=4
    )
    assert config.pipeline == Pipelining(
        stages=3,
        schedule="gpipe",
        microbatch_size=1,
        split=("layers.1",),
        exact=True,
        recompute=("layers.*.mlp",),
        offload="activations",
        timeout=20.0,
    )
    assert read(MODEL + '[pipeline]\nrecompute = "full"').pipeline == Pipelining(recompute="full")


def test_a_folder_counts_from_the_file(read, tmp_path):
    assert read('[model]\nfolder = "llama"').model == FolderModel(tmp_path / "llama")


def test_the_config_of_make_train_can_be_read():
    config = read_config(Path(__file__).parents[2] / "examples" / "train_gpt.toml")
    assert config.name == "train_gpt"
    assert isinstance(config.data, TextData)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MODEL + "[training]\nstpes = 3", "unknown key 'training.stpes'; did you mean 'training.steps'?"),
        (MODEL + "[trainig]\nsteps = 3", "unknown key 'trainig'; did you mean 'training'?"),
        (
            MODEL + "[pipeline]\nsteps = 3",
            "unknown key 'pipeline.steps'; did you mean 'training.steps'? [pipeline] takes: stages",
        ),
        ("stages = 2\n" + MODEL, "unknown key 'stages'; did you mean 'pipeline.stages'?"),
        (MODEL + "[data]\nqwxzj = 1", "unknown key 'data.qwxzj'. [data] takes: paths, batch_size, length"),
        (MODEL + "[training]\nsteps = 0", "training.steps = 0 must be at least 1"),
        (MODEL + "[training]\nsteps = 1.5", "training.steps = 1.5 must be a whole number"),
        (MODEL + "[training]\nsteps = true", "training.steps = True must be a whole number"),
        (MODEL + "[training]\nlearning_rate = 'x'", "training.learning_rate = 'x' must be a number"),
        (MODEL + "[training]\nlearning_rate = -1", "training.learning_rate = -1.0 must lie between"),
        (MODEL + "[training]\nlearning_rate = nan", "training.learning_rate = nan must lie between"),
        (MODEL + "[data]\nheld_out = 0.9", "data.held_out = 0.9 must lie between 0.01 and 0.5"),
        (MODEL + "[data]\nbatch_size = 0", "data.batch_size = 0 must be at least 1"),
        (MODEL + "[data]\nlength = 1", "data.length = 1 must be at least 2"),
        (MODEL + "[data]\npaths = 'a'", "data.paths = 'a' must be a list, in square brackets"),
        (MODEL + "[data]\npaths = [3]", "data.paths = 3 must be a path"),
        (MODEL + "[pipeline]\nstages = 0", "pipeline.stages = 0 must be at least 1"),
        (MODEL + "[pipeline]\nexact = 1", "pipeline.exact = 1 must be true or false"),
        (MODEL + "[pipeline]\nschedule = 1", "pipeline.schedule = 1 must be a string"),
        (
            MODEL + "[pipeline]\nnum_microbatches = 4\nmicrobatch_size = 2",
            "pipeline.num_microbatches = 4 and pipeline.microbatch_size = 2 are both given",
        ),
        (
            MODEL + "[pipeline]\nrecompute = 'all'",
            "pipeline.recompute = 'all' must be 'none' or 'selective' or 'full'; modules are named in a list",
        ),
        (MODEL + "[pipeline]\nrecompute = 3", "pipeline.recompute = 3 must be a string"),
        (MODEL + "[pipeline]\ntimeout = 0", "pipeline.timeout = 0.0 must lie between"),
        (MODEL + "[pipeline]\noffload = 'all'", "pipeline.offload = 'all' must be 'activations'"),
        ("training = 3\n" + MODEL, "training = 3 must be a table: write [training] on a line of its own"),
        ("name = 'a/b'\n" + MODEL, "name = 'a/b' names a folder under runs/"),
        ("name = ''\n" + MODEL, "name = '' names a folder under runs/"),
        ("", "[model] must say which model to train"),
        ("[model]\nfunction = 3", "[model] must say which model to train"),
        ("[model]\nfunction = 'a:b'\nfolder = 'c'", "[model] must say which model to train"),
        ("[model]\nfunction = 'a:b'\narguments = 3", "model.arguments = 3 must be a table"),
        ("[model\n", "is no valid TOML"),
    ],
)
def test_what_is_wrong_is_said(read, text, message):
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert message in str(caught.value)
    assert "run.toml" in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*none\.toml: No such file"):
        read_config(tmp_path / "none.toml")


def test_a_binary_file_is_refused(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="it is not UTF-8 text"):
        read_config(path)


@given(
    table=st.sampled_from(["data", "training", "pipeline", "logs"]),
    value=st.one_of(st.integers(), st.floats(), st.text(), st.booleans(), st.lists(st.text())),
    choice=st.randoms(use_true_random=False),
)
def test_a_section_is_read_or_refused_in_words(table, value, choice):
    """Whatever value stands under a key, the answer is a value of the field's type or a ConfigError."""
    from evenflow.cli import config_file

    kind = {"data": TextData, "training": Training, "pipeline": Pipelining, "logs": Logging}[table]
    key = choice.choice([field.name for field in dataclasses.fields(kind)])
    try:
        section = config_file._section(kind, {key: value}, table)
    except ConfigError as error:
        message = str(error)
    else:
        assert typing.get_type_hints(kind)[key] is not float or isinstance(getattr(section, key), float)
        return
    assert f"{table}.{key}" in message


@pytest.mark.parametrize(
    "line",
    [
        "learning_rate = 1" + "0" * 400,
        "steps = 0x" + "f" * 5000,
        "seed = 9223372036854775808",
    ],
)
def test_a_number_that_no_field_can_hold_is_refused(tmp_path, line):
    path = tmp_path / "run.toml"
    path.write_text(f'[model]\nfunction = "gpt.py:build"\n[training]\n{line}\n')
    with pytest.raises(ConfigError, match="must lie between -9223372036854775807 and 9223372036854775807"):
        read_config(path)


# --- written, and read again --------------------------------------------------------------------------------

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
