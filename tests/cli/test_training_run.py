"""The whole command, as a user starts it: real ranks, real text, real files."""

import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evenflow.cli.config_file import read_config
from evenflow.journal.folder import read_plan_of, read_run, read_steps
from preloaded import python

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "examples" / "train_gpt.toml"
GPT = f"{ROOT / 'examples' / 'gpt.py'}:build"
DONE = re.compile(
    r"^done: train loss ([\d.]+) -> ([\d.]+), validation ([\d.]+) nats/byte, (\d+) tok/s, "
    r"step ([\d.]+) ms, bubble ([\d.]+) %$"
)

TINY = """
[model]
function = "{gpt}"
arguments = {{ num_layers = 2, width = 32, length = 32, dropout = 0.1 }}
[data]
paths = ["{text}"]
batch_size = 8
length = 32
[training]
steps = 12
learning_rate = 1e-2
warmup_steps = 2
validate_every = 5
[pipeline]
num_microbatches = 4
"""


NUM_PARAMETERS = 40_000  # about

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def write_tiny(folder):
    path = folder / "tiny.toml"
    path.write_text(TINY.format(gpt=GPT, text=ROOT / "LICENSE"))
    return path


def evenflow(*arguments, cwd, launcher=()):
    """The command, in a process of its own."""
    command = [*python(), *launcher, "-m", "evenflow", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def made() -> dict:
    return {}


@pytest.fixture
def runs(made, folder: Path):
    """The same training in two processes, in two under torchrun, and in one by another schedule."""
    if not made:
        tiny = write_tiny(folder)
        made["two"] = evenflow("train", tiny, cwd=folder)
        made["torchrun"] = evenflow("train", tiny, cwd=folder, launcher=TORCHRUN)
        made["one"] = evenflow("train", tiny, "--stages", 1, "--schedule", "sequential", cwd=folder)
    return made


@pytest.mark.parametrize("way", ["two", "torchrun", "one"])
def test_a_run_shows_its_cut_its_progress_and_its_end(runs, way):
    done = runs[way]
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The model, cut into stages") == 1
    first, last, validation, _, step, bubble = map(float, DONE.match(done.stdout.splitlines()[-1]).groups())
    assert abs(first - math.log(256)) < 0.3
    assert last < first
    assert validation < first
    assert step > 0
    assert 0 <= bubble <= 100
    (before_training,) = re.findall(r"before training: validation ([\d.]+) nats/byte", done.stdout)
    assert abs(float(before_training) - math.log(256)) < 0.3
    assert re.findall(r"^step (\d+): validation", done.stdout, re.MULTILINE) == ["5", "10"]
    if way == "two":  # torchrun speaks of OMP_NUM_THREADS, and torch of saving from a single process
        assert done.stderr == ""


def test_the_way_to_run_it_changes_no_loss(runs):
    assert len({DONE.match(done.stdout.splitlines()[-1]).groups()[:3] for done in runs.values()}) == 1


WRITTEN = ["checkpoint", "config.toml", "last_step.json", "run.json", "steps.jsonl", "timeline.png"]


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("name", ["tiny", "tiny-2", "tiny-3"])
def test_each_run_has_a_folder_of_its_own(folder, name):
    written = folder / "runs" / name
    assert (written / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert any((written / "checkpoint").iterdir())
    assert sorted(path.name for path in written.iterdir()) == WRITTEN
    assert len(list(written.parent.iterdir())) == 3


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize(("name", "num_ranks"), [("tiny", 2), ("tiny-2", 2), ("tiny-3", 1)])
def test_a_run_tells_what_every_rank_did(folder, runs, name, num_ranks):
    written = folder / "runs" / name
    run, steps = read_run(written), read_steps(written)
    assert (run.name, run.num_steps, run.num_timed, run.num_microbatches) == ("tiny", 12, 10, 4)
    assert run.schedule == ("1f1b" if num_ranks == 2 else "sequential")
    assert [stage.rank for stage in run.stages] == list(range(num_ranks))
    assert len(run.ranks) == num_ranks
    # Each rank holds, in fp32, the parameters, gradients and two states of about half of the model.
    for rank in run.ranks:
        assert rank.peak_bytes > 16 * NUM_PARAMETERS / num_ranks / 2
        assert 0 <= rank.idle < 1
    for stage in run.stages:
        assert 0 < stage.forward_seconds < run.step.median
        assert 0 < stage.whole_backward_seconds < run.step.median
    assert run.step.least <= run.step.median <= run.step.most
    assert run.pipeline.least < run.step.most
    assert [step.number for step in steps] == list(range(1, 13))
    last = sorted(step.seconds for step in steps[2:])
    assert (run.step.least, run.step.most) == (last[0], last[-1])
    way = {"tiny": "two", "tiny-2": "torchrun", "tiny-3": "one"}[name]
    first, _, _, _, step_ms, _ = map(float, DONE.match(runs[way].stdout.splitlines()[-1]).groups())
    assert steps[0].loss == pytest.approx(first, abs=1e-3)
    assert 1000 * run.step.median == pytest.approx(step_ms, abs=0.1)
    config = read_config(written / "config.toml")
    assert (config.name, config.training.steps, config.data.batch_size) == ("tiny", 12, 8)


@pytest.mark.usefixtures("runs")
def test_a_run_is_shown_and_never_written_over(folder):
    shown = evenflow("show", "runs/tiny", cwd=folder)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("tiny: 1f1b, 2 stages, 2 ranks, microbatches: 4\n")
    before = (folder / "runs" / "tiny" / "run.json").read_bytes()
    again = evenflow("train", write_tiny(folder), "--out", "runs/tiny", cwd=folder)
    assert again.returncode == 2
    assert "--out runs/tiny holds something already" in again.stderr
    assert (folder / "runs" / "tiny" / "run.json").read_bytes() == before


def test_a_planned_run_is_shown_beside_its_plan(tmp_path):
    tiny = write_tiny(tmp_path)
    cluster = ("--cluster", "2x CPU core", "--pipeline-only")
    planned = evenflow("plan", tiny, *cluster, "-o", "plan.toml", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    done = evenflow("train", tiny, "--plan", "plan.toml", "--steps", 3, "--out", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_plan_of(tmp_path / "here", read_run(tmp_path / "here")) is not None
    shown = evenflow("show", "here", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("planned") >= 4
    assert "Furthest from the plan: stage " in shown.stdout


TALKING = """
import sys
sys.path.insert(0, {folder!r})
import gpt

def loss(model, microbatch):
    print("talking in a step")
    return gpt.loss(model, microbatch)

def build(**arguments):
    print("talking while it is built")
    model, _, example = gpt.build(**arguments)
    return model, loss, example
"""


def test_a_run_that_is_told_nothing_plans_itself_and_its_steps_go_out_as_json(tmp_path):
    tiny = write_tiny(tmp_path)
    tiny.write_text(tiny.read_text().partition("[pipeline]")[0].replace(GPT, "talking.py:build"))
    (tmp_path / "talking.py").write_text(TALKING.format(folder=str(ROOT / "examples")))
    flags = ("--steps", 4, "--batch-size", 4, "--log-json", "-", "--tensorboard", "--out", "here")
    done = evenflow("train", tiny, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = read_run(tmp_path / "here")
    plan = read_plan_of(tmp_path / "here", run)
    assert (plan.degrees.pipeline, plan.schedule) == (2, run.schedule)
    assert f"planned: 2 pipeline ranks, {plan.schedule}" in done.stderr
    assert f"{plan.num_microbatches} microbatch" in done.stderr
    assert "talking while it is built" in done.stderr
    assert re.search(
        r"^step 4/4  loss .*  bubble [\d.]+ %  memory [\d.]+ MiB of [\d.]+ GiB \(rank [01]\)  ETA 0:00:00$",
        done.stderr,
        re.MULTILINE,
    )
    assert DONE.match(done.stderr.splitlines()[-1])
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    steps = read_steps(tmp_path / "here")
    assert [line["loss"] for line in lines] == [step.loss for step in steps]
    assert [list(line).count("peak_bytes/rank1") for line in lines] == [1, 0, 0, 1]
    watched = lines.pop(1)  # its memory is, which takes time of its own
    assert {"loss", "grad_norm", "learning_rate", "peak_bytes/rank0"} <= watched.keys()
    assert not watched.keys() & {"step_seconds", "wait_seconds", "rows_per_second", "bubble/rank0"}
    for line in lines:
        assert 0 < line["wait_seconds"] < line["step_seconds"]
        # Of a batch of 4 rows of 32, the loss is a mean over the 31 that are predicted.
        assert line["rows_per_second"] == pytest.approx(4 / line["step_seconds"])
        assert line["tokens_per_second"] == pytest.approx(4 * 31 / line["step_seconds"])
        assert line["grad_norm"] > 0
        assert 0 <= line["bubble/rank0"] < 1
    assert [line["learning_rate"] for line in (lines[0], watched)] == [0.005, 0.01]
    assert len(list((tmp_path / "here" / "tensorboard").glob("events.out.tfevents.*"))) == 1


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ranks_of(pid):
    """The processes of the ranks, by the order in which they were started."""
    return [
        child for child in children_of(pid) if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def test_a_rank_killed_in_mid_step_ends_the_command_and_is_named(tmp_path):
    command = [sys.executable, "-m", "evenflow", "train", write_tiny(tmp_path), "--steps", "100000"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("step 1/"):
                break
        ranks = ranks_of(process.pid)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        killed = time.monotonic()
        _, error = process.communicate(timeout=60)
    assert time.monotonic() - killed < 30
    assert process.returncode == 2
    assert "rank 1 was killed by signal 9 (SIGKILL)" in error
    assert "Traceback" not in error
    assert all(has_ended(pid) for pid in ranks)
    assert not (tmp_path / "runs").exists()


def has_ended(pid, within_seconds=10.0):
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], within_seconds)[0])
    finally:
        os.close(descriptor)


def test_a_hugging_face_folder_trains_with_its_tokenizer(tmp_path):
    folder = tiny_llama(tmp_path / "tiny-llama")
    done = evenflow(
        "train",
        "--model",
        folder,
        "--steps",
        3,
        "--batch-size",
        4,
        "--length",
        16,
        "--stages",
        1,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    first, _, validation, *_ = map(float, DONE.match(done.stdout.splitlines()[-1]).groups())
    # Nats per byte are fewer than nats per token: a token of this tokenizer is several bytes.
    assert validation < first / 2
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"


def tiny_llama(folder):
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"[UNK]": 0, "the": 1, "a": 2, "of": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(
        folder
    )
    transformers.LlamaConfig(
        vocab_size=4,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    ).save_pretrained(folder)
    return folder


SOMETIMES_BAD = """
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.drop = nn.Linear(4, 1), nn.Dropout(0.2)

    def forward(self, x):
        return self.layer(x) + torch.log(self.drop(torch.ones(1)))


def build():
    return Model(), lambda model, batch: model(batch["x"]).mean(), {"x": torch.ones(8, 4)}
"""


def test_a_function_alone_learns_its_example_and_steps_that_are_left_out_count(tmp_path):
    (tmp_path / "model.py").write_text(SOMETIMES_BAD)
    flags = ("--device", "cpu", "--stages", 1, "--microbatches", 1, "--steps", 30, "--bad-numbers", "skip")
    ended = evenflow("train", "model.py:build", *flags, "--log-json", "log.jsonl", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    numbers = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert 0 < len(numbers) < 30, "some steps are left out"
    shown = re.findall(r"^step (\d+)/30\b", ended.stdout, re.MULTILINE)
    assert shown[-1] == "30"
    assert re.match(
        r"done: train loss [\d.-]+ -> [\d.-]+, validation [\d.-]+ loss \(on the same batch\), \d+ samples/s",
        ended.stdout.splitlines()[-1],
    )
