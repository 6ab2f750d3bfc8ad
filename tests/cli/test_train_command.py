"""`evenflow train`: what its flags mean, and that every refusal is in words and starts and writes nothing."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch

from evenflow.cli import job as job_module
from evenflow.cli import train as train_module
from evenflow.cli.config import ExampleData, FolderModel, FunctionModel, Logging, TextData
from evenflow.cli.job import Flags, make_job
from evenflow.cli.main import main
from evenflow.errors import PeerError
from evenflow.launcher import RankEnvironment

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "examples" / "train_gpt.toml")
GPT = f"{ROOT / 'examples' / 'gpt.py'}:build"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def with_two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def small(tmp_path):
    """A source whose model takes no time."""
    path = tmp_path / "small.py"
    model = "nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))"
    body = f"{model}, lambda model, x: model(x).mean(), torch.ones(8, 4)"
    path.write_text(f"import torch\nfrom torch import nn\ndef make(): return {body}\n")
    return f"{path}:make"


@pytest.fixture
def started(monkeypatch):
    """The jobs that would have been started."""
    jobs = []
    monkeypatch.setattr(train_module, "launch", lambda fn, job, nproc: jobs.append((job, nproc)))
    return jobs


def refused(capsys, *arguments):
    """The error text of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as exited:
        main(["train", *map(str, arguments)])
    assert exited.value.code == 2
    message, _, note = capsys.readouterr().err.partition("Traceback")
    # A traceback follows only where the model's own code failed.
    assert not note or "the model cannot be built and run" in message
    return message


# --- what the flags mean ---------------------------------------------------------------------------------


def test_the_config_of_make_train_makes_two_processes_on_a_cpu(without_cuda):
    job = make_job(Flags(source=CONFIG))
    assert (job.device, job.num_stages, job.out) == ("cpu", 2, Path("runs/train_gpt"))


def test_with_gpus_there_is_one_stage_for_each(with_two_gpus):
    job = make_job(Flags(source=CONFIG))
    assert (job.device, job.num_stages) == ("cuda", 2)


@pytest.mark.parametrize(
    ("flags", "num_stages", "num_ranks"),
    [
        ({"schedule": "zb-v"}, 4, 2),
        ({"schedule": "zb-v", "stages": 8}, 8, 4),
        ({"schedule": "interleaved-1f1b", "stages_per_rank": 3}, 6, 2),
        ({"schedule": "auto"}, 4, 2),
    ],
)
def test_a_rank_holds_as_many_stages_as_the_schedule_wants(without_cuda, flags, num_stages, num_ranks):
    job = make_job(Flags(source=CONFIG, **flags))
    assert (job.num_stages, job.num_ranks) == (num_stages, num_ranks)


def test_stages_that_cannot_be_dealt_out_are_refused(capsys, started, without_cuda, in_an_empty_folder):
    error = refused(capsys, CONFIG, "--stages", "3", "--schedule", "zb-v")
    assert "3 stages cannot be dealt out 2 to each rank; the nearest that can: 2 and 4" in error
    assert started == []


def test_a_split_by_hand_says_how_many_stages_there_are(without_cuda, tmp_path):
    path = tmp_path / "split.toml"
    path.write_text(f"[model]\nfunction = '{GPT}'\n[pipeline]\nsplit = ['layers.1', 'layers.3']")
    assert make_job(Flags(source=str(path))).num_stages == 3


