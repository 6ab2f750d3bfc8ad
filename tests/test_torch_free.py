"""What needs no torch: the floors below the graph, some commands, and all help, which answers at once."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import typer

import evenflow
from evenflow.cli.main import app
from evenflow.errors import ConfigError, MissingPackageError
from evenflow.needs import OLDEST_TORCH, need_torch

PYPROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
CONTRACTS = PYPROJECT["tool"]["importlinter"]["contracts"]
TORCH_FREE = next(each["source_modules"] for each in CONTRACTS if each["type"] == "forbidden")
MODULES = (
    "evenflow.ir, evenflow.cluster.read, evenflow.rules, evenflow.soundness, evenflow.schedules, "
    "evenflow.schedules.catalog, "
    "evenflow.simulate, evenflow.lower, evenflow.validate, evenflow.view.text, evenflow.view.picture, "
    "evenflow.journal.deviation, evenflow.journal.folder, evenflow.torch_schedule"
)
# The commands that work where there is no torch, with what makes them do something small.
WITHOUT_TORCH = {
    "schedule": ["1f1b", "--ranks", "2", "--microbatches", "4"],
    "show": ["nowhere"],
    "export": ["nowhere", "--to", "torch"],
    "play": ["--port", "70000"],
}
NEEDS = "needs PyTorch 2.11 or newer, which is not installed: pip install 'evenflow[torch]'"

# A process in which some modules are not there.
WITHOUT = """
import importlib.abc, sys

class Gone(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {gone!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Gone())
for each in {gone!r}:
    sys.modules.pop(each, None)
"""


def run(code, *, gone=()):
    """What a new process without some modules prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(gone=tuple(gone)) + code],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def commands(group=None, before=()):
    """All commands, those of groups by both words, each with the arguments that it must be given."""
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*before, name))
        else:
            arguments = ["nowhere" for each in command.params if each.required]
            yield " ".join((*before, name)), arguments


COMMANDS = dict(commands())

# Runs each command line of a JSON list; prints, also as JSON, the exit code, the error and what was imported.
CALL = """
import contextlib, io, json
from evenflow.cli.main import main
told = []
for words in json.loads({lines!r}):
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            main(words)
            code = 0
        except SystemExit as exited:
            code = exited.code
    told.append([code, err.getvalue(), sorted(set({heavy!r}) & set(sys.modules))])
print(json.dumps(told))
"""


def called(lines, *, heavy=(), gone=()):
    return run(CALL.format(lines=json.dumps(lines), heavy=tuple(heavy)), gone=gone)


def test_planning_imports_neither_torch_nor_matplotlib():
    heavy = {"torch", "numpy", "matplotlib"}
    code = f"import json; import {MODULES}; print(json.dumps(sorted({heavy!r} & set(sys.modules))))"
    assert run(code) == []


def test_help_imports_nothing_that_takes_long():
    heavy = ("torch", "numpy", "numba", "matplotlib", "rich", "pydantic", "safetensors")
    lines = [[], ["--version"], ["--help"], ["checkpoint", "--help"]]
    lines += [[*name.split(), "--help"] for name in COMMANDS]
    for line, (code, error, imported) in zip(lines, called(lines, heavy=heavy), strict=True):
        assert (line, code, error, imported) == (line, 0 if line else 2, error if not line else "", [])


def test_a_command_that_needs_torch_says_so_and_how_to_get_it():
    assert len(COMMANDS) > len(WITHOUT_TORCH) + 5
    needy = [name for name in COMMANDS if name not in WITHOUT_TORCH]
    for name, (code, error, _) in zip(
        needy, called([[*name.split(), *COMMANDS[name]] for name in needy], gone=["torch"]), strict=True
    ):
        assert (name, code, error) == (name, 2, f"error: evenflow {name} {NEEDS}\n")


# What of POSIX there is not on Windows, and of torch not anywhere.
@pytest.mark.parametrize(
    "gone", [["torch"], ["torch", "fcntl", "resource", "termios", "pwd", "grp", "tty", "pty"]]
)
def test_schedules_and_runs_need_no_torch_and_nothing_of_one_system(gone):
    lines = [[name, *words] for name, words in WITHOUT_TORCH.items()]
    scheduled, shown, exported, played = called(lines, gone=gone)
    assert scheduled == [0, "", []]
    for (code, error, _), message in (
        (shown, "nowhere holds no run.json"),
        (exported, "cannot read"),
        (played, "--port 70000: there are 1 to 65535"),
    ):
        assert code == 2
        assert error.startswith(f"error: {message}")
    code = (
        f"import importlib, json, pkgutil\nfor name in {TORCH_FREE!r}:\n"
        "    module = importlib.import_module(name)\n"
        "    for each in pkgutil.walk_packages(getattr(module, '__path__', ()), name + '.'):\n"
        "        importlib.import_module(each.name)\n"
        "print(json.dumps(sum(name.startswith('evenflow.') for name in sys.modules)))"
    )
    assert run(code, gone=gone) > 100


def test_public_names_need_torch_but_for_the_errors():
    told = run(
        "import json, evenflow\n"
        "told = {}\n"
        "for name in evenflow.__all__:\n"
        "    try:\n"
        "        getattr(evenflow, name)\n"
        "        told[name] = ''\n"
        "    except ImportError as error:\n"
        "        told[name] = f'{type(error).__name__}: {error}'\n"
        "print(json.dumps(told))",
        gone=["torch"],
    )
    for name, error in told.items():
        wanted = "" if name.endswith("Error") else f"MissingPackageError: evenflow.{name} {NEEDS}"
        assert (name, error) == (name, wanted)


def test_a_torch_that_is_too_old_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.2+cu126")
    with pytest.raises(
        MissingPackageError, match=r"needs PyTorch 2\.11 or newer, and 2\.10\.2\+cu126 is inst"
    ):
        _ = evenflow.pipeline
    with pytest.raises(ImportError):
        need_torch("this")
    with pytest.raises(ConfigError):
        need_torch("this")
    for version in ("2.11.0a0+git1234", "2.11.0", "2.13.1+cpu", "3.0"):
        monkeypatch.setattr(torch, "__version__", version)
        need_torch("this")


def test_on_windows_training_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(
        ConfigError, match=r"^evenflow\.launch does not run on Windows.*: use Linux, for instance WSL$"
    ):
        _ = evenflow.launch
    assert evenflow.PeerError.__name__ == "PeerError"


def test_the_extra_asks_for_the_oldest_torch_that_is_taken():
    assert PYPROJECT["project"]["optional-dependencies"]["torch"] == [
        f"torch>={'.'.join(map(str, OLDEST_TORCH))}"
    ]
