"""The folder of a run: what is in it, how it is written, and how it is read again.

    run.json       what the run was and what its steps took (`Run`); written last: with it, all is there
    steps.jsonl    a line for each step (`Step`)
    last_step.json the last one op by op (`LastStep`)
    plan.toml      the plan that the run followed, where there was one
    config.toml    what was asked for, as `evenflow train` reads it
    timeline.png   the last step, predicted and measured
    page.html      the run as a page, once `evenflow show` has made it
    tensorboard/   curves, where they were asked for
    checkpoint/    the trained parameters
    checkpoints/   those that it saved while it trained, and the last of which it would go on from

A folder may come from a stranger: it is data, and what is wrong in it is said with its file and its place.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from evenflow.errors import ConfigError
from evenflow.foreign import parse_json, read_text, shown
from evenflow.journal.last_step import LastStep
from evenflow.journal.run import Run, Step
from evenflow.plain_data import read_as
from evenflow.plan.plan import Plan
from evenflow.plan.plan_file import read_plan_file, write_plan

_VERSION = 2
_RUN, _STEPS, _LAST_STEP = "run.json", "steps.jsonl", "last_step.json"
_PLAN = "plan.toml"
# What others write there, or read.
CONFIG, CHECKPOINT, CHECKPOINTS = "config.toml", "checkpoint", "checkpoints"
PICTURE, PAGE, CURVES = "timeline.png", "page.html", "tensorboard"
_MOST_STEPS_BYTES = 2**28  # of two million steps
# Whole numbers that may be 0; all others are at least 1.
_FROM_ZERO = (".rank", ".peak_bytes", ".source", ".target", ".num_nodes", ".num_parameters", ".num_bytes")

T = TypeVar("T")


def claim(folder: Path) -> Path:
    """Make `folder`, or, where there is something of that name, one called NAME-2, NAME-3, …; return which.

    A folder that is there and empty is taken as it is. Raises `ConfigError` where none can be made.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     _ = (claim(Path(place) / "run") / "run.json").write_text("{}")
    ...     claim(Path(place) / "run").name
    'run-2'
    """
    number, found = 1, folder
    while True:
        try:
            found.mkdir(parents=True)
            return found
        except FileExistsError:
            if is_free(found):
                return found
        except OSError as error:
            raise ConfigError(f"cannot make the run's folder {found}: {error.strerror}") from error
        number += 1
        found = folder.with_name(f"{folder.name}-{number}")


def is_free(folder: Path) -> bool:
    """Whether a run can be written to `folder` without touching anything: it is not there, or empty."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def has_ended(folder: Path) -> bool:
    """Whether the run of a folder has come to its end."""
    return (folder / _RUN).exists()


def write_run(
    folder: Path,
    run: Run,
    steps: Iterable[Step],
    *,
    last_step: LastStep,
    plan: Plan | None,
    config: str,
) -> None:
    """Write what is known of a run into its folder; `config` is the text of its configuration."""
    write_text(folder / CONFIG, config)
    if plan is not None:
        write_text(folder / _PLAN, write_plan(plan))
    write_text(folder / _STEPS, "".join(f"{json.dumps(asdict(step), allow_nan=False)}\n" for step in steps))
    content = {"version": _VERSION, **asdict(last_step)}
    write_text(folder / _LAST_STEP, json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")
    content = {"version": _VERSION, **asdict(run)}
    write_text(folder / _RUN, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that is there only when it is whole."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def is_record(path: Path) -> bool:
    """Whether a file is what a run's folder tells of the run: nothing else may take its place.

    >>> is_record(Path("runs/mine/run.json")), is_record(Path("runs/mine/step.json"))
    (True, False)
    """
    return path.name in (_RUN, _STEPS, _LAST_STEP, _PLAN, CONFIG)


def read_run(folder: Path) -> Run:
    """Read what a run was.

    Raises `ConfigError` for a folder that holds no run, or one of another version, and for what is wrong in
    it, each with its place.

    >>> read_run(Path("runs/mine")).step.median  # doctest: +SKIP
    0.0125
    """
    path = folder / _RUN
    if not path.exists():
        raise ConfigError(f"{folder} holds no {_RUN}: {_where(folder)}")
    return _record(path, Run)


def read_last_step(folder: Path, run: Run) -> LastStep:
    """Read the last step of a run, op by op.

    Raises `ConfigError` as `read_run`, and where it has other stages or ranks than the run.
    """
    path = folder / _LAST_STEP
    found = _record(path, LastStep)
    mine, its = ([stage.rank for stage in each.stages] for each in (run, found))
    if mine != its or len(run.ranks) != len(found.measured):
        raise ConfigError(
            f"{path} has {len(its)} stages on ranks {its}, and the run had {len(mine)} on ranks {mine}: it "
            "is of another run"
        )
    return found


def _record(path: Path, kind: type[T]) -> T:
    content = _json(path, read_text(path, "run"))
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is no record of a run: it must be an object of JSON")
    version = content.pop("version", None)
    if version != _VERSION:
        raise ConfigError(
            f"{path}: version = {shown(version)}, and this Evenflow reads runs of version {_VERSION}"
        )
    try:
        return read_as(kind, content, _least)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_steps(folder: Path) -> tuple[Step, ...]:
    r"""Read a run's steps. Raises `ConfigError` with the line for what is wrong.

    >>> import tempfile
    >>> step = '{"number": 1, "seconds": 0.25, "feed_seconds": 0.0, "loss": 5.5}'
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "steps.jsonl").write_text(f"{step}\n")
    ...     read_steps(Path(folder))
    (Step(number=1, seconds=0.25, feed_seconds=0.0, loss=5.5),)
    """
    path = folder / _STEPS
    steps = []
    text = read_text(path, "run's steps", most_bytes=_MOST_STEPS_BYTES)
    for number, line in enumerate(text.splitlines(), start=1):
        place = f"{path}, line {number}"
        try:
            steps.append(read_as(Step, _json(place, line), _least))
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error
    return tuple(steps)


def read_plan_of(folder: Path, run: Run) -> Plan | None:
    """Read the plan that a run followed; None where there was none.

    Raises `ConfigError` for a plan that can't be read, or that has other stages than the run.

    >>> read_plan_of(Path("runs/mine"), read_run(Path("runs/mine"))).schedule  # doctest: +SKIP
    'zb-h1'
    """
    path = folder / _PLAN
    if not path.exists():
        return None
    plan = read_plan_file(path)
    mine, its = ([stage.rank for stage in each.stages] for each in (run, plan))
    if mine != its or len(run.ranks) != len(plan.ranks):
        raise ConfigError(
            f"{path} plans {len(its)} stages on ranks {its}, and the run had {len(mine)} on ranks {mine}: "
            "it is not this run's plan"
        )
    return plan


def _where(folder: Path) -> str:
    """Where there are runs, if `folder` is none."""
    runs = sorted(path.parent.name for path in folder.glob(f"*/{_RUN}")) if folder.is_dir() else []
    if runs:
        return f"name one of the runs in it: {', '.join(runs)}"
    return "name a folder that `evenflow train` has written, such as runs/NAME"


def _json(place: object, text: str) -> object:
    try:
        return parse_json(text)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error


def _least(kind: type[int] | type[float], place: str) -> float:
    if place == "loss" or "_seconds[" in place or "_bills[" in place:  # a bill's rest, before the first op
        return -math.inf
    return 1 if kind is int and not place.endswith(_FROM_ZERO) and "held_bytes[" not in place else 0