def test_flags_win_over_the_file(without_cuda, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(b"to be or not to be " * 50)
    job = make_job(
        Flags(
            source=CONFIG,
            data=[text],
            steps=3,
            batch_size=4,
            length=16,
            learning_rate=0.5,
            seed=7,
            stages=3,
            schedule="gpipe",
            num_microbatches=2,
            out=Path("here"),
            device="cpu",
        )
    )
    assert job.config.data == TextData(paths=(text,), batch_size=4, length=16)
    training = job.config.training
    assert (training.steps, training.learning_rate, training.seed) == (3, 0.5, 7)
    assert (job.config.pipeline.schedule, job.config.pipeline.num_microbatches) == ("gpipe", 2)
    assert (job.num_stages, job.out) == (3, Path("here"))


@pytest.mark.parametrize(
    ("said", "plans"),
    [
        ({}, True),
        ({"steps": 3}, True),
        ({"timeout": 20.0}, True),
        ({"exact": True}, False),
        ({"stages": 2}, False),
        ({"schedule": "1f1b"}, False),
        ({"num_microbatches": 4}, False),
    ],
)
def test_a_run_plans_itself_where_nothing_is_said_of_the_pipeline(said, plans):
    job = make_job(Flags(source=GPT, device="cpu", **said))
    assert (job.num_ranks, job.plans_itself) == (2, plans)


def test_one_rank_plans_nothing():
    assert not make_job(Flags(source=GPT, device="cpu", stages=1)).plans_itself


def test_a_launcher_says_how_many_ranks_there_are(monkeypatch):
    said = {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert make_job(Flags(source=GPT, device="cpu")).num_ranks == 4
    job = make_job(Flags(source=GPT, device="cpu", schedule="zb-v"))
    assert (job.num_ranks, job.num_stages) == (4, 8)


def test_every_flag_of_the_command_reaches_the_job(started, without_cuda):
    arguments = (
        "--steps 3 --batch-size 4 --length 16 --learning-rate 0.5 --seed 7 --stages 6 --stages-per-rank 2 "
        "--schedule gpipe --microbatches 2 --out here --device cpu --log-json log.jsonl "
        "--tensorboard"
    )
    main_returns(["train", CONFIG, *arguments.split()])
    ((job, nproc),) = started
    assert nproc == 3
    flags = Flags(
        source=CONFIG,
        steps=3,
        batch_size=4,
        length=16,
        learning_rate=0.5,
        seed=7,
        stages=6,
        stages_per_rank=2,
        schedule="gpipe",
        num_microbatches=2,
        out=Path("here"),
        device="cpu",
        log_json=Path("log.jsonl"),
        tensorboard=True,
    )
    assert job == make_job(flags)
    assert job.config.logs == Logging(Path("log.jsonl"), tensorboard=True)
    assert dataclasses.replace(flags, steps=4) != flags


def main_returns(arguments):
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 0


def test_a_function_alone_learns_its_example(without_cuda):
    job = make_job(Flags(source=GPT))
    assert job.config.model == FunctionModel(GPT)
    assert job.config.data == ExampleData()
    assert job.out == Path("runs/build")


def test_data_turns_a_function_into_a_reader_of_text(without_cuda, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(b"x" * 10_000)
    job = make_job(Flags(source=GPT, data=[text], batch_size=3))
    assert job.config.data == TextData(paths=(text,), batch_size=3)


@pytest.mark.parametrize("source", [None, CONFIG])
def test_a_folder_takes_the_place_of_the_model(without_cuda, tmp_path, source):
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    job = make_job(Flags(source=source, model=folder))
    assert job.config.model == FolderModel(folder)
    assert isinstance(job.config.data, TextData)
    assert job.out == Path("runs/llama" if source is None else "runs/train_gpt")


def test_the_demonstration_needs_nothing_else(started, without_cuda):
    with pytest.raises(SystemExit) as exited:
        main(["train", "--demo", "--steps", "7"])
    assert exited.value.code == 0
    ((job, num_processes),) = started
    assert (job.config.name, job.out, num_processes) == ("demo", Path("runs/demo"), 2)
    assert job.config.model == FunctionModel(
        "evenflow.demo.gpt:build", {"num_layers": 4, "width": 96, "length": 64}
    )
    assert job.config.data == TextData(batch_size=16, length=64)
    assert job.config.training.steps == 7


def test_the_version_is_printed(capsys):
    main_returns(["--version"])
    assert capsys.readouterr().out == "evenflow 0.1.0\n"


# --- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model is given: name a CONFIG.toml or MODULE:FUNCTION, or give --model FOLDER"),
        (["none.toml"], "cannot read the configuration none.toml: No such file or directory"),
        (["gpt"], "'gpt' names no model: give a CONFIG.toml, MODULE:FUNCTION or FILE.py:FUNCTION"),
        (["none.py:build"], "there is no file none.py to take a model from"),
        ([GPT, "--model", "llama"], "two models are given"),
        ([CONFIG, "--demo"], f"--demo trains a model of its own, and {CONFIG} names another: leave one out"),
        (["--demo", "--model", "llama"], "--demo trains a model of its own, and --model llama names another"),
        ([CONFIG, "--model", "llama"], "llama is no Hugging Face model folder: it holds no config.json"),
        (["--model", "llama"], "llama is no Hugging Face model folder: it holds no config.json"),
        ([CONFIG, "--schedule", "gpip"], "no schedule 'gpip'; did you mean 'gpipe'?"),
        ([CONFIG, "--schedule", "gpip"], "There are: sequential, gpipe, 1f1b"),
        ([CONFIG, "--steps", "0"], "training.steps = 0 must be at least 1"),
        ([CONFIG, "--stages", "0"], "pipeline.stages = 0 must be at least 1"),
        ([CONFIG, "--device", "tpu"], "--device tpu: there are cpu and cuda"),
        ([CONFIG, "--log-json", "/"], "cannot write the log to /: it is a folder; name a file"),
        ([CONFIG, "--data", "none.txt"], "data path none.txt does not exist"),
        ([GPT, "--data", "none.txt"], "data path none.txt does not exist"),
        ([GPT, "--batch-size", "3"], "--batch-size shapes batches of text, and this run has none"),
        ([CONFIG, "--length", "100000"], "the text is too short: the held-out part of its"),
    ],
)
def test_a_wrong_command_is_refused_in_words(capsys, started, arguments, message, in_an_empty_folder):
    assert message in refused(capsys, *arguments)
    assert started == []
    assert list(in_an_empty_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("num_microbatches = 8", 'split = ["layrs.1"]'), "layers.1"),
        (
            ("num_microbatches = 8", "stages = 1000"),
            "1000 stages need 999 cuts, but the recorded program has",
        ),
        (("length = 128\n", "length = 256\n"), "ValueError: 256 positions, but this GPT has max_length=128"),
        (
            ("width = 192", "widht = 192"),
            "cannot be called with {'num_layers': 4, 'widht': 192, 'length': 128}",
        ),
        (
            ("[training]", "[training]\nstpes = 3"),
            "unknown key 'training.stpes'; did you mean 'training.steps'?",
        ),
    ],
)
def test_a_wrong_config_is_refused_in_words(capsys, started, in_an_empty_folder, tmp_path, change, message):
    text = Path(CONFIG).read_text()
    assert change[0] in text
    path = tmp_path / "wrong.toml"
    path.write_text(text.replace(*change).replace("gpt.py:build", GPT))
    assert message in refused(capsys, path)
    assert started == []
    assert list(in_an_empty_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("nn.Linear(4, 1), lambda model, x: model(x), torch.ones(8, 4)", "not a scalar"),
        ("nn.Linear(4, 1), lambda model, x: None, torch.ones(8, 4)", "it must return a scalar tensor"),
        (
            "torch.compile(nn.Linear(4, 1)), lambda model, x: model(x).sum(), torch.ones(8, 4)",
            "torch.compile",
        ),
        ("nn.Linear(4, 1), lambda model, x: model(x).sum(), 3", "no tensor with a dimension to split"),
    ],
)
def test_a_wrong_function_is_refused_in_words(capsys, started, in_an_empty_folder, tmp_path, body, message):
    path = tmp_path / "wrong_source.py"
    path.write_text(f"import torch\nfrom torch import nn\ndef make(): return {body}\n")
    assert message in refused(capsys, f"{path}:make")
    assert started == []
    assert list(in_an_empty_folder.iterdir()) == []


