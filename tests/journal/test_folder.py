"""A run's folder: what is written is read as the same, what is broken is said with its place."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenflow.errors import ConfigError
from evenflow.journal.folder import (
    claim,
    is_free,
    read_last_step,
    read_plan_of,
    read_run,
    read_steps,
    write_run,
    write_text,
)
from evenflow.journal.run import Run
from small_runs import LAST_STEP, PLAN, RUN, STAGES, STEPS


@pytest.fixture
def folder(tmp_path):
    write_run(tmp_path, RUN, STEPS, last_step=LAST_STEP, plan=PLAN, config='name = "mine"\n')
    return tmp_path


def test_a_run_is_read_as_it_was_written(folder):
    assert read_run(folder) == RUN
    assert read_steps(folder) == STEPS
    assert read_last_step(folder, RUN) == LAST_STEP
    assert read_plan_of(folder, RUN) == PLAN
    written = {"config.toml", "last_step.json", "plan.toml", "run.json", "steps.jsonl"}
    assert {path.name for path in folder.iterdir()} == written
    assert (folder / "config.toml").read_text() == 'name = "mine"\n'
    assert json.loads((folder / "run.json").read_text())["version"] == 2


def test_a_run_without_a_plan_has_none(tmp_path):
    write_run(tmp_path, RUN, STEPS, last_step=LAST_STEP, plan=None, config="")
    assert read_plan_of(tmp_path, RUN) is None


def test_what_cannot_be_written_leaves_no_run(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_run(
            tmp_path,
            dataclasses.replace(RUN, feed_seconds=float("nan")),
            STEPS,
            last_step=LAST_STEP,
            plan=None,
            config="",
        )
    with pytest.raises(ConfigError, match=r"holds no run\.json"):
        read_run(tmp_path)


def test_a_taken_folder_gets_a_number(tmp_path):
    first = claim(tmp_path / "runs" / "mine")
    assert first == tmp_path / "runs" / "mine"
    assert claim(first) == first  # it is empty
    (first / "note").touch()
    assert not is_free(first)
    second = claim(first)
    assert second.name == "mine-2"
    (second / "note").touch()
    (tmp_path / "runs" / "mine-3").write_text("a file")
    assert claim(first).name == "mine-4"
    assert not is_free(tmp_path / "runs" / "mine-3")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot make the run's folder"):
        claim(tmp_path / "file" / "mine")


def change(path, key, value):
    content = json.loads(path.read_text())
    *way, last = key.split(".")
    inner = content
    for each in way:
        inner = inner[int(each)] if each.isdigit() else inner[each]
    inner[int(last) if last.isdigit() else last] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", 3, "version = 3, and this Evenflow reads runs of version 2"),
        ("nmae", "mine", "unknown key 'nmae'; did you mean 'name'?"),
        ("name", 3, "name = 3 must be a string"),
        ("machine", "\x1b[2J", r"machine = '\\x1b\[2J' must hold no control characters"),
        ("num_steps", 0, "num_steps = 0 must be at least 1"),
        ("num_steps", True, "num_steps = True must be a whole number"),
        ("num_steps", 10**200, "num_steps = 10+… must be finite"),
        ("step.median", float("nan"), "step.median = nan must be finite"),
        ("step.least", -1, "step.least = -1 must be at least 0"),
        ("step", [1, 2, 3], r"step = \[1, 2, 3\] must be a table"),
        ("stages", {}, "stages = {} must be a list"),
        ("stages", [], r"stages = \[\] must name at least one stage"),
        ("stages.1.rank", 2, r"stages\[1\].rank = 2, and there are 2 ranks"),
        ("stages.0.forward_seconds", None, r"stages\[0\].forward_seconds = None must be a number"),
        ("ranks.0.idle", "much", r"ranks\[0\].idle = 'much' must be a number"),
    ],
)
def test_what_is_wrong_in_a_run_is_said_with_its_place(folder, key, value, message):
    change(folder / "run.json", key, value)
    with pytest.raises(ConfigError, match=message) as refused:
        read_run(folder)
    assert str(refused.value).startswith(f"{folder / 'run.json'}: ")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("measured.0.ops.0", "0F0" * 2000, "an op of 6000 letters: there is none of more than 4096"),
        ("measured.0.ops.0", "fast", "'fast' is not an op"),
        ("measured.0.came_seconds.0", 1e9, r"0F0 comes at 1e\+09 s, starts at 0 and .*: not in turn"),
        ("measured.0.start_seconds.1", 0.013, "comes at 0.014 s, starts at 0.013"),
        (
            "measured.0.end_seconds.0",
            5.0,
            "S0>1F0 comes at 0.014 s, starts at 0.014 and ends at 0.015: not in turn",
        ),
        ("measured.0.end_seconds", [], "a lane's columns must be as long as its 12 ops"),
        ("measured.0.held_bytes.0", -1, r"measured\[0\].held_bytes\[0\] = -1 must be at least 0"),
        ("measured", [], "2 lanes are predicted, and 0 are measured"),
        ("predicted_bills", [], "0 and 2 bills, of 2 ranks"),
        ("caps_bytes", [1.0], "caps_bytes names 1 ranks, and there are 2"),
        ("stages.1.rank", 2, r"stages \[1\] are on ranks beyond the last, 1"),
        ("edges.0.target", 2, "an edge 0>2, and there are 2 stages"),
        ("edges.0.payload", "G", "payload = 'G' must be one of 'F', 'B'"),
        ("stages.1.rank", 0, r"on ranks \[0, 0\], and the run had 2 on ranks \[0, 1\]: it is of another run"),
    ],
)
def test_what_is_wrong_in_a_last_step_is_said(folder, key, value, message):
    change(folder / "last_step.json", key, value)
    with pytest.raises(ConfigError, match=message) as refused:
        read_last_step(folder, RUN)
    assert str(refused.value).startswith(f"{folder / 'last_step.json'}")


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):  # noqa: PT011 (which one, the system decides)
        write_text(tmp_path / "taken", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_missing_key_is_named(folder):
    content = json.loads((folder / "run.json").read_text())
    del content["step"]["most"]
    (folder / "run.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"step\.most is missing"):
        read_run(folder)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\ufeff{}", '{"version": 1' + "0" * 5000 + "}"])
def test_what_is_no_json_is_refused(folder, text):
    (folder / "run.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="is no JSON"):
        read_run(folder)


def test_what_is_no_text_no_object_or_no_file_is_refused(folder):
    path = folder / "run.json"
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="it is not UTF-8 text"):
        read_run(folder)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="must be an object of JSON"):
        read_run(folder)
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match="it is no regular file"):
        read_run(folder)


def test_a_folder_of_runs_names_them(folder):
    with pytest.raises(ConfigError, match=rf"name one of the runs in it: .*\b{folder.name}\b"):
        read_run(folder.parent)
    with pytest.raises(ConfigError, match="name a folder that `evenflow train` has written"):
        read_run(folder / "none")


def test_a_broken_step_is_named_by_its_line(folder):
    with (folder / "steps.jsonl").open("a") as file:
        file.write('{"number": 3, "seconds": -1, "feed_seconds": 0, "loss": null}\n')
    with pytest.raises(ConfigError, match=r"steps\.jsonl, line 3: seconds = -1 must be at least 0"):
        read_steps(folder)
    (folder / "steps.jsonl").unlink()
    with pytest.raises(ConfigError, match="cannot read"):
        read_steps(folder)


def test_a_plan_of_another_run_is_refused(folder):
    other = dataclasses.replace(RUN, stages=STAGES[::-1])
    with pytest.raises(ConfigError, match="it is not this run's plan"):
        read_plan_of(folder, other)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
KEYS = [field.name for field in dataclasses.fields(Run)]


@settings(deadline=None)  # it waits for the disk
@given(key=st.sampled_from(KEYS), value=PLAIN)
def test_any_value_is_read_or_refused(tmp_path_factory, key, value):
    content = {"version": 2, **dataclasses.asdict(RUN), key: value}
    path = tmp_path_factory.getbasetemp() / "run.json"
    path.write_text(json.dumps(content))
    try:
        assert isinstance(read_run(path.parent), Run)
    except ConfigError as error:
        assert key in str(error)  # noqa: PT017 (refusing is one of two right outcomes)
