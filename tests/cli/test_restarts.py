"""Runs that lose ranks, and go on as if nothing had happened; or that are asked for what cannot be."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torture

import forked
from evenflow.checkpoint.manifest import checkpoints_in
from evenflow.cli.job import Flags, make_job
from evenflow.cli.main import main
from evenflow.cli.train import fitting
from evenflow.cli.training import run_rank
from evenflow.errors import ConfigError
from evenflow.journal.folder import read_run, read_steps
from preloaded import python

GPT = Path(__file__).parents[2] / "examples" / "gpt.py"
EVENFLOW = (sys.executable, forked.__file__)
TEXT = """
[model]
function = "{gpt}:build"
arguments = {{ num_layers = 2, width = 32, length = 32 }}
[data]
paths = ["{text}"]
batch_size = 4
length = 32
[training]
steps = 60
learning_rate = 1e-2
warmup_steps = 2
validate_every = 25
[pipeline]
stages = {stages}
num_microbatches = 4
[checkpoints]
every = 2
"""


def losses_here(config: Path) -> list[float | None]:
    """What a run loses that is trained in this process, on one stage: those of any number of ranks."""
    folder = config.parent / "here"
    run_rank(make_job(Flags(source=str(config), device="cpu", stages=1, out=folder)))
    return [step.loss for step in read_steps(folder)]


@pytest.mark.timeout(600)
def test_killed_ranks(tmp_path, monkeypatch):
    """In a step, in a save and in a load; `make torture` does so a hundred times, on four ranks."""
    monkeypatch.setattr(torture, "NUM_RANKS", 2)
    killed = torture.run(tmp_path / "killed", 60, num_kills=3, evenflow=EVENFLOW)
    assert killed.faults == []
    assert killed.kills == dict.fromkeys(torture.PHASES, 1)
    assert len(killed.losses) == 60
    monkeypatch.setenv("TORTURE_FOLDER", str(tmp_path))
    assert killed.losses == losses_here(tmp_path / "killed" / "torture.toml")


# -- one run is stopped, and gone on with by hand


def config(place: Path, stages: int = 2) -> Path:
    path = place / "text.toml"
    path.write_text(TEXT.format(gpt=GPT, text=GPT.parents[1] / "LICENSE", stages=stages))
    return path


def started(place: Path, *command: object, host: str = "one") -> "subprocess.Popen[str]":
    with (place / "output.txt").open("a") as output:
        return subprocess.Popen(
            list(map(str, command)),
            cwd=place,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TEST_HOST": f"{place} {host}"},
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def switch_off(process: "subprocess.Popen[str]", place: Path, host: str = "one") -> None:
    """End all that was started there, launchers and ranks, as when a machine goes down.

    Where a process waits in the stead of another (`preloaded`), that one is ended with it.
    """
    while found := torture.processes_of("TEST_HOST", f"{place} {host}"):
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait(20)


def wait_for(process: "subprocess.Popen[str]", seen) -> None:
    """Until it is seen; a run that ends before has failed."""
    end = time.monotonic() + 120
    while not seen():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)


def ended(process: "subprocess.Popen[str]", seconds: float = 120) -> int:
    try:
        return process.wait(seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def quiet(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(each) for each in arguments])
    return left.value.code


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[float | None]:
    return losses_here(config(tmp_path_factory.mktemp("undisturbed")))


def test_a_run_that_was_stopped_goes_on_with_other_stages(tmp_path, undisturbed, capfd):
    process = started(tmp_path, *EVENFLOW, "train", config(tmp_path), "--resume", "run")
    wait_for(process, lambda: checkpoints_in(tmp_path / "run" / "checkpoints"))
    switch_off(process, tmp_path)
    assert not (tmp_path / "run" / "run.json").exists()
    folder = tmp_path / "run"
    assert quiet("train", "--resume", folder, "--stages", 1) == 0
    said = capfd.readouterr().out
    assert re.search(r"going on from .*step-000000\d\d$", said, re.MULTILINE)
    assert "before training" not in said
    assert [step.loss for step in read_steps(folder)] == undisturbed
    run = read_run(folder)
    assert (run.num_steps, len(run.stages)) == (60, 1)
    assert run.num_timed < 58, "only steps of this part are timed"
    assert quiet("train", "--resume", folder) == 2
    assert "the run in it has ended, after 60 steps" in capfd.readouterr().err


@pytest.mark.timeout(600)
def test_torchrun_goes_on_with_the_hosts_that_are_left(tmp_path, undisturbed):
    """Two launchers, as on two hosts: one is killed with its ranks, the other plans again for its own."""
    port = torture.free_port()
    launcher = (
        *python(),
        "-m",
        "torch.distributed.run",
        "--nnodes=1:2",
        "--nproc-per-node=2",
        "--max-restarts=3",
        *(
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint=127.0.0.1:{port}",
            "--rdzv-id=elastic",
            "--local-addr=127.0.0.1",
        ),
    )
    patience = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=2,join_timeout=60"
    train = ("-m", "evenflow", "train", config(tmp_path, stages=4), "--resume", "run")
    # The host that stays has the store in which hosts meet: without that one nobody can go on.
    stays, goes = (
        started(tmp_path, *launcher, f"--rdzv-conf={patience},is_host={is_host}", *train, host=host)
        for is_host, host in (("true", "one"), ("false", "other"))
    )
    try:
        wait_for(stays, lambda: checkpoints_in(tmp_path / "run" / "checkpoints"))
    finally:
        switch_off(goes, tmp_path, "other")
    assert ended(stays, 240) == 0, (tmp_path / "output.txt").read_text()[-4000:]
    text = (tmp_path / "output.txt").read_text()
    assert "2 processes are left of 4: planning again for those" in text
    assert "going on from" in text
    steps = read_steps(tmp_path / "run")
    assert [step.number for step in steps] == list(range(1, 61))
    assert [step.loss for step in steps] == pytest.approx(undisturbed, rel=1e-4)
    assert len(read_run(tmp_path / "run").ranks) == 2


def test_fewer_devices(tmp_path):
    job = make_job(Flags(source=str(config(tmp_path, stages=4)), device="cpu", max_restarts=1))
    assert fitting(job, 4) is job
    left = fitting(job, 2)
    assert (left.num_processes, left.plans_itself, left.saves) == (2, True, True)
    assert left.config.training == job.config.training
    one = fitting(
        replace(job, config=replace(job.config, pipeline=replace(job.config.pipeline, exact=True))), 1
    )
    assert (one.num_processes, one.config.pipeline.exact) == (1, True)


# -- what is refused


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"max_restarts": 2}, "--max-restarts needs checkpoints, and this run saves none: say --save-every"),
        ({"resume": Path("runs")}, "--resume needs checkpoints, and this run saves none: say --save-every"),
        ({"save_every": 0}, r"checkpoints\.every = 0 must be at least 1"),
        ({"save_every": 1, "keep_last": 0}, r"checkpoints\.keep_last = 0 must be at least 1"),
        ({"save_every": 1, "max_restarts": -1}, "--max-restarts -1"),
        ({"save_every": 1, "resume": Path("a"), "out": Path("b")}, "--resume and --out both name"),
    ],
    ids=str,
)
def test_refused(flags, text):
    with pytest.raises(ConfigError, match=text):
        make_job(Flags(source=f"{GPT}:build", device="cpu", **flags))


def test_torchrun_needs_a_folder(tmp_path, monkeypatch, capfd):
    for name, value in {
        "TORCHELASTIC_RUN_ID": "x",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert quiet("train", config(tmp_path, stages=1)) == 2
    assert "under torchrun a run that saves needs --resume FOLDER" in capfd.readouterr().err
    assert quiet("train", config(tmp_path, stages=1), "--resume", "run", "--max-restarts", 1) == 2
    assert "it is torchrun that restarts, give it the flag" in capfd.readouterr().err
