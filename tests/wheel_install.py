"""The wheel, as a user gets it: built, installed into clean environments, and used there: `make test-wheel`.

It takes a minute and downloads what the wheel depends on, so `make test` does without: pytest takes no file
of this name that it is not told. torch is not downloaded again: the second environment sees that of this one.
"""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import evenflow
from public_api import PUBLIC

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ("--constraint", str(ROOT / "constraints.txt"))
# Nothing of this checkout is to be found by what runs in the clean environments.
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
NEEDS_TORCH = "needs PyTorch 2.11 or newer, which is not installed: pip install 'evenflow[torch]'"


def run(*command, cwd, code=0):
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=CLEAN, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def environment(folder, wheel, *options):
    """A new environment with the wheel in it; returns its bin folder."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    install = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile")
    run(*install, *CONSTRAINTS, *options, wheel, cwd=folder)
    return folder / "bin"


@pytest.fixture(scope="session")
def planning(wheel, tmp_path_factory):
    """An environment of `pip install evenflow`, without torch."""
    return environment(tmp_path_factory.mktemp("planning"), wheel)


@pytest.fixture(scope="session")
def training(wheel, tmp_path_factory):
    """One of `pip install evenflow[torch]`, whose packages but for evenflow are those of this process."""
    folder = tmp_path_factory.mktemp("training")
    tools = environment(folder, wheel, "--no-deps")
    (packages,) = folder.glob("lib/python*/site-packages")
    # These come after the environment's own, and no *.pth among them, of which one leads here, is read.
    (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return tools


@pytest.mark.timeout(600)
def test_the_wheel_holds_what_it_must(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"evenflow/py.typed", "evenflow/demo/demo.toml", "evenflow/demo/gpt.py"} <= set(names)
    pages = {
        path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src/evenflow/view/page").iterdir()
    }
    assert "evenflow/view/page/uPlot.LICENSE" in pages <= set(names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"evenflow"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    sources = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py")}
    assert sources == {name for name in names if name.endswith(".py")}


@pytest.mark.timeout(600)
def test_without_torch_the_version_schedules_and_planning_work(planning, tmp_path):
    assert (
        run(planning / "evenflow", "--version", cwd=tmp_path).stdout == f"evenflow {evenflow.__version__}\n"
    )
    words = ("schedule", "1f1b", "--ranks", 4, "--microbatches", 8, "--draw", "drawn.svg")
    drawn = run(planning / "evenflow", *words, cwd=tmp_path).stdout
    assert drawn.startswith("1f1b: 4 stages on 4 ranks, 8 microbatches")
    assert (tmp_path / "drawn.svg").stat().st_size > 1000
    torch_free = [module for module in PUBLIC if not module.startswith("evenflow.pipe")]
    code = (
        f"import importlib.util, {', '.join(torch_free)}\n"
        "assert importlib.util.find_spec('torch') is None\n"
        "print(evenflow.schedules.catalog.get('1f1b')(4, 1, 8).name, evenflow.__file__)"
    )
    name, place = run(planning / "python", "-c", code, cwd=tmp_path).stdout.split()
    assert name == "1f1b"
    assert Path(place).is_relative_to(planning.parent)


@pytest.mark.timeout(600)
def test_without_torch_a_command_and_a_name_that_need_it_say_so(planning, tmp_path):
    told = run(planning / "evenflow", "train", "--demo", cwd=tmp_path, code=2)
    assert told.stderr == f"error: evenflow train {NEEDS_TORCH}\n"
    told = run(planning / "python", "-c", "from evenflow import pipeline", cwd=tmp_path, code=1)
    assert (
        told.stderr.splitlines()[-1]
        == f"evenflow.errors.MissingPackageError: evenflow.pipeline {NEEDS_TORCH}"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(600)
def test_with_torch_the_demonstration_trains(training, tmp_path):
    code = "import evenflow; print(evenflow.__file__)"
    place = run(training / "python", "-c", code, cwd=tmp_path).stdout.strip()
    assert Path(place).is_relative_to(training.parent)
    told = run(
        training / "evenflow", "train", "--demo", "--steps", 12, "--device", "cpu", cwd=tmp_path
    ).stdout
    assert "demo: starting 2 processes" in told
    assert "done: train loss" in told
    assert {path.name for path in (tmp_path / "runs" / "demo").iterdir()} >= {
        "run.json",
        "timeline.png",
        "checkpoint",
    }
    shown = run(training / "evenflow", "show", "runs/demo", cwd=tmp_path).stdout
    assert shown.startswith("demo: ")