def test_curves_without_tensorboard_are_refused(capsys, started, monkeypatch, in_an_empty_folder):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    message = "--tensorboard needs the package tensorboard, which is not installed: pip install tensorboard"
    assert message in refused(capsys, CONFIG, "--tensorboard")
    assert started == []
    assert list(in_an_empty_folder.iterdir()) == []


def test_cuda_where_there_is_none_is_refused(capsys, started, without_cuda, in_an_empty_folder):
    assert f"--device cuda: torch {torch.__version__} " in refused(capsys, CONFIG, "--device", "cuda")
    assert started == []
    assert list(in_an_empty_folder.iterdir()) == []


def test_more_stages_than_gpus_are_refused(capsys, started, with_two_gpus):
    error = refused(capsys, CONFIG, "--stages", "3")
    assert (
        "3 stages on CUDA, 1 on each device, need 3 devices, and this machine has 2: lower --stages" in error
    )
    assert started == []


def test_on_several_hosts_there_may_be_more_ranks_than_gpus_here(with_two_gpus, monkeypatch):
    monkeypatch.setattr(job_module, "rank_environment", lambda: RankEnvironment(3, 1, 4, 0))
    assert make_job(Flags(source=CONFIG)).num_ranks == 4


def test_an_empty_file_is_refused(capsys, started, in_an_empty_folder):
    (in_an_empty_folder / "empty.txt").touch()
    assert "the data is empty: there is no text in empty.txt" in refused(
        capsys, CONFIG, "--data", "empty.txt"
    )
    assert started == []


@pytest.mark.parametrize("out", ["taken", "taken/run"])
def test_an_out_that_is_a_file_is_refused(capsys, started, in_an_empty_folder, out):
    (in_an_empty_folder / "taken").write_text("mine")
    error = refused(capsys, CONFIG, "--out", out)
    assert f"cannot write the run to {out}: taken is a file, not a folder" in error
    assert (in_an_empty_folder / "taken").read_text() == "mine"


def test_an_error_with_brackets_and_notes_is_printed_whole(capsys, monkeypatch, small):
    def fail(*arguments, **keywords):
        error = PeerError("rank 1 failed: list[int] [/red]")
        error.add_note("On rank 1: [bold]Traceback")
        raise error

    monkeypatch.setattr(train_module, "launch", fail)
    with pytest.raises(SystemExit) as exited:
        main(["train", small])
    assert exited.value.code == 2
    assert capsys.readouterr().err == "error: rank 1 failed: list[int] [/red]\nOn rank 1: [bold]Traceback\n"


def test_ctrl_c_ends_quietly(capsys, monkeypatch, small):
    def interrupt(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "launch", interrupt)
    with pytest.raises(SystemExit) as exited:
        main(["train", small])
    assert exited.value.code == 130
    assert "Traceback" not in capsys.readouterr().err
