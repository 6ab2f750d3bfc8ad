"""The documentation: every file that a page links to is there, and what is to be typed can be read."""

import ast
import re
import shlex
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import typer
import yaml
from torch.distributed.run import get_args_parser

import evenflow
from evenflow.cli.config import (
    FunctionModel,
    Logging,
    Pipelining,
    RunConfig,
    Saving,
    TextData,
    Training,
)
from evenflow.cli.config_file import read_config
from evenflow.cli.main import app
from evenflow.schedules.catalog import SCHEDULES
from public_api import PUBLIC
from source_map import MAP, source_map

ROOT = Path(__file__).parents[1]
BESIDE = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
PAGES = [*BESIDE, *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_links_to_is_there(page):
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = [link for link in LINK.findall(prose) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_the_map_names_every_file_as_its_docstring_does():
    assert source_map() == MAP.read_text(), "python tests/source_map.py > docs/map.txt"


INSIDE = [
    ROOT / "CONTRIBUTING.md",
    ROOT / "docs" / "design.md",
    *sorted((ROOT / "docs" / "design").glob("*.md")),
    *sorted((ROOT / "docs" / "decisions").glob("*.md")),
]


def unknown_places(text):
    """Files, packages and tests that a page names and that are not there; `my_…` are the reader's own."""
    tops = ("src", "tests", "benchmarks", "docs")
    paths = [path.relative_to(ROOT).parts for top in tops for path in (ROOT / top).rglob("*")]
    ends = {*tops, *("/".join(parts[at:]) for parts in paths for at in range(len(parts)))}
    tests = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    places = re.findall(r"`([\w/]+\.py|[\w/]+/)`", text)
    return [place for place in places if place.strip("/") not in ends and "my_" not in place] + [
        name for name in re.findall(r"`(test_\w+)`", text) if name not in tests
    ]


@pytest.mark.parametrize("page", INSIDE, ids=lambda page: page.name)
def test_what_the_design_names_is_there(page):
    assert not unknown_places(page.read_text())
    found = unknown_places(
        "`plan/none.py` `launcher.py` `none/` `test_none` `test_one_last_bit_would_be_noticed`"
    )
    assert found == ["plan/none.py", "none/", "test_none"]


LAUNCHING = (ROOT / "docs" / "launching.md").read_text()


def blocks(kind):
    """What stands in the page's blocks of a kind."""
    return re.findall(rf"```{kind}\n(.*?)```", LAUNCHING, re.DOTALL)


def torchruns():
    """Each torchrun that the page names, as the words after it; what the shell fills in is a 2."""
    job = next(each for each in yaml.safe_load_all(blocks("yaml")[0]) if each["kind"] == "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    text = "\n".join([*blocks("sh"), *blocks("bash"), *container["args"]]).replace("\\\n", " ")
    lines = (line.partition(" #")[0].strip() for line in text.splitlines())
    found = [line.removeprefix("exec ") for line in lines if line.startswith(("torchrun", "exec torchrun"))]
    assert len(found) == 7
    return [shlex.split(re.sub(r"\$\w+", "2", line))[1:] for line in found]


@pytest.mark.parametrize("words", torchruns(), ids=" ".join)
def test_torchrun_and_evenflow_know_the_flags(words):
    given = get_args_parser().parse_args(words)
    assert given.nproc_per_node in ("2", "8")
    assert given.standalone or (given.master_addr and given.nnodes == "2")
    if given.module:
        assert given.training_script == "evenflow"
        command, *arguments = given.training_script_args
        typer.main.get_command(app).commands[command].make_context(command, arguments)
    else:
        assert given.training_script == "train.py"


def test_the_configuration_of_checkpoints():
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    (block,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    Saving(**tomllib.loads(block)["checkpoints"])


def test_all_keys_of_a_configuration_stand_there(tmp_path):
    """Those with a default, with it; those without, each as something that can be said."""
    page = (ROOT / "docs" / "training.md").read_text()
    (block,) = re.findall(r"### All keys\n.*?```toml\n(.*?)```", page, re.DOTALL)
    path = tmp_path / "mine.toml"
    path.write_text(block)
    plain = read_config(path)
    model = FunctionModel(f"{tmp_path}/mine.py:build")
    assert plain == RunConfig("mine", model, TextData())
    for key in re.findall(r"^# (\w+) =", block, re.MULTILINE):
        said = re.sub(rf"^# {key} =", f"{key} =", block, flags=re.MULTILINE)
        if key == "folder":
            said = re.sub(r"^(function|arguments) = .*\n", "", said, flags=re.MULTILINE)
        path.write_text(said)
        assert (read_config(path) == plain) == (key == "name")
    whole = tomllib.loads(re.sub(r"^# (\w+ =)", r"\1", block, flags=re.MULTILINE))
    sections = {
        "data": TextData,
        "training": Training,
        "pipeline": Pipelining,
        "checkpoints": Saving,
        "logs": Logging,
    }
    assert set(whole) == {"name", "model", *sections}
    for name, section in sections.items():
        assert list(whole[name]) == [each.name for each in fields(section)]


def texts_of_the_source():
    """Every string of the source; of an f-string each part between what it fills in."""
    found = set()
    for path in (ROOT / "src" / "evenflow").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        alone = {
            id(node.value) for node in nodes if isinstance(node, ast.Expr)
        }  # docstrings say nothing to users
        constants = (node for node in nodes if isinstance(node, ast.Constant) and id(node) not in alone)
        found.update(node.value for node in constants if isinstance(node.value, str))
    return found


def unknown_messages(page):
    """What the page's blocks of text quote and the source does not say; … stands for what varies."""
    known = texts_of_the_source()
    quoted = [
        line for block in re.findall(r"```text\n(.*?)```", page, re.DOTALL) for line in block.splitlines()
    ]
    parts = [part.strip(" :,;.()") for line in quoted for part in re.split(r"…|%s", line)]
    return quoted, [part for part in parts if part and not any(part in text for text in known)]


def test_every_message_of_the_troubleshooting_stands_in_the_source():
    quoted, unknown = unknown_messages((ROOT / "docs" / "troubleshooting.md").read_text())
    assert len(quoted) > 50
    assert not unknown
    assert unknown_messages("```text\nrank … has a cold\n```")[1] == ["has a cold"]


def test_the_reference_has_what_is_public_and_no_more():
    named = {}
    for page in (ROOT / "docs" / "api").glob("*.md"):
        for place, names in re.findall(
            r"^::: (.+)\n(?:    options:\n      members: \[(.+)\]\n)?", page.read_text(), re.MULTILINE
        ):
            named[place] = tuple(names.split(", ")) if names else None
    errors = {f"evenflow.{name}" for name in evenflow.__all__ if name.endswith("Error")}
    faces = {f"evenflow.{name}" for name in evenflow.__all__} - errors
    methods = {method.__module__: (method.__name__,) for method in SCHEDULES.values()}
    modules = {place: names for place, names in named.items() if place not in faces}
    assert faces <= set(named)
    assert modules == {place: names for place, names in PUBLIC.items() if place != "evenflow"} | methods | {
        "evenflow.errors": None
    }


def test_every_page_of_the_site_is_in_its_menu_under_its_own_title():
    menu = re.findall(r"^ +- (?:(.*): )?([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {str(page.relative_to(ROOT / "docs")): page for page in (ROOT / "docs").rglob("*.md")}
    assert {place for _, place in menu} == pages.keys() | {"CHANGELOG.md", "CONTRIBUTING.md"}
    for title, place in menu:
        if title not in ("", "Home", "Changelog", "Contributing"):
            assert pages[place].read_text().startswith(f"# {title}\n")


def test_links_are_called_by_what_they_lead_to():
    texts = "\n".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    assert not re.findall(r"\[[\w-]+\.md\]\(", texts)
