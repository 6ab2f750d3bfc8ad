"""`evenflow show`: the tables of a run, beside its plan or alone, and what is refused."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

from evenflow.cli.main import main
from evenflow.cli.show import print_run
from evenflow.journal.folder import read_run, write_run
from small_runs import LAST_STEP, PLAN, RUN, STAGES, STEPS


def shown(run=RUN, steps=STEPS, plan=PLAN, width=100):
    """The lines that are printed, their spaces made one."""
    file = io.StringIO()
    print_run(Console(file=file, width=width), run, steps, plan)
    return [" ".join(line.split()) for line in file.getvalue().splitlines()]


def test_a_planned_run_stands_beside_its_plan():
    lines = shown()
    assert lines[0] == "mine: 1f1b, 2 stages, 2 ranks, microbatches: 4"
    assert lines[2] == "12 steps, 1,000 tok/s, loss -1.250 -> -1.250"
    assert "step 160.00 200.00 +25.0% 190.00 400.00" in lines
    assert "its pipeline 150.00 180.00 +20.0% 170.00 300.00" in lines
    assert "the rest 10.00 20.00 ×2.0 - -" in lines
    assert "0 0 20.0 25.0 800.00 1000.00 +25.0%" in lines
    assert "1 1 10.0 20.0 800.00 - -" in lines
    assert "0 embed 10.00 10.00 +0.0% 20.00 26.00 +30.0%" in lines
    assert "1 head 20.00 20.00 +0.0% 40.00 35.00 -12.5%" in lines
    assert any("pipeline takes 175.00 ms; it took 180.00 ms" in line for line in lines)
    assert lines[-1] == (
        "Furthest from the plan: stage 0, backward, planned 20.00 ms and measured 26.00 ms a microbatch "
        "(+30.0%)"
    )


def test_halves_of_backwards_are_told_apart():
    halves = dataclasses.replace(STAGES[1], rank=0)
    lines = shown(dataclasses.replace(RUN, stages=(halves, STAGES[1])))
    assert "1 head 20.00 20.00 +0.0% 20.00 15.00 -25.0% 20.00 20.00 +0.0%" in lines


def test_a_run_without_a_plan_stands_alone():
    lines = shown(plan=None)
    assert not any("plan" in line for line in lines)
    assert "step 200.00 190.00 400.00" in lines
    assert "0 0 25.0 1000.00" in lines
    assert "0 embed 10.00 26.00" in lines


def test_a_plan_of_other_steps_is_said_to_be_so():
    lines = shown(dataclasses.replace(RUN, num_microbatches=8))
    assert lines[3].startswith("The plan is of steps of 4 microbatches, and these had 8: only what one")
    assert "step 200.00 190.00 400.00" in lines
    assert "0 embed 10.00 10.00 +0.0% 20.00 26.00 +30.0%" in lines


def test_nothing_is_cut_off_and_all_fits_into_a_hundred_columns():
    long = tuple(dataclasses.replace(STAGES[1], rank=each.rank, first="layers.11" * 9) for each in STAGES)
    file = io.StringIO()
    print_run(Console(file=file, width=60), dataclasses.replace(RUN, stages=long), STEPS, PLAN)
    tables = file.getvalue().partition("A step")[2].partition("Simulated")[0].splitlines()
    assert 60 < max(map(len, tables)) <= 100
    assert any(line.split()[0] == "stage" and line.split()[-1] == "±" for line in tables if line.split())


def test_memory_that_nobody_knows_has_no_column():
    ranks = tuple(dataclasses.replace(rank, peak_bytes=None) for rank in RUN.ranks)
    unknown = dataclasses.replace(RUN, ranks=ranks, num_steps=1, num_timed=1)
    lines = shown(unknown, plan=None)
    assert "1 step, 1,000 tok/s, loss -1.250 -> -1.250" in lines
    assert "0 0 25.0" in lines
    assert not any("memory" in line for line in lines)
    assert "0 0 20.0 25.0 800.00 - -" in shown(unknown)


def test_without_losses_none_is_shown():
    assert shown(steps=STEPS[1:])[2] == "12 steps, 1,000 tok/s"


def test_the_command_reads_a_folder(tmp_path, capsys):
    write_run(tmp_path, RUN, STEPS, last_step=LAST_STEP, plan=PLAN, config="")
    with pytest.raises(SystemExit) as exited:
        main(["show", str(tmp_path)])
    assert exited.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith("mine: 1f1b")
    assert "rank 1 |" in told  # the drawing
    assert f"wrote {tmp_path / 'page.html'}" in told.replace("\n", "")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_the_command_writes_a_picture_and_a_trace(tmp_path, capsys):
    write_run(tmp_path, RUN, STEPS, last_step=LAST_STEP, plan=PLAN, config="")
    page, picture, trace = (tmp_path / name for name in ("p.html", "step.svg", "step.json"))
    with pytest.raises(SystemExit) as exited:
        main(["show", str(tmp_path), "--page", str(page), "--picture", str(picture), "--trace", str(trace)])
    assert exited.value.code == 0
    assert page.exists()
    assert not (tmp_path / "page.html").exists()
    assert "Measured: makespan" in picture.read_text()
    assert json.loads(trace.read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--picture", "step.gif", "end its name in .svg, .png, .pdf"),
        ("--trace", "run.json", "a run keeps its records under this name"),
        ("--page", "last_step.json", "a run keeps its records under this name"),
        ("--page", ".", "is a folder: name a file in it"),
        ("--picture", "none/step.svg", "there is no folder"),
        ("--page", "none/page.html", "there is no folder"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused(tmp_path, capsys, option, name, message):
    write_run(tmp_path, RUN, STEPS, last_step=LAST_STEP, plan=PLAN, config="")
    with pytest.raises(SystemExit) as exited:
        main(["show", str(tmp_path), option, str(tmp_path / name)])
    assert exited.value.code == 2
    told = capsys.readouterr()
    assert message in told.err
    assert read_run(tmp_path) == RUN


def test_two_files_of_one_name_are_refused(tmp_path, capsys):
    write_run(tmp_path, RUN, STEPS, last_step=LAST_STEP, plan=PLAN, config="")
    with pytest.raises(SystemExit) as exited:
        main(["show", str(tmp_path), "--page", str(tmp_path / "x"), "--trace", str(tmp_path / "x")])
    assert exited.value.code == 2
    assert "--page and --trace both name" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_run_of_somebody_else_is_shown_without_a_page(tmp_path, capsys, monkeypatch):
    write_run(tmp_path, RUN, STEPS, last_step=LAST_STEP, plan=PLAN, config="")
    (tmp_path / "page.html.partial").mkdir()  # so that the page cannot be written
    with pytest.raises(SystemExit) as exited:
        main(["show", str(tmp_path), "--trace", str(tmp_path / "step.json")])
    assert exited.value.code == 0
    assert (
        "page.html: Is a directory; name another file: --page FILE.html"
        in capsys.readouterr().out.replace("\n", "")
    )
    assert (tmp_path / "step.json").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as exited:
        main(["show", str(tmp_path)])
    assert exited.value.code == 2
    assert "holds no run.json: name a folder that `evenflow train` has written" in capsys.readouterr().err
